// The slider's axis and the strip of predicted perplexity along it; above a plan, its layers'
// sensitivity. All of it is redrawn only when the width or the data from Python changes.

/** Decode a curve from its payload. */
function unpackCurve(payload) {
  const [bits, perplexity, low, high] = ["bits", "perplexity", "low", "high"].map((name) =>
    unpack(payload[name], Float64Array)
  );
  return { bits, perplexity, low, high, full: payload.full };
}

/** Interpolate a column of a curve linearly at the given bits; NaN outside its range. */
function interpolate(curve, column, bits) {
  const { bits: at } = curve;
  const last = at.length - 1;
  if (last < 0 || bits < at[0] - 1e-3 || bits > at[last] + 1e-3) return NaN;
  const k = Math.min(Math.max(upperBound(at, bits), 1), last);
  if (last === 0) return column[0];
  const share = Math.min(Math.max((bits - at[k - 1]) / (at[k] - at[k - 1]), 0), 1);
  return column[k - 1] + share * (column[k] - column[k - 1]);
}

/** The index of the largest uniform plan within a budget in bits; 0 if none is. */
function uniformWithin(bits, budget) {
  let found = 0;
  for (let k = 0; k < bits.length; k++) if (bits[k] <= budget + 1e-6) found = k;
  return found;
}

// --- the axis ---------------------------------------------------------------------------------------

const FOLD_SHARES = [0.84, 0.9];

/** The gap without configurations below 8 bits, which is shortened on the track. */
function foldOf(stops) {
  const below = Math.max(...stops.map((stop) => stop.bits).filter((bits) => bits < 8));
  return [Math.ceil(10 * below) / 10, 8.05];
}

/** Breakpoints that map budgets to shares of the track; the gap is folded if the range spans it. */
function makeTrack([low, high], fold) {
  const folded = fold !== null && low < fold[0] - 0.5 && high > fold[1] + 0.05 ? fold : null;
  return folded
    ? { bits: [low, ...folded, high], shares: [0, ...FOLD_SHARES, 1], folded }
    : { bits: [low, high], shares: [0, 1], folded };
}

/** Map a value piecewise linearly from the points `from` to the points `to`; both ascend. */
function translate(from, to, value) {
  let k = 1;
  while (k < from.length - 1 && value > from[k]) k++;
  return to[k - 1] + ((value - from[k - 1]) / (from[k] - from[k - 1] || 1)) * (to[k] - to[k - 1]);
}

// --- predicted perplexity ---------------------------------------------------------------------------

// Excess over full precision, as a share of it: above TOP a model is unusable, and below BOTTOM the
// difference is imperceptible.
const TOP = 3;
const BOTTOM = 0.003;
const TICKS = [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3];
const TICK_GAP = 15; // pixels

/** A vertical scale for perplexities, logarithmic in their excess over full precision. */
function makeScale(curves, range, height) {
  let [low, high] = [Infinity, 0];
  for (const curve of curves) {
    curve.bits.forEach((bits, k) => {
      if (bits < range[0] - 1e-3 || bits > range[1] + 1e-3) return;
      const excess = curve.perplexity[k] / curve.full - 1;
      if (excess > 0) low = Math.min(low, excess);
      high = Math.max(high, excess);
    });
  }
  const top = Math.max(Math.min(high, TOP), BOTTOM * 10);
  const bottom = Math.min(Math.max(low, BOTTOM), top / 10);
  const { full } = curves[0];
  const y = (value) => {
    const share = Math.log(Math.max(value / full - 1, bottom) / bottom) / Math.log(top / bottom);
    return 6 + (height - 12) * (1 - share);
  };
  const values = [];
  for (const excess of [bottom, ...TICKS, top]) {
    const value = full * (1 + excess);
    const inside = excess >= bottom && excess <= top;
    if (inside && values.every((other) => Math.abs(y(other) - y(value)) >= TICK_GAP)) values.push(value);
  }
  return { y, values };
}

/** Fit a canvas to a size in CSS pixels and return its context. */
function penOf(canvas, size) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(size.width * ratio);
  canvas.height = Math.round(size.height * ratio);
  canvas.style.width = `${size.width}px`;
  canvas.style.height = `${size.height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return pen;
}

/** Draw bands and curves over the uniform plans' steps, shading the gain; `x` maps bits to px. */
function drawStrip(canvas, size, curves, uniform, scale, x, style) {
  const pen = penOf(canvas, size);
  pen.beginPath();
  pen.rect(x.left, 0, x.width, size.height);
  pen.clip();
  if (uniform) drawUniform(pen, uniform, scale, x, style);
  for (const curve of curves) {
    const place = (column, k) => [x(curve.bits[k]), scale.y(column[k])];
    pen.beginPath();
    for (let k = 0; k < curve.bits.length; k++) pen.lineTo(...place(curve.high, k));
    for (let k = curve.bits.length - 1; k >= 0; k--) pen.lineTo(...place(curve.low, k));
    pen.fillStyle = curve.color;
    pen.globalAlpha = 0.2;
    pen.fill();
    if (uniform && curve === curves[0]) shadeGain(pen, curve, uniform, scale, x);
    pen.globalAlpha = 1;
    pen.beginPath();
    for (let k = 0; k < curve.bits.length; k++) pen.lineTo(...place(curve.perplexity, k));
    pen.strokeStyle = curve.color;
    pen.lineWidth = 1.8;
    pen.stroke();
  }
}

/** Draw the steps of the uniform plans: at every budget the largest one within it. */
function drawUniform(pen, uniform, scale, x, style) {
  pen.beginPath();
  uniform.bits.forEach((bits, k) => {
    if (k) pen.lineTo(x(bits), scale.y(uniform.perplexity[k - 1]));
    pen.lineTo(x(bits), scale.y(uniform.perplexity[k]));
  });
  pen.lineTo(x.left + x.width, scale.y(uniform.perplexity.at(-1)));
  pen.strokeStyle = style.text;
  pen.globalAlpha = 0.5;
  pen.lineWidth = 1.3;
  pen.stroke();
}

/** Shade the area between the uniform plans' steps and a curve below them. */
function shadeGain(pen, curve, uniform, scale, x) {
  pen.globalAlpha = 0.12;
  for (let k = 1; k < curve.bits.length; k++) {
    const step = uniform.perplexity[uniformWithin(uniform.bits, curve.bits[k - 1])];
    if (curve.perplexity[k] >= step && curve.perplexity[k - 1] >= step) continue;
    const [left, right] = [x(curve.bits[k - 1]), x(curve.bits[k])];
    pen.beginPath();
    pen.moveTo(left, scale.y(step));
    pen.lineTo(right, scale.y(step));
    pen.lineTo(right, Math.max(scale.y(curve.perplexity[k]), scale.y(step)));
    pen.lineTo(left, Math.max(scale.y(curve.perplexity[k - 1]), scale.y(step)));
    pen.fill();
  }
}

// --- sensitivity above the plan ---------------------------------------------------------------------

/** Draw a bar for each layer with a score, its height logarithmic in the score. */
function drawScores(canvas, size, scores, color) {
  const pen = penOf(canvas, size);
  const known = Array.from(scores).filter((score) => score > 0);
  if (!known.length) return;
  const [low, high] = [Math.min(...known), Math.max(...known)].map(Math.log);
  const pitch = size.width / scores.length;
  const gap = pitch < 9 ? 1 : 2;
  pen.fillStyle = color;
  scores.forEach((score, k) => {
    if (!(score > 0)) return;
    const share = high > low ? (Math.log(score) - low) / (high - low) : 1;
    const height = 3 + (size.height - 3) * share; // the smallest bar remains visible
    pen.globalAlpha = 0.35 + 0.65 * share;
    pen.fillRect(k * pitch + gap / 2, size.height - height, pitch - gap, height);
  });
}
