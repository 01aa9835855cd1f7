// Drawing: the layout, done once per width, and the parts updated each frame.

const THUMB = 18;
/** One character per configuration of the ladder, for the choices in data attributes. */
const DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz";

/** Set an element's text only if it differs, to avoid needless layout. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

class PlannerDrawing extends PlannerUnits {
  // --- drawing: once per width and data -----------------------------------------------------------

  _makePanel(k) {
    const element = this.find("template.panel").content.firstElementChild.cloneNode(true);
    this.find(".panels").append(element);
    const find = (css) => element.querySelector(css);
    const panel = {
      index: k,
      element,
      heading: find("h3"),
      differ: find(".differ"),
      grid: find(".cells"),
      scores: find(".scores"),
      layers: find(".layers"),
      moves: find(".moves"),
      heatmap: new Heatmap(find(".cells canvas"), this.cells, this.model.ladder),
      cursor: -1,
    };
    find(".rows").replaceChildren(
      ...this.model.types.map((type) => Object.assign(make("span", "", type), { title: type }))
    );
    panel.bars = this.model.types.map(() => {
      const bar = make("div");
      bar.append(make("i"), make("b"), make("small"));
      return bar;
    });
    find(".bars").replaceChildren(...panel.bars);
    panel.stops = this.model.ladder.map((stop) => {
      const entry = make("li");
      const swatch = make("i");
      swatch.style.background = stop.color;
      entry.title = `${stop.name} has ${formatNumber(stop.bits, 4)} bits per parameter`;
      entry.append(swatch, make("span", "", stop.name), make("b"));
      return entry;
    });
    find(".ladder").replaceChildren(...panel.stops);
    const options = this.model.ladder.length;
    panel.bytes = Array.from(this.model.types, () => new Float64Array(options));
    panel.counts = new Int32Array(options);
    this._listenToCells(panel);
    return panel;
  }

  _arrangeAndDraw() {
    const width = this.root.clientWidth;
    if (!this.data || !width) return;
    this.width = width;
    this.root.classList.toggle("narrow", width < 1040);
    this.root.classList.toggle("small", width < 560);
    const style = getComputedStyle(this.root);
    this.style = {
      text: style.color,
      font: style.fontFamily,
      primary: style.getPropertyValue("--st-primary-color").trim() || style.color,
    };
    const cells = this.panels[0].grid.clientWidth;
    const rowHeight = this.cells.rows > 9 ? 20 : 26;
    this.root.style.setProperty("--row", `${rowHeight}px`);
    for (const panel of this.panels) {
      panel.heatmap.arrange(cells, rowHeight, this.style);
      this._drawScores(panel, cells);
      this._labelLayers(panel, cells);
      panel.heading.textContent = panel.method.title;
      panel.grid.setAttribute("aria-label", `${panel.method.title}: ${this.cells.columns} layers ` +
        `by ${this.cells.rows} module types. Arrow keys move from cell to cell.`);
    }
    this.root.classList.toggle("pair", this.panels.length === 2);
    this._headReadout();
    if (!this.fixed) this._arrangeTrack(cells);
    this._draw();
  }

  /** Draw the sensitivity of each layer above its column. */
  _drawScores({ element, scores, method }, width) {
    element.classList.toggle("scored", method.scores !== null);
    if (!method.scores) return;
    const values = unpack(method.scores.values, Float64Array);
    const known = Array.from(values).filter((value) => value > 0);
    const range = [Math.min(...known), Math.max(...known)].map((value) => formatNumber(value, 2));
    const name = element.querySelector(".scored-by");
    setText(name, method.scores.name);
    name.title = scores.title = `${method.scores.label}, mean of each layer's matrices, ` +
      `logarithmic: ${range[0]} to ${range[1]}`;
    drawScores(scores.firstElementChild, { width, height: scores.clientHeight }, values, this.style.text);
  }

  _labelLayers(panel, width) {
    const { layers, columns } = this.cells;
    const step = [1, 2, 5, 10, 20].find((by) => (by * width) / columns >= 24) ?? 50;
    panel.layers.replaceChildren(
      ...layers.flatMap((layer, k) => {
        if (layer % step) return [];
        const label = make("span", "", String(layer));
        label.style.left = `${((k + 0.5) * width) / columns}px`;
        return label;
      })
    );
  }

  _headReadout() {
    setText(this.find("input[value=more] + span"), `% above uniform ${this.model.reference.name}`);
    const pair = this.panels.length === 2;
    const costed = this.panels.filter(({ frontier }) => frontier.cost || frontier.losses);
    const units = [...new Set(costed.map((panel) => panel.method.unit))];
    this.columns = [
      ["bits", "bits per parameter"],
      ["planned", "planned"],
      ["whole", "whole model"],
      ["more", "memory against uniform"],
    ];
    if (this.panels.some((p) => p.curve)) this.columns.push(["perplexity", "predicted perplexity"]);
    if (this.uniform) this.columns.push(["gain", "perplexity against uniform"]);
    if (!this.fixed && units.length === 1) {
      this.columns.push(["gap", `above the optimal ${units[0] || "cost"}`]);
    }
    if (this.panels.some((panel) => panel.free)) {
      this.oneCost = units.length === 1 && costed.length === this.panels.length;
      const what = this.oneCost && !this.fixed ? `${units[0] || "cost"} ` : "";
      this.columns.push(["free", `${what}against the plan without ties`]);
    }
    const about = "Against the largest uniform plan that is not larger than this one, as in the " +
      "headline; for perplexity where the predictions are precise enough to compare.";
    const head = this.columns.map(([name, title]) =>
      Object.assign(make("th", "", title), { title: ["more", "gain"].includes(name) ? about : "" }));
    this.find(".readout thead tr").replaceChildren(...(pair ? [make("th")] : []), ...head);
    const rows = this.panels.map((panel) => {
      const row = make("tr");
      if (pair) {
        const name = make("th", "", panel.method.title);
        name.style.setProperty("--color", panel.method.color);
        row.append(name);
      }
      panel.readout = {};
      for (const [name, title] of this.columns) {
        const cell = make("td", name);
        cell.dataset.title = title;
        cell.append(make("span"), make("small"));
        panel.readout[name] = cell;
        row.append(cell);
      }
      return row;
    });
    this.find(".readout tbody").replaceChildren(...rows);
  }

  _arrangeTrack(width) {
    const { bits, shares, folded } = makeTrack(this.range, this.model.onLadder ? foldOf(this.model.stops) : null);
    this.x = (budget) => THUMB / 2 + translate(bits, shares, budget) * (width - THUMB);
    this.budgetAt = (share) => translate(shares, bits, share);
    this.shareOf = (budget) => translate(bits, shares, budget);
    Object.assign(this.x, { left: THUMB / 2, width: width - THUMB });
    Object.assign(this.slider, { min: 0, max: 1 });
    Object.assign(this.root.dataset, { trackBits: bits.join(), trackShares: shares.join() });
    const curves = this.panels.map((panel) => panel.curve).filter(Boolean);
    this.root.classList.toggle("predicted", curves.length > 0);
    if (curves.length) this._drawCurves(curves, width);
    this._labelTicks(width, folded);
    this._writeLabels();
  }

  _drawCurves(curves, width) {
    const size = { width, height: this.find(".strip").clientHeight };
    const shown = this.uniform ? [...curves, this.uniform] : curves;
    const scale = makeScale(shown, this.range, size.height);
    drawStrip(this.find(".strip canvas"), size, curves, this.uniform, scale, this.x, this.style);
    const labels = scale.values.map((value) => {
      const label = make("span", "", formatNumber(value, 3));
      label.style.top = `${scale.y(value)}px`;
      return label;
    });
    this.find(".scale").replaceChildren(...labels);
    const legend = this.find(".legend");
    const grey = this.uniform ? "; grey: uniform" : "";
    setText(legend, `predicted perplexity, ${formatNumber(curves[0].full, 3)} in full precision${grey}`);
    legend.title = "With its 90 % band, by the logarithm of the excess over full precision." +
      (this.uniform ? " Shaded: the gain over uniform plans of at most the same size." : "");
  }

  /** Label the ends in the chosen unit, and as many uniform stops as there is room for. */
  _labelTicks(width, folded) {
    const ticks = this.find(".ticks");
    ticks.replaceChildren();
    const taken = [];
    const label = (text, x, className) => {
      const element = make("span", className, text);
      ticks.append(element);
      const wide = element.offsetWidth;
      const left = Math.min(Math.max(x - wide / 2, 0), width - wide);
      if (taken.some(([from, to]) => left < to + 8 && left + wide > from - 8)) {
        element.remove();
        return;
      }
      taken.push([left, left + wide]);
      element.style.left = `${left}px`;
    };
    for (const bits of this.range) label(this._end(bits), this.x(bits), "end");
    if (folded) label("⋯", (this.x(folded[0]) + this.x(folded[1])) / 2, "fold");
    const { ladder } = this.model;
    for (const j of this.model.ticks) {
      if (ladder[j].bits < this.range[0] - 5e-4 || ladder[j].bits > this.range[1] + 5e-4) continue;
      const mark = make("i");
      mark.style.left = `${this.x(ladder[j].bits)}px`;
      ticks.append(mark);
      label(ladder[j].stop, this.x(ladder[j].bits), "");
    }
  }

  _end(bits) {
    if (this.unit === "bits") return `${bits.toFixed(2)} bits`;
    return this.unit === "size" ? formatBytes(this._sizeAt(bits, null)) : this._inUnit(bits);
  }

  _writeLabels() {
    const isSize = this.unit === "size";
    setText(this.find(".typed span"), isSize ? `${this._unitWord()} planned` : this._unitWord());
    const scope = this.scope === "whole" ? ", whole model" : "";
    this.field.setAttribute("aria-label", `Budget in ${this._unitWord()}${scope}`);
    this.field.value = this.written = this._number(this.bits, this.bytes);
  }

  // --- drawing: once per frame --------------------------------------------------------------------

  _draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    for (const panel of this.panels) {
      this._look(panel, this.bits, this.bytes);
      this._measure(panel);
    }
    const widest = Math.max(...this.panels.flatMap((panel) => panel.bytes.map((b) => b.sum)));
    for (const panel of this.panels) {
      this._paint(panel);
      this._writeReadout(panel);
      this._writeBars(panel, widest);
      this._writeLadder(panel);
      this._writeMoves(panel);
    }
    if (!this.fixed) this._drawTrack();
    this._writeDetails();
    this._expose();
  }

  /** Compute nominal and planned bytes, the latter by type and stop, and matrices per stop. */
  _measure(panel) {
    const { ladder, planned, sizeOf, typeOf } = this.model;
    const { choice } = panel.answer;
    panel.counts.fill(0);
    for (const row of panel.bytes) row.fill(0);
    for (let i = 0; i < choice.length; i++) {
      panel.counts[choice[i]]++;
      panel.bytes[typeOf[i]][choice[i]] += planned[sizeOf[i] * ladder.length + choice[i]];
    }
    panel.planned = 0;
    for (const row of panel.bytes) {
      row.sum = row.reduce((sum, bytes) => sum + bytes, 0);
      panel.planned += row.sum;
    }
    panel.nominal = total(this.model.nominal, choice, ladder.length);
  }

  /** Whether the shown budget is not committed yet. */
  _isMoving() {
    return this.bits !== this.committed || this.bytes !== this.committedBytes;
  }

  _paint(panel) {
    const otherPanel = this.panels[1 - panel.index];
    const { choice } = panel.answer;
    const committed = this._isMoving() ? panel.committed : null;
    const other = otherPanel ? otherPanel.answer.choice : null;
    const focused = this.hovered?.panel === panel ? this.hovered.cell : -1;
    panel.heatmap.paint(choice, committed, other, focused);
    if (!otherPanel) return;
    let different = 0;
    for (let i = 0; i < choice.length; i++) if (choice[i] !== other[i]) different++;
    panel.different = different;
    setText(panel.differ, `${different} of ${counted(choice.length, "matrix", "matrices")} ` +
      `${different === 1 ? "differs" : "differ"} from ${otherPanel.method.title}`);
  }

  _writeReadout(panel) {
    const { data, model } = this;
    const bits = (8 * panel.nominal) / model.total;
    const write = (name, text, small = "") => {
      const cell = panel.readout[name];
      if (!cell) return;
      setText(cell.firstChild, text);
      setText(cell.lastChild, small);
    };
    const unspent = !this.fixed && this.bytes === null && this.bits - bits > 0.005;
    write("bits", bits.toFixed(2), unspent ? `of ${this.bits.toFixed(2)}` : "");
    const within = this.bytes !== null && this.bytes - panel.planned > 5e-5 * this.bytes;
    write("planned", formatBytes(panel.planned), within ? `of ${formatBytes(this.bytes)}` : "");
    write("whole", data.otherBytes === null ? "unknown" : formatBytes(panel.planned + data.otherBytes));
    const uniform = this._uniformWithin(bits);
    write("more", signedPercent(bits / uniform.bits - 1), `uniform ${uniform.name}`);
    const predicted = this._predicted(panel, this.fixed ? bits : this.bits);
    const [perplexity, low, high] = predicted;
    if (Number.isNaN(perplexity)) write("perplexity", "–");
    else write("perplexity", formatNumber(perplexity, 3), `${formatNumber(low, 3)}–${formatNumber(high, 3)}`);
    const gain = this._gain(predicted, uniform);
    const overlap = gain === null && this.uniform && !Number.isNaN(perplexity);
    write("gain", gain === null ? "–" : signedPercent(gain), overlap ? "bands overlap" : "");
    write("free", ...this._againstFree(panel));
    write("gap", panel.frontier.cost || panel.frontier.losses ? `≤ ${formatPercent(this._gap(panel))}` : "–");
  }

  _writeBars(panel, widest) {
    panel.bars.forEach((bar, k) => {
      const row = panel.bytes[k];
      const parts = [];
      let at = 0;
      for (let j = 0; j < row.length; j++) {
        if (!row[j]) continue;
        const to = at + (100 * row[j]) / row.sum;
        parts.push(`${this.model.ladder[j].color} ${at.toFixed(2)}% ${to.toFixed(2)}%`);
        at = to;
      }
      const [strip, size, share] = bar.children;
      const image = `linear-gradient(90deg, ${parts.join(", ")})`;
      if (bar.image !== image) {
        bar.image = image;
        strip.style.background = image;
        strip.style.width = `calc((100% - var(--words)) * ${(row.sum / widest).toFixed(4)})`;
      }
      setText(size, shortBytes(row.sum));
      setText(share, formatPercent(row.sum / panel.planned));
    });
  }

  _writeLadder(panel) {
    panel.stops.forEach((entry, j) => {
      entry.classList.toggle("unused", panel.counts[j] === 0);
      setText(entry.lastChild, panel.counts[j] ? String(panel.counts[j]) : "");
    });
  }

  /** List changes since the committed plan or, if that is shown, since the one before it. */
  _writeMoves(panel) {
    const moving = this._isMoving();
    const since = moving ? this.committed : this.before;
    if (since === null || this.fixed) {
      panel.changed = 0;
      setText(panel.moves, "");
      return;
    }
    const from = moving ? panel.committed : panel.before;
    const { choice } = panel.answer;
    const { names, ladder, layers, types, typeOf } = this.model;
    const first = [];
    let [up, down] = [0, 0];
    for (let i = 0; i < choice.length; i++) {
      if (choice[i] === from[i]) continue;
      if (choice[i] > from[i]) up++;
      else down++;
      if (first.length < 6) {
        const expert = names[i].match(/\.(\d+)$/);
        first.push(`layer ${layers[i]} ${types[typeOf[i]]}${expert ? `.${expert[1]}` : ""} ` +
          `${ladder[from[i]].name}→${ladder[choice[i]].name}`);
      }
    }
    panel.changed = up + down;
    const rest = up + down - first.length;
    const list = first.length ? `: ${first.join(", ")}${rest ? ` and ${rest} more` : ""}` : "";
    const said = up + down ? `${counted(up, "matrix", "matrices")} up, ${down} down` : "no change";
    const bytes = moving ? this.committedBytes : this.beforeBytes;
    const then = this.unit === "bits" ? this._number(since) : this._inUnit(since, bytes);
    setText(panel.moves, `Since ${then}: ${said}${list}`);
  }

  _drawTrack() {
    const { slider } = this;
    if (!this.dragging) slider.value = this.shareOf(this.bits);
    const x = this.x(this.bits);
    slider.style.setProperty("--filled", `${x}px`);
    this.find(".mark.now").style.transform = `translateX(${x}px)`;
    this.find(".mark.committed").style.transform = `translateX(${this.x(this.committed)}px)`;
    if (this.root.getRootNode().activeElement !== this.field) this._writeField();
    const first = this.panels[0];
    const [perplexity] = this._predicted(first, this.bits);
    const words = [`${this.bits.toFixed(2)} bits per parameter`, formatBytes(first.planned)];
    if (!Number.isNaN(perplexity)) words.push(`${formatNumber(perplexity, 3)} predicted`);
    slider.setAttribute("aria-valuetext", words.join(", "));
  }

  /** Expose the state as data attributes, for tests and scripts. */
  _expose() {
    const { dataset } = this.root;
    dataset.bits = this.bits;
    dataset.bytes = this.bytes ?? "";
    dataset.committed = this.committed;
    this.panels.forEach((panel, k) => {
      dataset[`choice${k}`] = Array.from(panel.answer.choice, (stop) => DIGITS[stop]).join("");
    });
    dataset.changed = this.panels[0].changed;
    if (this.panels[1]) dataset.different = this.panels[0].different;
  }
}
