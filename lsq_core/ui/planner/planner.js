// The view: a slider, the plans at its budget, and why each cell has its bits.
//
// While the slider moves everything happens here, once a frame; letting go commits the budget to
// Python, and what Python then sends is taken over in place.

const THUMB = 18;
const SNAP = 3; // pixels
const STORED = "lsq-planner-unit";
const DIGITS = "0123456789ab";
const planners = new WeakMap();

/** Called by Streamlit on mounting and whenever what Python sends has changed. */
export default function (component) {
  const { parentElement } = component;
  let planner = planners.get(parentElement);
  if (!planner) {
    planner = new Planner(parentElement.querySelector(".lsq"));
    planners.set(parentElement, planner);
  }
  planner.receive(component);
  return () => {
    planner.end();
    planners.delete(parentElement);
  };
}

/** Change an element's text only where it is another, so that nothing is laid out for nothing. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

const round = (value, digits) => Math.round(value * 10 ** digits) / 10 ** digits;

class Planner {
  constructor(root) {
    this.root = root;
    this.find = (css) => root.querySelector(css);
    this.slider = this.find(".slider");
    this.field = this.find(".typed input");
    this.bits = null; // shown, committed, and what was committed before that
    this.committed = null;
    this.before = null;
    this.serial = undefined; // of the last commit that was sent
    this.dragging = false;
    this.panels = [];
    this.hovered = null; // the cell that the details are about: {panel, cell}
    this.selected = null; // the one to go back to when the pointer leaves
    this.#restoreUnit();
    this.#listen();
    this.resizing = new ResizeObserver(() => {
      if (root.clientWidth !== this.width) this.#arrangeAndDraw();
    });
    this.resizing.observe(root);
  }

  end() {
    this.resizing.disconnect();
    cancelAnimationFrame(this.frame);
    window.removeEventListener("pointerup", this.released);
    window.removeEventListener("pointercancel", this.released);
  }

  // --- what Python sends ----------------------------------------------------------------------

  /** Take over what Python sent; while the slider is held it waits. */
  receive(component) {
    this.component = component;
    if (this.dragging) return;
    const { data } = component;
    const anew = this.#takeModel(data.model);
    const changed = this.#takeMethods(data, anew);
    this.data = data;
    this.range = data.feasible.map((bits) => Math.ceil(round(bits * 1e4, 4)) / 1e4);
    this.#takeBudget(data);
    this.facts = data.facts.map(({ label, values }) => ({
      label,
      values: unpack(values, Float64Array),
    }));
    this.fixed = data.fixed === null ? null : unpack(data.fixed, Uint8Array);
    this.#takePins(data);
    this.root.classList.toggle("fixed", this.fixed !== null);
    this.#showScopes();
    this.#showPresets();
    if (anew || changed) {
      this.hovered = this.selected = null;
      delete this.form.dataset.about;
    }
    this.#commitPlans(changed);
    this.#arrangeAndDraw();
  }

  #takeModel(model) {
    if (this.model?.id === model.id) return false;
    const numel = unpack(model.numel, Float64Array);
    const sizeOf = unpack(model.sizeOf, Int32Array);
    this.model = {
      ...model,
      names: model.names.split("\n"),
      layers: unpack(model.layers, Int32Array),
      typeOf: unpack(model.typeOf, Int32Array),
      sizeOf,
      planned: unpack(model.planned, Float64Array),
      onLadder: model.nominal === null,
      nominal:
        model.nominal === null
          ? nominalTable(numel, model.ladder.map((stop) => stop.bits))
          : nominalOfShapes(unpack(model.nominal, Float64Array), sizeOf),
      total: numel.reduce((sum, weights) => sum + weights, 0),
    };
    this.cells = makeCells(this.model);
    return true;
  }

  /** Frontiers that are new are unpacked; says whether any panel shows something else now. */
  #takeMethods(data, anew) {
    const methods = data.fixed === null ? data.methods : data.methods.slice(0, 1);
    const old = anew ? [] : this.panels;
    let changed = old.length !== methods.length;
    if (changed) this.find(".panels").replaceChildren();
    this.panels = methods.map((method, k) => {
      const panel = changed ? this.#makePanel(k) : old[k];
      if (panel.method?.frontier.id !== method.frontier.id) {
        panel.frontier = makeFrontier(method.frontier, this.model.nominal);
        panel.answer = makeAnswer(panel.frontier);
        panel.committed = new Uint8Array(panel.frontier.n);
        panel.before = new Uint8Array(panel.frontier.n);
        changed = true;
      }
      panel.method = method;
      panel.solved = method.solved && {
        bits: this.#exact(data.budget),
        bound: method.solved.bound,
        choice: unpack(method.solved.choice, Uint8Array),
      };
      panel.here = method.here && { bits: this.#exact(data.budget), values: method.here };
      panel.curve = method.curve && { ...unpackCurve(method.curve), color: method.color };
      return panel;
    });
    return changed;
  }

  /** Python's budget counts once Python has seen the last commit that was sent. */
  #takeBudget({ budget, serial }) {
    if (this.serial === undefined) this.serial = serial;
    const wanted = this.#clamp(round(budget ?? this.model.reference.bits, 4));
    if (this.committed === null || (serial === this.serial && wanted !== this.committed)) {
      this.bits = this.committed = wanted;
      this.before = null;
    }
    this.bits = this.#clamp(this.bits);
    this.committed = this.#clamp(this.committed);
  }

  /** The plans at the committed budget, which what is shown is compared with. */
  #commitPlans(changed) {
    for (const panel of this.panels) {
      this.#look(panel, this.committed);
      panel.committed.set(panel.answer.choice);
    }
    if (changed) this.before = null;
  }

  #look(panel, bits) {
    if (this.fixed) panel.answer.choice.set(this.fixed);
    else planAt(panel.frontier, (this.#exact(bits) * this.model.total) / 8, panel.answer);
    if (panel.solved && Math.abs(panel.solved.bits - bits) < 1e-4) {
      panel.answer.choice.set(panel.solved.choice);
      panel.answer.objective = total(panel.frontier.cost, panel.answer.choice);
      panel.answer.lowerBound = panel.solved.bound;
    }
  }

  /** What pins allow each matrix, and a list of them to drop them from. */
  #takePins({ pins, allowed }) {
    this.low = unpack(allowed.low, Uint8Array);
    this.high = unpack(allowed.high, Uint8Array);
    const pinned = this.low.map((low, i) => low > 0 || this.high[i] < this.model.ladder.length - 1);
    for (const panel of this.panels) panel.heatmap.pinned = pinned;
    const entries = pins.map((pin, k) => {
      const entry = make("li", "", pin.replace("=", " = "));
      const drop = make("button", "", "×");
      drop.type = "button";
      drop.setAttribute("aria-label", `Drop the pin ${pin}`);
      drop.addEventListener("click", () => this.component.setTriggerValue("pins", { drop: k }));
      entry.append(drop);
      return entry;
    });
    this.find(".pins").replaceChildren(...entries);
  }

  /** A stop's own size where a budget is its name or its size to four decimals, as in Python. */
  #exact(bits) {
    const typed = round(bits, 4);
    const stop = this.model.stops.find(({ name, bits: size }) =>
      typed === Number(name) || typed === round(size, 4));
    return stop ? stop.bits : bits;
  }

  /** The nearest budget in range; one within a rounding of an end is that end. */
  #clamp(bits) {
    const [low, high] = this.range;
    bits = this.#exact(bits);
    if (bits >= high - 1e-4) return high;
    return bits <= low ? low : bits;
  }

  // --- what the person does ---------------------------------------------------------------------

  #listen() {
    const { slider, field } = this;
    this.released = () => this.#release();
    window.addEventListener("pointerup", this.released);
    window.addEventListener("pointercancel", this.released);
    slider.addEventListener("pointerdown", () => {
      this.dragging = true;
    });
    slider.addEventListener("input", () => this.#show(this.#snap(round(Number(slider.value), 3))));
    slider.addEventListener("change", () => this.#release());
    slider.addEventListener("keydown", (event) => this.#slideByKey(event));
    slider.addEventListener("keyup", () => this.#commit(this.bits));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.#commitTyped();
      if (event.key === "Escape") this.#writeField();
    });
    field.addEventListener("focus", () => field.select());
    field.addEventListener("blur", () => this.#commitTyped());
    this.form = this.find(".pin");
    this.form.addEventListener("submit", (event) => this.#pin(event));
    this.form.addEventListener("focusout", (event) => this.#leave(event));
    for (const radio of this.root.querySelectorAll("input[type=radio]")) {
      radio.addEventListener("change", () => {
        this[radio.name] = radio.value;
        this.#storeUnit();
        this.#say("");
        this.#arrangeAndDraw();
      });
    }
  }

  /** Show a budget without committing it, at the next frame. */
  #show(bits) {
    this.bits = this.#clamp(bits);
    this.#say("");
    this.frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** The stop within a few pixels of a budget; keys and the field reach what lies between. */
  #snap(bits) {
    if (!this.model.onLadder) return bits; // mixed rows: the marks are no stops
    const near = this.model.stops.filter((stop) => Math.abs(this.x(stop.bits) - this.x(bits)) <= SNAP);
    const distance = (stop) => Math.abs(stop.bits - bits);
    return near.sort((a, b) => distance(a) - distance(b))[0]?.bits ?? bits;
  }

  #slideByKey(event) {
    const steps = {
      ArrowLeft: -0.01, ArrowDown: -0.01, ArrowRight: 0.01, ArrowUp: 0.01,
      PageDown: -0.1, PageUp: 0.1, Home: -Infinity, End: Infinity,
    };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this.#show(round(this.bits + step, 3));
  }

  /** Let go: what the slider shows counts, also against a budget that Python sent meanwhile. */
  #release() {
    const held = this.dragging;
    this.dragging = false;
    this.#commit(this.bits);
    if (held && this.component.data !== this.data) this.receive(this.component);
  }

  /** Settle on a budget: it is drawn, remembered, and told to Python. */
  #commit(bits) {
    if (bits === this.committed || this.fixed) return;
    this.before = this.committed;
    this.bits = this.committed = bits;
    for (const panel of this.panels) panel.before.set(panel.committed);
    this.#commitPlans(false);
    this.#draw();
    this.#speak(this.panels.map((panel) => panel.moves.textContent).join(" "));
    this.serial = Date.now();
    this.component.setStateValue("commit", { bits, serial: this.serial });
  }

  #commitTyped() {
    const text = this.field.value.trim();
    if (text === this.written) return;
    const bits = this.#readBits(text);
    if (Number.isNaN(bits)) {
      this.#say(`“${text}” is not a number; the budget is still ${this.#inUnit(this.bits)}.`);
    } else {
      this.#jump(bits, `${text} ${this.#unitWord()}`);
    }
    this.#writeField();
  }

  /** Commit the nearest budget there is, and say so where it is not the one that was wanted. */
  #jump(bits, wanted, room = "") {
    const [low, high] = this.range;
    this.#say("");
    if (bits < low - 0.005) {
      this.#say(`${wanted} is less than the smallest plan${room} takes, ` +
        `${this.#size(low, room)}; showing the smallest.`);
    } else if (bits > high + 0.005) {
      this.#say(`${wanted} is more than the largest plan${room} needs, ` +
        `${this.#size(high, room)}; showing the largest.`);
    }
    const nearest = this.#clamp(round(bits, 4));
    if (nearest === this.committed) {
      this.bits = nearest;
      this.#draw();
    } else {
      this.#commit(nearest);
    }
  }

  #size(bits, room) {
    return room ? formatBytes(this.#bytes(bits, true)) : this.#inUnit(bits);
  }

  #say(sentence) {
    setText(this.find(".message"), sentence);
  }

  #speak(text) {
    setText(this.find(".spoken"), text);
  }

  /** The whole model can be counted only where the rest of it is known. */
  #showScopes() {
    const whole = this.find("input[value=whole]");
    whole.disabled = this.data.otherBytes === null;
    whole.parentElement.title = whole.disabled ? "The size of the rest of this model isn't known." : "";
    if (whole.disabled) this.scope = "linear";
    for (const radio of this.root.querySelectorAll("input[name=scope]")) {
      radio.checked = radio.value === this.scope;
    }
  }

  #showPresets() {
    const key = JSON.stringify([this.data.presets, this.range]);
    if (key === this.presets) return;
    this.presets = key;
    const buttons = this.data.presets.map(({ label, bits, about }) => {
      const button = make("button", "", label);
      button.type = "button";
      button.title = about;
      const inside = bits >= this.range[0] - 0.005 && bits <= this.range[1] + 0.005;
      button.classList.toggle("outside", !inside);
      button.addEventListener("click", () => this.#jump(bits, label, ", with room for context,"));
      return button;
    });
    const name = buttons.length ? [make("span", "", "fits in")] : [];
    this.find(".presets").replaceChildren(...name, ...buttons);
  }

  // --- units --------------------------------------------------------------------------------------

  #restoreUnit() {
    const [unit, scope] = (sessionStorage.getItem(STORED) ?? "bits linear").split(" ");
    this.unit = unit;
    this.scope = scope;
    for (const radio of this.root.querySelectorAll("input[type=radio]")) {
      radio.checked = this[radio.name] === radio.value;
    }
  }

  #storeUnit() {
    sessionStorage.setItem(STORED, `${this.unit} ${this.scope}`);
  }

  /** Nominal bytes of a budget, with the rest of the model where that is counted. */
  #bytes(bits, whole = this.scope === "whole") {
    return (bits * this.model.total) / 8 + (whole ? this.data.otherBytes : 0);
  }

  /** The unit that sizes of this model are typed in. */
  #sizeUnit() {
    return SIZES.find(([, size]) => this.#bytes(this.range[1]) >= size) ?? ["B", 1];
  }

  #unitWord() {
    if (this.unit === "size") return this.#sizeUnit()[0];
    return this.unit === "bits" ? "bits" : "%";
  }

  #uniformBytes() {
    return this.#bytes(this.model.reference.bits);
  }

  /** A budget as a number of the chosen unit. */
  #number(bits) {
    if (this.unit === "bits") return bits.toFixed(3);
    if (this.unit === "size") return (this.#bytes(bits) / this.#sizeUnit()[1]).toFixed(3);
    return (100 * (this.#bytes(bits) / this.#uniformBytes() - 1)).toFixed(2).replace("-", "−");
  }

  #inUnit(bits) {
    return `${this.#number(bits)} ${this.#unitWord()}`;
  }

  /** Bits per parameter of a number typed in the chosen unit; NaN where it is none. */
  #readBits(text) {
    const match = /^([+-]?\d*[.,]?\d+|[+-]?\d+[.,]?)\s*(bits|bpp|%|B|KiB|MiB|GiB)?$/.exec(
      text.replace("−", "-")
    );
    if (!match) return NaN;
    const value = Number(match[1].replace(",", "."));
    const unit = match[2] ?? this.#unitWord();
    if (unit === "bits" || unit === "bpp") return value;
    const bytes =
      unit === "%"
        ? (1 + value / 100) * this.#uniformBytes()
        : value * (SIZES.find(([name]) => name === unit)?.[1] ?? 1);
    return (8 * (bytes - this.#bytes(0))) / this.model.total;
  }

  #writeField() {
    this.written = this.#number(this.bits);
    this.field.value = this.written;
  }

  // --- drawing: once for a width and data ---------------------------------------------------------

  #makePanel(k) {
    const element = this.find("template.panel").content.firstElementChild.cloneNode(true);
    this.find(".panels").append(element);
    const find = (css) => element.querySelector(css);
    const panel = {
      index: k,
      element,
      heading: find("h3"),
      differ: find(".differ"),
      grid: find(".cells"),
      layers: find(".layers"),
      moves: find(".moves"),
      heatmap: new Heatmap(find("canvas"), this.cells, this.model.ladder),
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
    panel.bytes = Array.from(this.model.types, () => new Float64Array(STOPS));
    panel.counts = new Int32Array(STOPS);
    this.#listenToCells(panel);
    return panel;
  }

  #arrangeAndDraw() {
    const width = this.root.clientWidth;
    if (!this.data || !width) return;
    this.width = width;
    this.root.classList.toggle("narrow", width < 1040);
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
      this.#labelLayers(panel, cells);
      panel.heading.textContent = panel.method.title;
      panel.grid.setAttribute("aria-label", `${panel.method.title}: ${this.cells.columns} layers ` +
        `by ${this.cells.rows} module types. Arrow keys move from cell to cell.`);
    }
    this.root.classList.toggle("pair", this.panels.length === 2);
    this.#headReadout();
    if (!this.fixed) this.#arrangeTrack(cells);
    this.#draw();
  }

  #labelLayers(panel, width) {
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

  #headReadout() {
    const { reference } = this.model;
    setText(this.find("input[value=more] + span"), `% above uniform ${reference.name}`);
    const pair = this.panels.length === 2;
    const costed = this.panels.filter(({ frontier }) => frontier.cost || frontier.losses);
    const units = [...new Set(costed.map((panel) => panel.method.unit))];
    this.columns = [
      ["bits", "bits per parameter"],
      ["planned", "planned"],
      ["whole", "whole model"],
      ["more", `against uniform ${reference.name}`],
    ];
    if (this.panels.some((p) => p.curve)) this.columns.push(["perplexity", "predicted perplexity"]);
    if (!this.fixed && costed.length) {
      const least = (units.length === 1 && units[0]) || "cost";
      this.columns.push(["gap", `above the optimal ${least}`]);
    }
    const head = this.columns.map(([, title]) => make("th", "", title));
    this.find(".readout thead tr").replaceChildren(...(pair ? [make("th")] : []), ...head);
    const rows = this.panels.map((panel) => {
      const row = make("tr");
      if (pair) {
        const name = make("th", "", panel.method.title);
        name.style.setProperty("--color", panel.method.color);
        row.append(name);
      }
      panel.readout = {};
      for (const [name] of this.columns) {
        const cell = make("td", name);
        cell.append(make("span"), make("small"));
        panel.readout[name] = cell;
        row.append(cell);
      }
      return row;
    });
    this.find(".readout tbody").replaceChildren(...rows);
  }

  #arrangeTrack(width) {
    const [low, high] = this.range;
    this.x = (bits) => THUMB / 2 + ((bits - low) / (high - low || 1)) * (width - THUMB);
    Object.assign(this.x, { left: THUMB / 2, width: width - THUMB });
    Object.assign(this.slider, { min: low, max: high });
    const curves = this.panels.map((panel) => panel.curve).filter(Boolean);
    this.root.classList.toggle("predicted", curves.length > 0);
    if (curves.length) this.#drawCurves(curves, width);
    this.#labelTicks(width);
    this.#writeLabels();
  }

  #drawCurves(curves, width) {
    const size = { width, height: this.find(".strip").clientHeight };
    const scale = makeScale(curves, this.range, size.height);
    drawStrip(this.find(".strip canvas"), size, curves, scale, this.x, this.style);
    const labels = scale.values.map((value) => {
      const label = make("span", "", formatNumber(value, 3));
      label.style.top = `${scale.y(value)}px`;
      return label;
    });
    this.find(".scale").replaceChildren(...labels);
    setText(this.find(".legend"), "predicted perplexity with its band; dashed: full precision");
  }

  /** The uniform stops, labelled as far as there is room, and the ends in the chosen unit. */
  #labelTicks(width) {
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
    for (const bits of this.range) label(this.#end(bits), this.x(bits), "end");
    const { ladder } = this.model;
    for (const j of [3, 6, 9, 0, 5, 8, 11, 2, 4, 7, 10, 1].filter((j) => j < ladder.length)) {
      if (ladder[j].bits < this.range[0] - 5e-4 || ladder[j].bits > this.range[1] + 5e-4) continue;
      const mark = make("i");
      mark.style.left = `${this.x(ladder[j].bits)}px`;
      ticks.append(mark);
      label(ladder[j].stop, this.x(ladder[j].bits), "");
    }
  }

  #end(bits) {
    if (this.unit === "bits") return `${bits.toFixed(2)} bits`;
    return this.unit === "size" ? formatBytes(this.#bytes(bits)) : this.#inUnit(bits);
  }

  #writeLabels() {
    setText(this.find(".typed span"), this.#unitWord());
    const scope = this.scope === "whole" ? ", whole model" : "";
    this.field.setAttribute("aria-label", `Budget in ${this.#unitWord()}${scope}`);
    this.field.value = this.written = this.#number(this.bits);
  }

  // --- drawing: once a frame ----------------------------------------------------------------------

  #draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    for (const panel of this.panels) {
      this.#look(panel, this.bits);
      this.#measure(panel);
    }
    const widest = Math.max(...this.panels.flatMap((panel) => panel.bytes.map((b) => b.sum)));
    for (const panel of this.panels) {
      this.#paint(panel);
      this.#writeReadout(panel);
      this.#writeBars(panel, widest);
      this.#writeLadder(panel);
      this.#writeMoves(panel);
    }
    if (!this.fixed) this.#drawTrack();
    this.#writeDetails();
    this.#expose();
  }

  /** Nominal and planned bytes, by type and stop, and how many matrices have each stop. */
  #measure(panel) {
    const { planned, sizeOf, typeOf } = this.model;
    const { choice } = panel.answer;
    panel.counts.fill(0);
    for (const row of panel.bytes) row.fill(0);
    for (let i = 0; i < choice.length; i++) {
      panel.counts[choice[i]]++;
      panel.bytes[typeOf[i]][choice[i]] += planned[sizeOf[i] * STOPS + choice[i]];
    }
    panel.planned = 0;
    for (const row of panel.bytes) {
      row.sum = row.reduce((sum, bytes) => sum + bytes, 0);
      panel.planned += row.sum;
    }
    panel.nominal = total(this.model.nominal, choice);
  }

  #paint(panel) {
    const otherPanel = this.panels[1 - panel.index];
    const { choice } = panel.answer;
    const committed = this.bits === this.committed ? null : panel.committed;
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

  #writeReadout(panel) {
    const { data, model } = this;
    const bits = (8 * panel.nominal) / model.total;
    const write = (name, text, small = "") => {
      const cell = panel.readout[name];
      if (!cell) return;
      setText(cell.firstChild, text);
      setText(cell.lastChild, small);
    };
    const unspent = !this.fixed && this.bits - bits > 0.005;
    write("bits", bits.toFixed(2), unspent ? `of ${this.bits.toFixed(2)}` : "");
    write("planned", formatBytes(panel.planned));
    write("whole", data.otherBytes === null ? "unknown" : formatBytes(panel.planned + data.otherBytes));
    write("more", signedPercent(bits / model.reference.bits - 1));
    const [perplexity, low, high] = this.#predicted(panel, this.fixed ? bits : this.bits);
    if (Number.isNaN(perplexity)) write("perplexity", "–");
    else write("perplexity", formatNumber(perplexity, 3), `${formatNumber(low, 3)}–${formatNumber(high, 3)}`);
    write("gap", panel.frontier.cost || panel.frontier.losses ? `≤ ${formatPercent(this.#gap(panel))}` : "–");
  }

  #predicted({ curve, here }, bits) {
    if (!curve) return [NaN, NaN, NaN];
    if (here && (this.fixed || Math.abs(here.bits - bits) < 1e-4)) return here.values;
    return [curve.perplexity, curve.low, curve.high].map((column) => interpolate(curve, column, bits));
  }

  /** How far a plan's cost can be above the least possible, as Plan.to_json has it. */
  #gap({ answer }) {
    return answer.objective ? (answer.objective - answer.lowerBound) / Math.abs(answer.objective) : 0;
  }

  #writeBars(panel, widest) {
    panel.bars.forEach((bar, k) => {
      const row = panel.bytes[k];
      const parts = [];
      let at = 0;
      for (let j = 0; j < STOPS; j++) {
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

  #writeLadder(panel) {
    panel.stops.forEach((entry, j) => {
      entry.classList.toggle("unused", panel.counts[j] === 0);
      setText(entry.lastChild, panel.counts[j] ? String(panel.counts[j]) : "");
    });
  }

  /** What has moved since the committed plan, or, once that is what is shown, since the one before. */
  #writeMoves(panel) {
    const moving = this.bits !== this.committed;
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
    const then = this.unit === "bits" ? this.#number(since) : this.#inUnit(since);
    setText(panel.moves, `Since ${then}: ${said}${list}`);
  }

  #drawTrack() {
    const { slider } = this;
    if (!this.dragging) slider.value = this.bits;
    const x = this.x(this.bits);
    slider.style.setProperty("--filled", `${x}px`);
    this.find(".mark.now").style.transform = `translateX(${x}px)`;
    this.find(".mark.committed").style.transform = `translateX(${this.x(this.committed)}px)`;
    if (this.root.getRootNode().activeElement !== this.field) this.#writeField();
    const first = this.panels[0];
    const [perplexity] = this.#predicted(first, this.bits);
    const words = [`${this.bits.toFixed(2)} bits per parameter`, formatBytes(first.planned)];
    if (!Number.isNaN(perplexity)) words.push(`${formatNumber(perplexity, 3)} predicted`);
    slider.setAttribute("aria-valuetext", words.join(", "));
  }

  /** What the page is read by from outside. */
  #expose() {
    const { dataset } = this.root;
    dataset.bits = this.bits;
    dataset.committed = this.committed;
    this.panels.forEach((panel, k) => {
      dataset[`choice${k}`] = Array.from(panel.answer.choice, (stop) => DIGITS[stop]).join("");
    });
    dataset.changed = this.panels[0].changed;
    if (this.panels[1]) dataset.different = this.panels[0].different;
  }

  // --- why a cell has its bits ----------------------------------------------------------------------

  #listenToCells(panel) {
    const { grid } = panel;
    const cellUnder = (event) => {
      const box = grid.getBoundingClientRect();
      return panel.heatmap.cellAt(event.clientX - box.left, event.clientY - box.top);
    };
    grid.addEventListener("pointermove", (event) => this.#point(panel, cellUnder(event)));
    grid.addEventListener("pointerleave", () => this.#point(this.selected?.panel, this.selected?.cell ?? -1));
    grid.addEventListener("pointerdown", (event) => {
      this.selected = { panel, cell: cellUnder(event) };
      panel.cursor = this.selected.cell;
      this.#offerPin();
    });
    grid.addEventListener("focus", () => {
      if (grid.matches(":focus-visible")) this.#moveCursor(panel, Math.max(panel.cursor, 0));
    });
    grid.addEventListener("blur", (event) => this.#leave(event));
    grid.addEventListener("keydown", (event) => this.#walk(panel, event));
  }

  /** The cell is let go of once something else has the focus, other than its pin or a plan. */
  #leave({ relatedTarget: to }) {
    if (!to || this.form.contains(to) || to.classList.contains("cells")) return;
    this.selected = null;
    this.#point(null, -1);
  }

  #walk(panel, event) {
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
    this.#moveCursor(panel, row * columns + column);
  }

  #moveCursor(panel, cell) {
    panel.cursor = cell;
    this.selected = { panel, cell };
    this.#point(panel, cell);
    this.#speak(this.find(".details").innerText.replace(/\n+/g, ". "));
  }

  #point(panel, cell) {
    const next = panel && cell >= 0 ? { panel, cell } : null;
    if (next?.panel === this.hovered?.panel && next?.cell === this.hovered?.cell) return;
    this.hovered = next;
    for (const each of this.panels) this.#paint(each);
    this.#writeDetails();
  }

  #writeDetails() {
    const details = this.find(".details");
    if (!this.hovered) {
      details.replaceChildren(...this.#hints().map((text) => make("p", "hint", text)));
      this.#offerPin();
      return;
    }
    const { panel, cell } = this.hovered;
    const members = this.cells.members[cell];
    const parts = members.length
      ? [this.#title(panel, members), this.#factList(members), this.#why(panel, members)]
      : [make("p", "hint", "This layer has no such module.")];
    details.replaceChildren(...parts);
    this.#offerPin();
  }

  /** What can be done with cells, and what the marks on them mean. */
  #hints() {
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

  /** The form for the cell that was clicked or walked to; its words follow the cell. */
  #offerPin() {
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

  #pin(event) {
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

  /** What a pin leaves a matrix, as a sentence; nothing for one that is free. */
  #heldBy(i) {
    const [low, high] = [this.low[i], this.high[i]];
    const { ladder } = this.model;
    const [first, last] = [ladder[low].name, ladder[high].name];
    const most = ladder.length - 1;
    if (low === high) return [`Pinned to ${first}.`];
    if (low > 0) return [`Pinned to ${high < most ? `${first} to ${last}` : `at least ${first}`}.`];
    return high < most ? [`Pinned to at most ${last}.`] : [];
  }

  #title(panel, members) {
    const { names, ladder, planned, sizeOf } = this.model;
    const { choice } = panel.answer;
    const counts = new Map();
    let bytes = 0;
    for (const i of members) {
      counts.set(choice[i], (counts.get(choice[i]) ?? 0) + 1);
      bytes += planned[sizeOf[i] * STOPS + choice[i]];
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

  #factList(members) {
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

  #why(panel, members) {
    const why = make("div", "why");
    if (this.fixed) return why;
    const sentences = [...this.#heldBy(members[0]), ...this.#reasons(panel, members)];
    why.append(...sentences.map((sentence) => make("p", "", sentence)));
    return why;
  }

  #reasons(panel, members) {
    if (panel.frontier.losses) return this.#together(panel, members[0]);
    if (!panel.frontier.cost) return this.#rankOf(panel, members[0]);
    return this.#priceOf(panel, this.#dearest(panel, members), members.length > 1);
  }

  /** Where on the slider a matrix that is chosen together with others is given something else. */
  #together({ frontier, answer, method }, i) {
    const { ladder, total: weights } = this.model;
    const at = frontier.segments.indexOf(answer.segment);
    const why = `The matrices of a block are chosen jointly, to minimize the ${method.unit}.`;
    for (const { start, startBytes } of frontier.segments.slice(at + 1)) {
      if (start[i] === answer.choice[i]) continue;
      const bits = ((8 * startBytes) / weights).toFixed(3);
      return [why, `It is given ${ladder[start[i]].name} next, at ${bits} bits.`];
    }
    return [why, "No larger budget changes it."];
  }

  /** Of several experts the one for which one more stop is worth most. */
  #dearest(panel, members) {
    const worth = (i) => this.#nextStop(panel, i)?.price ?? -Infinity;
    return members.reduce((best, i) => (worth(i) > worth(best) ? i : best));
  }

  /** The next stop that may be chosen: its bytes, what it saves, and that for each byte. */
  #nextStop({ frontier, answer }, i) {
    const { cost, nominal } = frontier;
    const here = i * STOPS + answer.choice[i];
    for (let at = here + 1; at < (i + 1) * STOPS; at++) {
      if (cost[at] === Infinity) continue;
      const more = nominal[at] - nominal[here];
      const saved = cost[here] - cost[at];
      return { stop: at - i * STOPS, more, saved, price: saved / more };
    }
    return null;
  }

  #priceOf(panel, i, several) {
    const { answer, frontier, method } = panel;
    const { ladder, names } = this.model;
    const next = this.#nextStop(panel, i);
    if (!next) return ["It already has the most bits allowed."];
    const whole = Math.abs(answer.objective) || 1;
    const perMib = (price) => `${formatPercent((price * MIB) / whole)} per MiB`;
    const expert = several ? `Of its experts ${names[i].match(/\d+$/)?.[0] ?? names[i]} gains most: ` : "";
    const saves =
      next.saved > 0
        ? `saves ${formatPercent(next.saved / whole)} of the total ${method.unit || "cost"}, ` +
          perMib(next.price)
        : "saves nothing";
    const step = `${expert}promoting it to ${ladder[next.stop].name} takes ` +
      `${formatBytes(next.more)} and ${saves}.`;
    return [
      step[0].toUpperCase() + step.slice(1),
      this.#verdict(answer, next, perMib),
      this.#comes(frontier, answer, i),
    ];
  }

  #verdict({ price, taken, segment }, next, perMib) {
    if (taken === segment.matrix.length) return "No further promotion reduces the cost.";
    const stop = `At this budget a promotion has to save ${perMib(price)}`;
    if (next.saved <= 0) return `${stop}.`;
    if (next.price < price) return `${stop}, so it is not worth its bytes yet.`;
    return `${stop}: it would be worth its bytes but does not fit in the remaining budget.`;
  }

  /** Where on the slider the matrix moves next. */
  #comes(frontier, { segment, taken, choice }, i) {
    for (let k = taken; k < segment.matrix.length; k++) {
      if (segment.matrix[k] !== i || segment.reached[k] <= choice[i]) continue;
      const bits = (8 * segment.after[k]) / this.model.total;
      return `Its next promotion, to ${this.model.ladder[segment.reached[k]].name}, comes at ` +
        `${bits.toFixed(3)} bits.`;
    }
    return "No larger budget promotes it.";
  }

  /** For boosts: whether a matrix is flagged, and its place among those that are raised. */
  #rankOf({ frontier, answer }, i) {
    const { ladder, total: weights } = this.model;
    const { segment, taken } = answer;
    const base = ladder[segment.start[i]].name;
    const following = frontier.segments[frontier.segments.indexOf(segment) + 1];
    const until = following
      ? ` The next base fits at ${((8 * following.startBytes) / weights).toFixed(3)} bits.`
      : "";
    const k = segment.matrix.indexOf(i);
    if (k < 0) {
      const plan = segment.matrix.length ? "Not flagged: it keeps the base" : "It has the base";
      return [`${plan}, ${base}.${until}`];
    }
    const at = `${((8 * segment.after[k]) / weights).toFixed(3)} bits`;
    const when = k < taken ? `promoted from ${at} on` : `promoted at ${at}`;
    return [
      `Flagged, number ${k + 1} of ${segment.matrix.length}: ${when}, from ${base} to ` +
        `${ladder[segment.reached[k]].name}.${until}`,
    ];
  }
}
