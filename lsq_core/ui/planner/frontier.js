// The plans for every budget: lsq_core/planning/frontier.py and greedy.py, ported to the browser.
//
// Every step is the first or the best one, ties going to the first matrix and then the lowest stop,
// and every sum runs from first to last, as in Python; so both find bit-identical plans. Tables are
// (n, columns) in one row-major Float64Array, one column per option; a choice is a Uint8Array of n
// stops.
// This file does not depend on the page, and looking up a plan allocates nothing.

const TOLERANCE = 1e-9;
// As in lsq_core/planning/limit.py.
const SPENT = 0.999;
const HALVINGS = 12;

/** Decode a base64 text to a typed array of the given kind. */
function unpack(text, Kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}

/** Nominal bytes of each matrix at each stop: numel · bits / 8. */
function nominalTable(numel, bits) {
  const columns = bits.length;
  const table = new Float64Array(numel.length * columns);
  numel.forEach((weights, i) => {
    for (let j = 0; j < columns; j++) table[i * columns + j] = (weights * bits[j]) / 8;
  });
  return table;
}

/** Nominal bytes of each matrix at each option, if they depend on its shape. */
function nominalOfShapes(shapes, sizeOf) {
  const columns = shapes.length / countOf(sizeOf);
  const table = new Float64Array(sizeOf.length * columns);
  sizeOf.forEach((shape, i) => {
    table.set(shapes.subarray(shape * columns, (shape + 1) * columns), i * columns);
  });
  return table;
}

/** The number of things that are numbered from 0 without gaps. */
function countOf(numbers) {
  return 1 + numbers.reduce((most, number) => Math.max(most, number), 0);
}

/** Sum a table over the matrices of each item; the sums are exact in any order. */
function sumItems(table, items, columns) {
  const summed = new Float64Array(countOf(items) * columns);
  items.forEach((item, i) => {
    for (let j = 0; j < columns; j++) summed[item * columns + j] += table[i * columns + j];
  });
  return summed;
}

/** The item that a matrix belongs to; without ties, each matrix is an item. */
function itemOf({ items }, i) {
  return items === null ? i : items[i];
}

/**
 * Make a frontier from its payload {columns, costs, losses, lowerBounds, starts, counts, matrices,
 * stops, wide, items} and the nominal table of the matrices: segments with their moves in order,
 * and scratch buffers. If matrices are tied, everything is by item, including the nominal table.
 */
function makeFrontier(payload, ofMatrices) {
  const items = payload.items === null ? null : unpack(payload.items, Int32Array);
  const { columns } = payload;
  const nominal = items === null ? ofMatrices : sumItems(ofMatrices, items, columns);
  const table = { values: nominal, columns };
  const n = nominal.length / columns;
  const starts = unpack(payload.starts, Uint8Array);
  const matrices = unpack(payload.matrices, payload.wide ? Int32Array : Int16Array);
  const stops = unpack(payload.stops, Uint8Array);
  const segments = [];
  let begin = 0;
  payload.counts.forEach((count, k) => {
    const end = begin + count;
    const start = starts.slice(k * n, (k + 1) * n);
    segments.push(makeSegment(start, matrices.slice(begin, end), stops.slice(begin, end), table));
    begin = end;
  });
  return {
    n,
    columns,
    items,
    nominal,
    cost: payload.costs === null ? null : unpack(payload.costs, Float64Array),
    losses: payload.losses === null ? null : unpack(payload.losses, Float64Array),
    lowerBounds: payload.losses === null ? null : unpack(payload.lowerBounds, Float64Array),
    segments,
    startBytes: Float64Array.from(segments, (segment) => segment.startBytes),
    trial: new Uint8Array(n),
    marked: new Uint8Array(n),
  };
}

/** A start and its moves: stops left and reached, bytes after each move, and bytes added. */
function makeSegment(start, matrix, reached, { values: nominal, columns }) {
  const now = start.slice();
  const left = new Uint8Array(matrix.length);
  const after = new Float64Array(matrix.length);
  const size = new Float64Array(matrix.length);
  const startBytes = total(nominal, start, columns);
  let bytes = startBytes;
  for (let k = 0; k < matrix.length; k++) {
    const row = matrix[k] * columns;
    left[k] = now[matrix[k]];
    after[k] = bytes + (nominal[row + reached[k]] - nominal[row + left[k]]);
    size[k] = after[k] - bytes;
    bytes = after[k];
    now[matrix[k]] = reached[k];
  }
  return { start, startBytes, matrix, left, reached, after, size };
}

/** The output buffer of planAt: stops by item, the choice by matrix, objective and bound. */
function makeAnswer(frontier) {
  const stops = new Uint8Array(frontier.n);
  return {
    stops,
    choice: frontier.items === null ? stops : new Uint8Array(frontier.items.length),
    segment: frontier.segments[0],
    taken: 0,
    objective: NaN,
    lowerBound: NaN,
    price: NaN,
  };
}

/** Write the plan within a budget in nominal bytes to the answer; false if none fits. */
function planAt(frontier, budget, answer) {
  if (!planOfItems(frontier, budget, answer)) return false;
  const { stops, choice } = answer;
  if (frontier.items !== null) frontier.items.forEach((item, i) => (choice[i] = stops[item]));
  return true;
}

/** Set an answer to a choice by matrix, as sent by Python, and derive its stops by item. */
function takeChoice(frontier, choice, answer) {
  answer.choice.set(choice);
  if (frontier.items !== null) frontier.items.forEach((item, i) => (answer.stops[item] = choice[i]));
}

/**
 * The nominal bytes that a budget in planned bytes leaves a plan, which is written to the answer:
 * the budget less the overhead of the last plan found, until one fits, and more if much is left.
 * NaN if none fits.
 * Ported from lsq_core/planning/limit.py; `plannedOf` returns the planned bytes of a choice.
 */
function limitWithin(frontier, ofMatrices, plannedOf, budget, answer) {
  const smallest = frontier.startBytes[0];
  planAt(frontier, smallest, answer);
  if (plannedOf(answer.choice) > budget) return NaN;
  let [limit, tooLarge, size] = [budget, NaN, NaN];
  for (;;) {
    planAt(frontier, limit, answer);
    size = plannedOf(answer.choice);
    if (size <= budget) break;
    tooLarge = limit;
    // Never try the same plan again: relative to gigabytes, a few bytes are within the tolerance.
    const nominal = total(ofMatrices, answer.choice, frontier.columns);
    limit = Math.max(Math.min(nominal - (size - budget), nominal * (1 - 2 * TOLERANCE)), smallest);
  }
  for (let k = 0; k < HALVINGS && tooLarge > limit && size < SPENT * budget; k++) {
    const middle = (limit + tooLarge) / 2;
    planAt(frontier, middle, answer);
    const found = plannedOf(answer.choice);
    if (found <= budget) [limit, size] = [middle, found];
    else tooLarge = middle;
  }
  planAt(frontier, limit, answer);
  return limit;
}

function planOfItems(frontier, budget, answer) {
  const limit = budget * (1 + TOLERANCE);
  const index = upperBound(frontier.startBytes, limit) - 1;
  if (index < 0) return false;
  const segment = frontier.segments[index];
  const taken = upperBound(segment.after, limit);
  answer.segment = segment;
  answer.taken = taken;
  stopsAfter(segment, taken, answer.stops);
  if (frontier.losses !== null) {
    answer.objective = frontier.losses[index];
    answer.lowerBound = frontier.lowerBounds[index];
  }
  if (frontier.cost === null) return true;
  const price = nextMovePrice(frontier, segment, taken);
  const left = Math.max(budget - bytesAfter(segment, taken), 0);
  let bound = total(frontier.cost, answer.stops, frontier.columns);
  if (taken < segment.matrix.length) bound -= price * left;
  answer.price = price;
  answer.lowerBound = bound - 1e-12 * Math.abs(bound);
  if (Number.isFinite(budget)) spendRemainder(frontier, segment, taken, limit, answer.stops);
  answer.objective = total(frontier.cost, answer.stops, frontier.columns);
  return true;
}

/** Spend the rest in the better of two ways: fill up, or overshoot by one move and repair. */
function spendRemainder(frontier, segment, taken, limit, choice) {
  applyFittingMoves(frontier, segment, taken, choice, limit - bytesAfter(segment, taken));
  fill(frontier, choice, limit);
  if (taken === segment.matrix.length) return;
  const back = frontier.trial;
  stopsAfter(segment, taken + 1, back);
  undoMoves(frontier, segment, taken + 1, back, limit - bytesAfter(segment, taken + 1));
  if (!repair(frontier, back, limit)) return;
  fill(frontier, back, limit);
  const { cost, columns } = frontier;
  if (total(cost, back, columns) < total(cost, choice, columns)) choice.set(back);
}

/** Take each later move that fits, but none of a matrix after one that does not. */
function applyFittingMoves(frontier, segment, taken, choice, room) {
  const { matrix, reached, size } = segment;
  const missed = frontier.marked.fill(0);
  for (let k = taken; k < matrix.length; k++) {
    if (missed[matrix[k]]) continue;
    if (size[k] <= room) {
      choice[matrix[k]] = reached[k];
      room -= size[k];
    } else {
      missed[matrix[k]] = 1;
    }
  }
}

/** Undo moves before the last one taken, latest first, while over the limit. */
function undoMoves(frontier, segment, taken, choice, room) {
  const { matrix, left, size } = segment;
  const kept = frontier.marked.fill(0);
  kept[matrix[taken - 1]] = 1;
  for (let k = taken - 2; k >= 0 && room < 0; k--) {
    if (kept[matrix[k]]) continue;
    if (size[k] <= -room) {
      choice[matrix[k]] = left[k];
      room += size[k];
    } else {
      kept[matrix[k]] = 1;
    }
  }
}

/** Spend the remaining bytes, repeatedly on the fitting change that saves the most cost. */
function fill(frontier, choice, limit) {
  const { n, columns, nominal, cost } = frontier;
  let left = limit - total(nominal, choice, columns);
  for (;;) {
    let best = 0;
    let at = -1;
    for (let i = 0, row = 0; i < n; i++, row += columns) {
      const here = row + choice[i];
      // Bytes rise from stop to stop, so the first that does not fit ends the row.
      for (let j = here + 1; j < row + columns && nominal[j] - nominal[here] <= left; j++) {
        const saved = cost[here] - cost[j];
        if (saved > best) {
          best = saved;
          at = j;
        }
      }
    }
    if (at < 0) return;
    const i = Math.floor(at / columns);
    left -= nominal[at] - nominal[i * columns + choice[i]];
    choice[i] = at - i * columns;
  }
}

/** Bring a choice within the limit by the cheapest single change; false if none suffices. */
function repair(frontier, choice, limit) {
  const { n, columns, nominal, cost } = frontier;
  const over = total(nominal, choice, columns) - limit;
  if (over <= 0) return true;
  let best = Infinity;
  let at = -1;
  for (let i = 0, row = 0; i < n; i++, row += columns) {
    const here = row + choice[i];
    for (let j = row; j < here && nominal[here] - nominal[j] >= over; j++) {
      const lost = cost[j] - cost[here];
      if (lost < best) {
        best = lost;
        at = j;
      }
    }
  }
  if (at < 0) return false;
  choice[Math.floor(at / columns)] = at % columns;
  return true;
}

/** The sum of a table's entries at a choice, added from first to last. */
function total(table, choice, columns) {
  let sum = 0;
  for (let i = 0, row = 0; i < choice.length; i++, row += columns) sum += table[row + choice[i]];
  return sum;
}

/** Cost saved per byte by the first move not taken; 0 if all are taken. */
function nextMovePrice(frontier, segment, taken) {
  if (taken === segment.matrix.length) return 0;
  const row = segment.matrix[taken] * frontier.columns;
  const worth =
    frontier.cost[row + segment.left[taken]] - frontier.cost[row + segment.reached[taken]];
  return worth / segment.size[taken];
}

/** Nominal bytes of the plan after the first `count` moves. */
function bytesAfter(segment, count) {
  return count ? segment.after[count - 1] : segment.startBytes;
}

/** Write the stops after the first `count` moves to a choice; later moves of a matrix win. */
function stopsAfter(segment, count, choice) {
  choice.set(segment.start);
  for (let k = 0; k < count; k++) choice[segment.matrix[k]] = segment.reached[k];
}

/** The number of sorted values that are at most a limit. */
function upperBound(sorted, limit) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= limit) low = middle + 1;
    else high = middle;
  }
  return low;
}
