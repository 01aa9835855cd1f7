// The predicted perplexity over the whole slider, drawn once for a width and a set of curves.

/** A curve out of its payload. */
function unpackCurve(payload) {
  const [bits, perplexity, low, high] = ["bits", "perplexity", "low", "high"].map((name) =>
    unpack(payload[name], Float64Array)
  );
  return { bits, perplexity, low, high, full: payload.full };
}

/** A column of a curve at so many bits, straight between its points; NaN outside of them. */
function interpolate(curve, column, bits) {
  const { bits: at } = curve;
  const last = at.length - 1;
  if (last < 0 || bits < at[0] - 1e-3 || bits > at[last] + 1e-3) return NaN;
  const k = Math.min(Math.max(upperBound(at, bits), 1), last);
  if (last === 0) return column[0];
  const share = Math.min(Math.max((bits - at[k - 1]) / (at[k] - at[k - 1]), 0), 1);
  return column[k - 1] + share * (column[k] - column[k - 1]);
}

// Models that are broken at few bits would flatten what matters: the top is cut at so many times
// the lowest perplexity.
const TOP = 3;

/** Where perplexities lie between top and bottom; by their logarithm where they spread far. */
function makeScale(curves, range, height) {
  let low = Infinity;
  let high = -Infinity;
  for (const curve of curves) {
    curve.bits.forEach((bits, k) => {
      if (bits < range[0] - 1e-3 || bits > range[1] + 1e-3) return;
      low = Math.min(low, curve.low[k], curve.full);
      high = Math.max(high, curve.high[k]);
    });
  }
  const far = high / low > 5;
  high = Math.min(high, TOP * low);
  const [warp, back] = far ? [Math.log, Math.exp] : [(value) => value, (value) => value];
  const span = warp(high) - warp(low) || 1;
  const y = (value) => 5 + (height - 10) * (1 - (warp(value) - warp(low)) / span);
  return { y, values: [high, back(warp(low) + span / 2), low] };
}

/** Draw bands, curves and full precision; `x` maps bits to CSS pixels. */
function drawStrip(canvas, size, curves, scale, x, style) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(size.width * ratio);
  canvas.height = Math.round(size.height * ratio);
  canvas.style.width = `${size.width}px`;
  canvas.style.height = `${size.height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.beginPath();
  pen.rect(x.left, 0, x.width, size.height);
  pen.clip();
  for (const curve of curves) {
    const place = (column, k) => [x(curve.bits[k]), scale.y(column[k])];
    pen.beginPath();
    for (let k = 0; k < curve.bits.length; k++) pen.lineTo(...place(curve.high, k));
    for (let k = curve.bits.length - 1; k >= 0; k--) pen.lineTo(...place(curve.low, k));
    pen.fillStyle = curve.color;
    pen.globalAlpha = 0.2;
    pen.fill();
    pen.globalAlpha = 1;
    pen.beginPath();
    for (let k = 0; k < curve.bits.length; k++) pen.lineTo(...place(curve.perplexity, k));
    pen.strokeStyle = curve.color;
    pen.lineWidth = 1.8;
    pen.stroke();
    pen.beginPath();
    pen.setLineDash([3, 3]);
    pen.moveTo(x.left, scale.y(curve.full));
    pen.lineTo(x.left + x.width, scale.y(curve.full));
    pen.strokeStyle = style.text;
    pen.globalAlpha = 0.35;
    pen.lineWidth = 1;
    pen.stroke();
    pen.globalAlpha = 1;
    pen.setLineDash([]);
  }
}
