// The view: a slider, the plans at its budget, and why each cell has its bits.
//
// While the slider moves, everything happens here, once per frame; releasing it commits the budget
// to Python, whose response then updates the view in place.

const SNAP = 3; // pixels
const planners = new WeakMap();

/** Called by Streamlit on mounting and whenever the data from Python has changed. */
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

class Planner extends PlannerDetails {
  constructor(root) {
    super();
    this.root = root;
    this.find = (css) => root.querySelector(css);
    this.slider = this.find(".slider");
    this.field = this.find(".typed input");
    // The shown, the committed and the previously committed budget: nominal bits per parameter and,
    // if a size was typed, the planned bytes that bound every plan.
    this.bits = this.bytes = null;
    this.committed = this.committedBytes = null;
    this.before = this.beforeBytes = null;
    this.serial = undefined; // of the last commit sent
    this.dragging = false;
    this.panels = [];
    this.hovered = null; // the cell that the details are about: {panel, cell}
    this.selected = null; // the cell to return to when the pointer leaves
    this._restoreUnit();
    this._listen();
    this.resizing = new ResizeObserver(() => {
      if (root.clientWidth !== this.width) this._arrangeAndDraw();
    });
    this.resizing.observe(root);
  }

  end() {
    this.resizing.disconnect();
    cancelAnimationFrame(this.frame);
    window.removeEventListener("pointerup", this.released);
    window.removeEventListener("pointercancel", this.released);
  }

  // --- data from Python -----------------------------------------------------------------------

  /** Adopt the data from Python, deferred while the slider is being dragged. */
  receive(component) {
    this.component = component;
    if (this.dragging) return;
    const { data } = component;
    const anew = this._takeModel(data.model);
    const changed = this._takeMethods(data, anew);
    this.data = data;
    this.range = data.feasible.map((bits) => Math.ceil(round(bits * 1e4, 4)) / 1e4);
    this._takeBudget(data);
    this.uniform = data.uniform && unpackCurve(data.uniform);
    this.facts = data.facts.map(({ label, values }) => ({
      label,
      values: unpack(values, Float64Array),
    }));
    this.fixed = data.fixed === null ? null : unpack(data.fixed, Uint8Array);
    this.tied = data.tied === null ? null : unpack(data.tied, Int32Array);
    this._takePins(data);
    this.root.classList.toggle("fixed", this.fixed !== null);
    this._showScopes();
    this._showPresets();
    if (anew || changed) {
      this.hovered = this.selected = null;
      delete this.form.dataset.about;
    }
    this._commitPlans(changed);
    this._arrangeAndDraw();
  }

  _takeModel(model) {
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
    const { sizeOf: shapes, planned } = this.model;
    this.plannedOf = (choice) =>
      choice.reduce((sum, stop, i) => sum + planned[shapes[i] * model.ladder.length + stop], 0);
    this.cells = makeCells(this.model);
    return true;
  }

  /** Decode new frontiers; returns whether the panels or their frontiers changed. */
  _takeMethods(data, anew) {
    const methods = data.fixed === null ? data.methods : data.methods.slice(0, 1);
    const old = anew ? [] : this.panels;
    const asked = { bits: this._exact(data.budget), bytes: data.budgetBytes };
    let changed = old.length !== methods.length;
    if (changed) this.find(".panels").replaceChildren();
    this.panels = methods.map((method, k) => {
      const panel = changed ? this._makePanel(k) : old[k];
      if (panel.method?.frontier.id !== method.frontier.id) {
        panel.frontier = makeFrontier(method.frontier, this.model.nominal);
        panel.answer = makeAnswer(panel.frontier);
        panel.committed = new Uint8Array(panel.answer.choice.length);
        panel.before = new Uint8Array(panel.answer.choice.length);
        changed = true;
      }
      panel.free = this._takeFree(method.free, panel.free);
      panel.method = method;
      panel.solved = method.solved && {
        ...asked,
        bound: method.solved.bound,
        choice: unpack(method.solved.choice, Uint8Array),
      };
      panel.here = method.here && { ...asked, values: method.here };
      panel.curve = method.curve && { ...unpackCurve(method.curve), color: method.color };
      return panel;
    });
    if (changed) this.scratch = makeAnswer(this.panels[0].frontier);
    return changed;
  }

  /** The method's plans without ties and server, the reference for the cost of those. */
  _takeFree(free, old) {
    if (free === null) return null;
    const curve = free.curve && unpackCurve(free.curve);
    if (old?.id === free.frontier.id) return { ...old, curve };
    const frontier = makeFrontier(free.frontier, this.model.nominal);
    return { id: free.frontier.id, frontier, answer: makeAnswer(frontier), curve };
  }

  /** Adopt Python's budget if Python has seen the last commit sent. */
  _takeBudget({ budget, budgetBytes, serial }) {
    if (this.serial === undefined) this.serial = serial;
    const typed = budgetBytes === null ? NaN : this._bitsWithin(budgetBytes);
    const bytes = Number.isNaN(typed) ? null : budgetBytes;
    const bits = bytes === null ? round(budget ?? this.model.reference.bits, 4) : typed;
    const wanted = this._clamp(bits);
    const other = wanted !== this.committed || bytes !== this.committedBytes;
    if (this.committed === null || (serial === this.serial && other)) {
      Object.assign(this, { bits: wanted, committed: wanted, bytes, committedBytes: bytes });
      this.before = null;
    }
    this.bits = this._clamp(this.bits);
    this.committed = this._clamp(this.committed);
  }

  /** Store the plans at the committed budget, which the shown plans are compared with. */
  _commitPlans(changed) {
    for (const panel of this.panels) {
      this._look(panel, this.committed, this.committedBytes);
      panel.committed.set(panel.answer.choice);
    }
    if (changed) this.before = null;
  }

  _look(panel, bits, bytes) {
    if (this.fixed) panel.answer.choice.set(this.fixed);
    else this._plan(panel.frontier, bits, bytes, panel.answer);
    if (panel.solved && this._isAt(panel.solved, bits, bytes)) {
      takeChoice(panel.frontier, panel.solved.choice, panel.answer);
      const { cost, columns } = panel.frontier;
      panel.answer.objective = total(cost, panel.answer.stops, columns);
      panel.answer.lowerBound = panel.solved.bound;
    }
  }

  /** Write a frontier's plan at a budget to the answer; false if none fits. */
  _plan(frontier, bits, bytes, answer) {
    if (bytes === null) return planAt(frontier, (this._exact(bits) * this.model.total) / 8, answer);
    const { nominal } = this.model;
    return !Number.isNaN(limitWithin(frontier, nominal, this.plannedOf, bytes, answer));
  }

  /** Whether something that Python sent was computed for this budget. */
  _isAt(asked, bits, bytes) {
    return asked.bytes === bytes && (bytes !== null || Math.abs(asked.bits - bits) < 1e-4);
  }

  /** Bits per parameter that planned bytes allow the first method's plan; NaN if none fits. */
  _bitsWithin(bytes) {
    const { nominal, total: weights } = this.model;
    const { frontier } = this.panels[0];
    return (8 * limitWithin(frontier, nominal, this.plannedOf, bytes, this.scratch)) / weights;
  }

  /** Adopt the stops allowed to each matrix, and list the pins with buttons to drop them. */
  _takePins({ pins, allowed }) {
    this.low = unpack(allowed.low, Uint8Array);
    this.high = unpack(allowed.high, Uint8Array);
    const pinned = this.low.map((low, i) => low > 0 || this.high[i] < this.model.ladder.length - 1);
    for (const panel of this.panels) panel.heatmap.pinned = pinned;
    const entries = pins.map((pin, k) => {
      const entry = make("li", "", pin.replace("=", " = "));
      const drop = make("button", "", "×");
      drop.type = "button";
      drop.setAttribute("aria-label", `Remove pin ${pin}`);
      drop.addEventListener("click", () => this.component.setTriggerValue("pins", { drop: k }));
      entry.append(drop);
      return entry;
    });
    this.find(".pins").replaceChildren(...entries);
  }

  /** A stop's exact size if the budget is its name or size to four decimals, as in Python. */
  _exact(bits) {
    const typed = round(bits, 4);
    const stop = this.model.stops.find(({ name, bits: size }) =>
      typed === Number(name) || typed === round(size, 4));
    return stop ? stop.bits : bits;
  }

  /** The nearest budget in range; a budget within rounding of the upper end is that end. */
  _clamp(bits) {
    const [low, high] = this.range;
    bits = this._exact(bits);
    if (bits >= high - 1e-4) return high;
    return bits <= low ? low : bits;
  }

  // --- user actions -----------------------------------------------------------------------------

  _listen() {
    const { slider, field } = this;
    this.released = () => this._release();
    window.addEventListener("pointerup", this.released);
    window.addEventListener("pointercancel", this.released);
    slider.addEventListener("pointerdown", () => {
      this.dragging = true;
    });
    slider.addEventListener("input", () =>
      this._show(this._snap(round(this.budgetAt(Number(slider.value)), 3))));
    slider.addEventListener("change", () => this._release());
    slider.addEventListener("keydown", (event) => this._slideByKey(event));
    slider.addEventListener("keyup", () => this._commit(this.bits, this.bytes));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this._commitTyped();
      if (event.key === "Escape") this._writeField();
    });
    // A click into the field selects its text, as the Tab key does; a second one places the caret.
    field.addEventListener("focus", () => field.select());
    field.addEventListener("pointerdown", () => {
      this.entering = this.root.getRootNode().activeElement !== field;
    });
    field.addEventListener("click", () => {
      if (this.entering) field.select();
    });
    field.addEventListener("blur", () => this._commitTyped());
    this.form = this.find(".pin");
    this.form.addEventListener("submit", (event) => this._pin(event));
    this.form.addEventListener("focusout", (event) => this._leave(event));
    for (const radio of this.root.querySelectorAll("input[type=radio]")) {
      radio.addEventListener("change", () => {
        this[radio.name] = radio.value;
        this._storeUnit();
        this._say("");
        this._arrangeAndDraw();
      });
    }
  }

  /** Show a budget without committing it, at the next frame. */
  _show(bits) {
    this.bits = this._clamp(bits);
    this.bytes = null;
    this._say("");
    this.frame ||= requestAnimationFrame(() => this._draw());
  }

  /** Snap to a stop within a few pixels; keys and the field reach the budgets between stops. */
  _snap(bits) {
    if (!this.model.onLadder) return bits; // mixed rows: the marks are not stops
    const near = this.model.stops.filter((stop) => Math.abs(this.x(stop.bits) - this.x(bits)) <= SNAP);
    const distance = (stop) => Math.abs(stop.bits - bits);
    return near.sort((a, b) => distance(a) - distance(b))[0]?.bits ?? bits;
  }

  _slideByKey(event) {
    const steps = {
      ArrowLeft: -0.01, ArrowDown: -0.01, ArrowRight: 0.01, ArrowUp: 0.01,
      PageDown: -0.1, PageUp: 0.1, Home: -Infinity, End: Infinity,
    };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this._show(round(this.bits + step, 3));
  }

  /** Release the slider: its budget takes precedence over one that Python has sent meanwhile. */
  _release() {
    const held = this.dragging;
    this.dragging = false;
    this._commit(this.bits, this.bytes);
    if (held && this.component.data !== this.data) this.receive(this.component);
  }

  /** Commit a budget: draw it, remember it, and send it to Python. */
  _commit(bits, bytes) {
    if ((bits === this.committed && bytes === this.committedBytes) || this.fixed) return;
    Object.assign(this, { before: this.committed, beforeBytes: this.committedBytes });
    Object.assign(this, { bits, committed: bits, bytes, committedBytes: bytes });
    for (const panel of this.panels) panel.before.set(panel.committed);
    this._commitPlans(false);
    this._draw();
    this._speak(this.panels.map((panel) => panel.moves.textContent).join(" "));
    this.serial = Date.now();
    this.component.setStateValue("commit", { bits, bytes, serial: this.serial });
  }

  _commitTyped() {
    const text = this.field.value.trim();
    if (text === this.written) return;
    const { bits, bytes } = this._read(text);
    const wanted = /[a-z%]$/i.test(text) ? text : `${text} ${this._unitWord()}`;
    if (Number.isNaN(bits)) {
      const now = this._inUnit(this.bits, this.bytes);
      this._say(`“${text}” is not a number; the budget is still ${now}.`);
    } else {
      this._jump(bits, wanted, "", bytes);
    }
    this._writeField();
  }

  /** Commit the nearest feasible budget, with a message if it differs from the requested one. */
  _jump(bits, wanted, room = "", bytes = null) {
    const [low, high] = this.range;
    this._say("");
    if (bytes !== null && bits >= low - 1e-4 && bits <= high) {
      this._commit(this._clamp(bits), bytes);
      this._draw();
      return;
    }
    if (bits < low - 0.005) {
      this._say(`${wanted} is less than the smallest plan${room} takes, ` +
        `${this._size(low, room)}; showing the smallest.`);
    } else if (bits > high + 0.005) {
      this._say(`${wanted} is more than the largest plan${room} needs, ` +
        `${this._size(high, room)}; showing the largest.`);
    }
    const nearest = this._clamp(round(bits, 4));
    this._commit(nearest, null);
    this._draw();
  }

  _size(bits, room) {
    return room ? formatBytes(this._sizeAt(bits, null, true)) : this._inUnit(bits);
  }

  _say(sentence) {
    setText(this.find(".message"), sentence);
  }

  _speak(text) {
    setText(this.find(".spoken"), text);
  }

  /** Show the scopes; the whole model can be counted only if the size of its rest is known. */
  _showScopes() {
    const whole = this.find("input[value=whole]");
    whole.disabled = this.data.otherBytes === null;
    whole.parentElement.title = whole.disabled ? "The size of the rest of this model isn't known." : "";
    if (whole.disabled) this.scope = "linear";
    for (const radio of this.root.querySelectorAll("input[name=scope]")) {
      radio.checked = radio.value === this.scope;
    }
  }

  _showPresets() {
    const key = JSON.stringify([this.data.presets, this.range]);
    if (key === this.presets) return;
    this.presets = key;
    const buttons = this.data.presets.map(({ label, bits, about }) => {
      const button = make("button", "", label);
      button.type = "button";
      button.title = about;
      const inside = bits >= this.range[0] - 0.005 && bits <= this.range[1] + 0.005;
      button.classList.toggle("outside", !inside);
      button.addEventListener("click", () => this._jump(bits, label, ", with room for context,"));
      return button;
    });
    const name = buttons.length ? [make("span", "", "fits in")] : [];
    this.find(".presets").replaceChildren(...name, ...buttons);
  }
}
