// A plan as a heatmap: layers from left to right, module types from top to bottom.
//
// Only cells that have changed are repainted.

// The appearance of a cell is one number: its stop in the lowest byte, and flags above it.
const EMPTY = 255;
const UP = 1 << 8;
const DOWN = 1 << 9;
const DIFFERS = 1 << 10;
const CURSOR = 1 << 11;
const PINNED = 1 << 12;

/** The matrices of each cell: one, or all experts of a layer. */
function makeCells(model) {
  const layers = [...new Set(model.layers)].sort((a, b) => a - b);
  const column = new Map(layers.map((layer, k) => [layer, k]));
  const members = Array.from({ length: model.types.length * layers.length }, () => []);
  model.layers.forEach((layer, i) => {
    members[model.typeOf[i] * layers.length + column.get(layer)].push(i);
  });
  return { layers, columns: layers.length, rows: model.types.length, members };
}

/** The stop that a cell shows: the most common one of its matrices, in a tie the lowest. */
function shownStop(members, choice, counts) {
  if (members.length === 1) return choice[members[0]];
  if (members.length === 0) return EMPTY;
  counts.fill(0);
  for (const i of members) counts[choice[i]]++;
  let best = 0;
  for (let j = 1; j < counts.length; j++) if (counts[j] > counts[best]) best = j;
  return best;
}

/** A canvas of cells; `arrange` sets its size, `paint` draws a plan. */
class Heatmap {
  constructor(canvas, cells, ladder) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.cells = cells;
    this.ladder = ladder.map((stop) => ({ ...stop, ink: contrastColor(stop.color) }));
    this.drawn = new Int32Array(cells.members.length);
    this.counts = new Int32Array(ladder.length);
    this.pinned = null; // whether each matrix is pinned, set by the planner
  }

  /** Fit a width and row height in CSS pixels; all cells will be repainted. */
  arrange(width, rowHeight, style) {
    const ratio = window.devicePixelRatio || 1;
    const { columns, rows } = this.cells;
    Object.assign(this, { ratio, width, rowHeight, style });
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(rows * rowHeight * ratio);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${rows * rowHeight}px`;
    this.pitch = this.canvas.width / columns;
    // Narrow cells have a gap on one side only, and bars instead of outlines.
    this.narrow = width / columns < 9;
    this.gap = Math.max(1, Math.round(ratio));
    this.#chooseText();
    this.drawn.fill(-1);
  }

  /** Choose the cells' text: the configuration's name if it fits, else its stop, else none. */
  #chooseText() {
    this.text = null;
    const room = this.narrow ? 0 : this.pitch - 2 * this.gap;
    for (const [key, size] of [["name", 11.5], ["stop", 11.5], ["stop", 10]]) {
      this.pen.font = `${size * this.ratio}px ${this.style.font}`;
      const widest = Math.max(...this.ladder.map((stop) => this.pen.measureText(stop[key]).width));
      if (widest + 5 * this.ratio <= room) {
        this.text = key;
        this.font = this.pen.font;
        return;
      }
    }
  }

  /** Draw a choice, marking differences from the committed plan and from the other method. */
  paint(choice, committed, other, cursor) {
    const { members } = this.cells;
    for (let k = 0; k < members.length; k++) {
      const looks = this.#looks(members[k], choice, committed, other) | (k === cursor ? CURSOR : 0);
      if (looks === this.drawn[k]) continue;
      this.drawn[k] = looks;
      this.#paintCell(k, looks);
    }
  }

  #looks(members, choice, committed, other) {
    let looks = shownStop(members, choice, this.counts);
    let moved = 0;
    for (const i of members) {
      if (committed !== null && choice[i] !== committed[i]) {
        moved += choice[i] - committed[i];
        looks |= DOWN;
      }
      if (other !== null && choice[i] !== other[i]) looks |= DIFFERS;
      if (this.pinned[i]) looks |= PINNED;
    }
    if (looks & DOWN && moved >= 0) looks ^= DOWN | UP;
    return looks;
  }

  #paintCell(k, looks) {
    const { pen, ratio, gap, narrow, style } = this;
    const row = Math.floor(k / this.cells.columns);
    const column = k % this.cells.columns;
    const left = Math.round(column * this.pitch);
    const right = Math.round((column + 1) * this.pitch);
    const top = Math.round(row * this.rowHeight * ratio);
    const bottom = Math.round((row + 1) * this.rowHeight * ratio);
    pen.clearRect(left, top, right - left, bottom - top);
    const stop = looks & 255;
    if (stop === EMPTY) return;
    const width = right - left - (narrow ? gap : 2 * gap);
    const box = [narrow ? left : left + gap, top + gap, width, bottom - top - 2 * gap];
    const moved = looks & (UP | DOWN);
    if (moved && !narrow) {
      pen.fillStyle = style.text;
      pen.fillRect(left, top, right - left, bottom - top);
    }
    pen.fillStyle = this.ladder[stop].color;
    pen.fillRect(...box);
    if (moved) this.#notch(box, looks & UP);
    if (this.text) {
      pen.fillStyle = this.ladder[stop].ink;
      pen.font = this.font;
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      pen.fillText(this.ladder[stop][this.text], (left + right) / 2, (top + bottom) / 2 + ratio / 2);
    }
    if (looks & PINNED) this.#corner(box, this.ladder[stop].ink);
    if (looks & DIFFERS) this.#dot(box, this.ladder[stop].ink, looks & UP);
    if (looks & CURSOR) {
      pen.strokeStyle = style.primary;
      pen.lineWidth = 3 * ratio;
      pen.strokeRect(left + 1.5 * ratio, top + 1.5 * ratio, right - left - 3 * ratio,
        bottom - top - 3 * ratio);
    }
  }

  /** Mark a changed cell by a bar: at the top for more bits, at the bottom for fewer. */
  #notch([x, y, width, height], up) {
    const thick = this.#thickness();
    this.pen.fillStyle = this.style.text;
    this.pen.fillRect(x, up ? y : y + height - thick, width, thick);
  }

  #thickness() {
    return Math.round((this.narrow ? 4 : 2) * this.ratio);
  }

  /** Mark the upper right corner: the other method's configuration differs. */
  #dot([x, y, width], ink, up) {
    const { pen, ratio } = this;
    const radius = Math.min(2.2 * ratio, width / 3);
    const right = x + width - radius - (this.narrow ? 0 : 1.5 * ratio);
    const top = y + radius + 2 * ratio + (up ? this.#thickness() : 0);
    pen.beginPath();
    pen.arc(right, top, radius, 0, 2 * Math.PI);
    pen.fillStyle = ink;
    pen.fill();
  }

  /** Fold the lower left corner of a pinned cell. */
  #corner([x, y, width, height], ink) {
    const { pen, ratio } = this;
    const side = Math.min(7 * ratio, width);
    pen.beginPath();
    pen.moveTo(x, y + height - side);
    pen.lineTo(x, y + height);
    pen.lineTo(x + side, y + height);
    pen.fillStyle = ink;
    pen.fill();
  }

  /** The cell at a position in CSS pixels, or -1. */
  cellAt(x, y) {
    const { columns, rows, members } = this.cells;
    const column = Math.floor((x / this.width) * columns);
    const row = Math.floor(y / this.rowHeight);
    if (column < 0 || column >= columns || row < 0 || row >= rows) return -1;
    const k = row * columns + column;
    return members[k].length ? k : -1;
  }
}

/** Dark or white, whichever has more contrast on a colour. */
function contrastColor(color) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const part = parseInt(color.slice(at, at + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return (light + 0.05) / 0.06 > 1.05 / (light + 0.05) ? "#10161d" : "#ffffff";
}
