// Comparisons of a plan with uniform plans, the plan without ties, and the lower bound of the cost.

/** Whether either side of a prediction's band exceeds a tenth of it; like Python's is_wide. */
const isWide = ([value, low, high]) => Math.max(high - value, value - low) > value / 10;

/** Whether two predictions can be compared: disjoint bands, or none wide; as in Python. */
function isComparable(a, b) {
  return a[2] < b[1] || b[2] < a[1] || ![a, b].some(isWide);
}

class PlannerComparing {
  /** The largest uniform plan that is no larger; Python's headline compares with the same one. */
  _uniformWithin(bits) {
    const { stops, onLadder, reference } = this.model;
    return onLadder ? stops[uniformWithin(stops.map((stop) => stop.bits), bits)] : reference;
  }

  /** Relative perplexity above a uniform plan's; null if the predictions can't be compared. */
  _gain(predicted, { bits }) {
    const { uniform } = this;
    if (!uniform || Number.isNaN(predicted[0])) return null;
    const k = uniformWithin(uniform.bits, bits);
    const other = [uniform.perplexity[k], uniform.low[k], uniform.high[k]];
    if (!isComparable(predicted, other)) return null;
    return predicted[0] / other[0] - 1;
  }

  /** The cost of ties and server: in the method's cost or bits, and in predicted perplexity. */
  _againstFree(panel) {
    const { answer, curve, free } = panel;
    if (!free) return ["–"];
    const found = this.fixed
      ? planAt(free.frontier, Infinity, free.answer)
      : this._plan(free.frontier, this.bits, this.bytes, free.answer);
    if (!found) return ["–"];
    const { ladder, nominal, total: weights } = this.model;
    const bits = (8 * (panel.nominal - total(nominal, free.answer.choice, ladder.length))) / weights;
    const costed = !this.fixed && free.answer.objective > 0 && answer.objective >= 0;
    // Both plans are optimal only within a gap, so the restricted plan may even be the better one.
    const share = Math.max(answer.objective / free.answer.objective - 1, 0);
    const more = `${share > 0 ? "+" : ""}${formatPercent(share)}${this.oneCost ? "" : " cost"}`;
    const said = costed ? more : `${signed(bits, 3)} bits`;
    if (this.fixed || !curve || !free.curve) return [said];
    const both = [curve, free.curve].map((each) => this._predicted({ curve: each }, this.bits));
    if (!isComparable(...both)) return [said];
    return [said, `${signed(both[0][0] - both[1][0], 2)} perplexity`];
  }

  _predicted({ curve, here }, bits) {
    if (!curve) return [NaN, NaN, NaN];
    if (here && (this.fixed || this._isAt(here, bits, this.bytes))) return here.values;
    return [curve.perplexity, curve.low, curve.high].map((column) => interpolate(curve, column, bits));
  }

  /** How far a plan's cost can be above the least possible, as in Plan.to_json. */
  _gap({ answer }) {
    return answer.objective ? (answer.objective - answer.lowerBound) / Math.abs(answer.objective) : 0;
  }
}
