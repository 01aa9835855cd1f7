// Budgets in the chosen unit: bits per parameter, planned bytes, or per cent above a uniform plan.

const STORED = "lsq-planner-unit";

const round = (value, digits) => Math.round(value * 10 ** digits) / 10 ** digits;

class PlannerUnits extends PlannerComparing {
  _restoreUnit() {
    const [unit, scope] = (sessionStorage.getItem(STORED) ?? "bits linear").split(" ");
    this.unit = unit;
    this.scope = scope;
    for (const radio of this.root.querySelectorAll("input[type=radio]")) {
      radio.checked = this[radio.name] === radio.value;
    }
  }

  _storeUnit() {
    sessionStorage.setItem(STORED, `${this.unit} ${this.scope}`);
  }

  /** Nominal bytes of a budget, including the rest of the model if that is counted. */
  _bytes(bits, whole = this.scope === "whole") {
    return (bits * this.model.total) / 8 + (whole ? this.data.otherBytes : 0);
  }

  /** The unit in which sizes of this model are typed. */
  _sizeUnit() {
    return SIZES.find(([, size]) => this._bytes(this.range[1]) >= size) ?? ["B", 1];
  }

  _unitWord() {
    if (this.unit === "size") return this._sizeUnit()[0];
    return this.unit === "bits" ? "bits" : "%";
  }

  /** Planned bytes of a budget: as typed, else its nominal bytes plus its plan's overhead. */
  _sizeAt(bits, bytes, whole = this.scope === "whole") {
    const rest = whole ? this.data.otherBytes : 0;
    if (bytes !== null) return bytes + rest;
    const { choice } = this.scratch;
    const found = this._plan(this.panels[0].frontier, bits, null, this.scratch);
    const { ladder, nominal } = this.model;
    const overhead = found ? this.plannedOf(choice) - total(nominal, choice, ladder.length) : 0;
    return (this._exact(bits) * this.model.total) / 8 + overhead + rest;
  }

  _uniformBytes() {
    return this._bytes(this.model.reference.bits);
  }

  /** Format a budget as a number in the chosen unit. */
  _number(bits, bytes = null) {
    if (this.unit === "bits") return bits.toFixed(3);
    if (this.unit === "size") return (this._sizeAt(bits, bytes) / this._sizeUnit()[1]).toFixed(3);
    return (100 * (this._bytes(bits) / this._uniformBytes() - 1)).toFixed(2).replace("-", "−");
  }

  _inUnit(bits, bytes = null) {
    return `${this._number(bits, bytes)} ${this._unitWord()}`;
  }

  /**
   * Parse a typed budget, by default in the chosen unit: bits per parameter, NaN if it is not a
   * number, and for a size the planned bytes. A comma is a decimal separator, but for sizes one
   * before three digits groups thousands, as sizes are shown.
   */
  _read(text) {
    const match = /^([+-]?[\d.,]*\d[.,]?)\s*(bits|bpp|%|B|KiB|MiB|GiB)?$/.exec(text.replace("−", "-"));
    if (!match) return { bits: NaN, bytes: null };
    const unit = match[2] ?? this._unitWord();
    const grouped = SIZES.some(([name]) => name === unit) && /^\d{1,3}(,\d{3})+(\.\d*)?$/.test(match[1]);
    const value = Number(grouped ? match[1].replaceAll(",", "") : match[1].replace(",", "."));
    if (unit === "bits" || unit === "bpp") return { bits: value, bytes: null };
    if (unit === "%") {
      const nominal = (1 + value / 100) * this._uniformBytes() - this._bytes(0);
      return { bits: (8 * nominal) / this.model.total, bytes: null };
    }
    const rest = this.scope === "whole" ? this.data.otherBytes : 0;
    const bytes = Math.floor(value * (SIZES.find(([name]) => name === unit)?.[1] ?? 1) - rest);
    return this._bitsOfBytes(bytes);
  }

  /** Planned bytes and the bits they allow; outside the range, extrapolated bits and no bytes. */
  _bitsOfBytes(bytes) {
    const [low, high] = this.range;
    const beyond = (end) => end + (8 * (bytes - this._sizeAt(end, null, false))) / this.model.total;
    if (beyond(high) >= high) return { bits: beyond(high), bytes: null };
    const bits = this._bitsWithin(bytes);
    if (Number.isNaN(bits)) return { bits: Math.min(beyond(low), low), bytes: null };
    return { bits: Math.max(bits, low), bytes };
  }

  _writeField() {
    this.written = this._number(this.bits, this.bytes);
    this.field.value = this.written;
  }
}
