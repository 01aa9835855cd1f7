// Details of a cell: why it has its bits, and the form to pin it.

class PlannerDetails extends PlannerDrawing {
  // --- why a cell has its bits ----------------------------------------------------------------------

  _listenToCells(panel) {
    const { grid } = panel;
    const cellUnder = (event) => {
      const box = grid.getBoundingClientRect();
      return panel.heatmap.cellAt(event.clientX - box.left, event.clientY - box.top);
    };
    grid.addEventListener("pointermove", (event) => this._point(panel, cellUnder(event)));
    grid.addEventListener("pointerleave", () => this._point(this.selected?.panel, this.selected?.cell ?? -1));
    grid.addEventListener("pointerdown", (event) => {
      this.selected = { panel, cell: cellUnder(event) };
      panel.cursor = this.selected.cell;
      this._offerPin();
    });
    grid.addEventListener("focus", () => {
      if (grid.matches(":focus-visible")) this._moveCursor(panel, Math.max(panel.cursor, 0));
    });
    grid.addEventListener("blur", (event) => this._leave(event));
    grid.addEventListener("keydown", (event) => this._walk(panel, event));
  }

  /** Deselect the cell once the focus moves to anything but the pin form or a plan. */
  _leave({ relatedTarget: to }) {
    if (!to || this.form.contains(to) || to.classList.contains("cells")) return;
    this.selected = null;
    this._point(null, -1);
  }

  _walk(panel, event) {
    const { columns, rows } = this.cells;
    const at = Math.max(panel.cursor, 0);
    let [row, column] = [Math.floor(at / columns), at % columns];
    if (event.key === "ArrowLeft") column--;
    else if (event.key === "ArrowRight") column++;
    else if (event.key === "ArrowUp") row--;
    else if (event.key === "ArrowDown") row++;
    else if (event.key === "Home") column = 0;
    else if (event.key === "End") column = columns - 1;
    else return;
    event.preventDefault();
    row = Math.min(Math.max(row, 0), rows - 1);
    column = Math.min(Math.max(column, 0), columns - 1);
    this._moveCursor(panel, row * columns + column);
  }

  _moveCursor(panel, cell) {
    panel.cursor = cell;
    this.selected = { panel, cell };
    this._point(panel, cell);
    this._speak(this.find(".details").innerText.replace(/\n+/g, ". "));
  }

  _point(panel, cell) {
    const next = panel && cell >= 0 ? { panel, cell } : null;
    if (next?.panel === this.hovered?.panel && next?.cell === this.hovered?.cell) return;
    this.hovered = next;
    for (const each of this.panels) this._paint(each);
    this._writeDetails();
  }

  _writeDetails() {
    const details = this.find(".details");
    if (!this.hovered) {
      details.replaceChildren(...this._hints().map((text) => make("p", "hint", text)));
      this._offerPin();
      return;
    }
    const { panel, cell } = this.hovered;
    const members = this.cells.members[cell];
    const parts = members.length
      ? [this._title(panel, members), this._factList(members), this._why(panel, members)]
      : [make("p", "hint", "This layer has no such module.")];
    details.replaceChildren(...parts);
    this._offerPin();
  }

  /** Hints on using cells, and the meaning of the marks on them. */
  _hints() {
    const marks = ["a frame or bar marks changes since the last committed budget"];
    if (this.panels.length === 2) marks.push("a dot where the two methods differ");
    marks.push("a folded corner marks a pin");
    const said = marks.join(", ");
    return [
      "Hover over a cell to see why it has its bits and click it to pin it, or focus the plan and " +
        "use the arrow keys.",
      `${said[0].toUpperCase()}${said.slice(1)}.`,
    ];
  }

  // --- pins -----------------------------------------------------------------------------------------

  /** Show the form for the selected cell, with labels that match the cell. */
  _offerPin() {
    const { form, selected, hovered } = this;
    const members = selected && selected.cell >= 0 ? this.cells.members[selected.cell] : [];
    const shown = members.length > 0 && selected.panel === hovered?.panel && selected.cell === hovered.cell;
    form.classList.toggle("idle", !shown);
    const about = shown ? `${selected.panel.index} ${selected.cell}` : form.dataset.about;
    if (about === form.dataset.about) return;
    form.dataset.about = about;
    const { ladder, layers, types, typeOf } = this.model;
    const [first] = members;
    const { scope, how, stop } = form.elements;
    const words = ["this module", `layer ${layers[first]}`, `every ${types[typeOf[first]]}`];
    words.forEach((text, k) => setText(scope.options[k], text));
    stop.replaceChildren(...ladder.map((each, j) => new Option(each.name, j)));
    stop.value = String(selected.panel.answer.choice[first]);
    scope.value = "module";
    how.value = "exactly";
  }

  _pin(event) {
    event.preventDefault();
    const { scope, how, stop } = this.form.elements;
    const at = Number(stop.value);
    this.component.setTriggerValue("pins", {
      matrix: this.cells.members[this.selected.cell][0],
      scope: scope.value,
      low: how.value === "most" ? 0 : at,
      high: how.value === "least" ? this.model.ladder.length - 1 : at,
    });
  }

  /** A sentence on the configurations that pins allow a matrix; empty if it isn't pinned. */
  _heldBy(i) {
    const [low, high] = [this.low[i], this.high[i]];
    const { ladder } = this.model;
    const [first, last] = [ladder[low].name, ladder[high].name];
    const most = ladder.length - 1;
    if (low === high) return [`Pinned to ${first}.`];
    if (low > 0) return [`Pinned to ${high < most ? `${first} to ${last}` : `at least ${first}`}.`];
    return high < most ? [`Pinned to at most ${last}.`] : [];
  }

  /** A sentence on the modules a matrix shares its configuration with; empty if it isn't tied. */
  _tiedTo(i) {
    if (this.tied === null) return [];
    const { types, typeOf } = this.model;
    const kinds = new Set();
    let experts = false;
    for (let j = 0; j < this.tied.length; j++) {
      if (j === i || this.tied[j] !== this.tied[i]) continue;
      kinds.add(types[typeOf[j]]);
      experts ||= typeOf[j] === typeOf[i];
    }
    if (!kinds.size) return [];
    const names = [...kinds].join(", ").replace(/, ([^,]*)$/, " and $1");
    return [`Shares its configuration with ${names}${experts ? " of all experts" : ""}.`];
  }

  _title(panel, members) {
    const { names, ladder, planned, sizeOf } = this.model;
    const { choice } = panel.answer;
    const counts = new Map();
    let bytes = 0;
    for (const i of members) {
      counts.set(choice[i], (counts.get(choice[i]) ?? 0) + 1);
      bytes += planned[sizeOf[i] * ladder.length + choice[i]];
    }
    const title = make("div", "title");
    const first = names[members[0]];
    title.append(make("strong", "", members.length > 1 ? first.replace(/\.\d+$/, "") : first));
    if (members.length > 1) title.append(make("span", "", `${members.length} experts`));
    for (const [stop, count] of [...counts].sort((a, b) => b[1] - a[1])) {
      const swatch = make("span", "config");
      const color = make("i");
      color.style.background = ladder[stop].color;
      const bits = `${ladder[stop].name}, ${formatNumber(ladder[stop].bits, 4)} bits`;
      swatch.append(color, members.length > 1 ? `${count} × ${ladder[stop].name}` : bits);
      title.append(swatch);
    }
    title.append(make("span", "", formatBytes(bytes)));
    const otherPanel = this.panels[1 - panel.index];
    if (otherPanel && members.length === 1) {
      const theirs = ladder[otherPanel.answer.choice[members[0]]].name;
      title.append(make("span", "quiet", `${otherPanel.method.title}: ${theirs}`));
    }
    return title;
  }

  _factList(members) {
    const list = make("dl");
    for (const { label, values } of this.facts) {
      const known = members.map((i) => values[i]).filter((value) => !Number.isNaN(value));
      const [low, high] = [Math.min(...known), Math.max(...known)];
      const text = low === high ? formatNumber(low, 4) : `${formatNumber(low, 3)} to ${formatNumber(high, 3)}`;
      const pair = make("div");
      pair.append(make("dt", "", label), make("dd", "", known.length ? text : "–"));
      list.append(pair);
    }
    return list;
  }

  _why(panel, members) {
    const why = make("div", "why");
    if (this.fixed) return why;
    const [first] = members;
    const restrictions = [...this._heldBy(first), ...this._tiedTo(first)];
    const sentences = [...restrictions, ...this._reasons(panel, members)];
    why.append(...sentences.map((sentence) => make("p", "", sentence)));
    return why;
  }

  _reasons(panel, members) {
    if (panel.frontier.losses) return this._together(panel, members[0]);
    if (!panel.frontier.cost) return this._rankOf(panel, members[0]);
    return this._priceOf(panel, this._dearest(panel, members), members.length > 1);
  }

  /** For jointly chosen matrices: the budget at which a matrix's configuration changes next. */
  _together({ frontier, answer, method }, i) {
    const { ladder, total: weights } = this.model;
    const at = frontier.segments.indexOf(answer.segment);
    const why = `The matrices of a block are chosen jointly, to minimize the ${method.unit}.`;
    for (const { start, startBytes } of frontier.segments.slice(at + 1)) {
      if (start[i] === answer.choice[i]) continue; // starts are complete plans, by matrix
      const bits = ((8 * startBytes) / weights).toFixed(3);
      return [why, `It is given ${ladder[start[i]].name} next, at ${bits} bits.`];
    }
    return [why, "No larger budget changes it."];
  }

  /** The expert whose next stop saves the most cost per byte. */
  _dearest(panel, members) {
    const worth = (i) => this._nextStop(panel, i)?.price ?? -Infinity;
    return members.reduce((best, i) => (worth(i) > worth(best) ? i : best));
  }

  /** The next allowed stop: the bytes it adds, the cost it saves, and that cost per byte. */
  _nextStop({ frontier, answer }, i) {
    const { columns, cost, nominal } = frontier;
    const row = itemOf(frontier, i) * columns;
    const here = row + answer.choice[i];
    for (let at = here + 1; at < row + columns; at++) {
      if (cost[at] === Infinity) continue;
      const more = nominal[at] - nominal[here];
      const saved = cost[here] - cost[at];
      return { stop: at - row, more, saved, price: saved / more };
    }
    return null;
  }

  _priceOf(panel, i, several) {
    const { answer, frontier, method } = panel;
    const { ladder, names } = this.model;
    const next = this._nextStop(panel, i);
    if (!next) return ["It already has the most bits allowed."];
    const whole = Math.abs(answer.objective) || 1;
    const perMib = (price) => `${formatPercent((price * MIB) / whole)} per MiB`;
    const expert = several ? `Expert ${names[i].match(/\d+$/)?.[0] ?? names[i]} gains most: ` : "";
    const saves =
      next.saved > 0
        ? `saves ${formatPercent(next.saved / whole)} of the total ${method.unit || "cost"}, ` +
          perMib(next.price)
        : "saves nothing";
    const what = this._tiedTo(i).length ? "them" : "it";
    const step = `${expert}promoting ${what} to ${ladder[next.stop].name} takes ` +
      `${formatBytes(next.more)} and ${saves}.`;
    return [
      step[0].toUpperCase() + step.slice(1),
      this._verdict(answer, next, perMib),
      this._comes(frontier, answer, i),
    ];
  }

  _verdict({ price, taken, segment }, next, perMib) {
    if (taken === segment.matrix.length) return "No further promotion reduces the cost.";
    const stop = `At this budget a promotion has to save ${perMib(price)}`;
    if (next.saved <= 0) return `${stop}.`;
    if (next.price < price) return `${stop}, so it is not worth its bytes yet.`;
    return `${stop}: it would be worth its bytes but does not fit in the remaining budget.`;
  }

  /** A sentence on the budget at which the matrix is promoted next. */
  _comes(frontier, { segment, taken, choice }, i) {
    const item = itemOf(frontier, i);
    for (let k = taken; k < segment.matrix.length; k++) {
      if (segment.matrix[k] !== item || segment.reached[k] <= choice[i]) continue;
      const bits = (8 * segment.after[k]) / this.model.total;
      return `Its next promotion, to ${this.model.ladder[segment.reached[k]].name}, comes at ` +
        `${bits.toFixed(3)} bits.`;
    }
    return "No larger budget promotes it.";
  }

  /** For methods without a cost: whether a matrix is boosted, and its rank among those that are. */
  _rankOf({ frontier, answer }, i) {
    const { ladder, total: weights } = this.model;
    const { segment, taken } = answer;
    const item = itemOf(frontier, i);
    const base = ladder[segment.start[item]].name;
    const following = frontier.segments[frontier.segments.indexOf(segment) + 1];
    const until = following
      ? ` The next base fits at ${((8 * following.startBytes) / weights).toFixed(3)} bits.`
      : "";
    const k = segment.matrix.indexOf(item);
    if (k < 0) {
      const plan = segment.matrix.length ? "Not boosted: it keeps the base" : "It has the base";
      return [`${plan}, ${base}.${until}`];
    }
    const at = `${((8 * segment.after[k]) / weights).toFixed(3)} bits`;
    const when = k < taken ? `promoted from ${at} on` : `promoted at ${at}`;
    return [
      `Boosted, number ${k + 1} of ${segment.matrix.length}: ${when}, from ${base} to ` +
        `${ladder[segment.reached[k]].name}.${until}`,
    ];
  }
}
