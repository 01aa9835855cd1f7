// Numbers formatted for display, as on the pages written by Python.

const MIB = 2 ** 20;
const SIZES = [["GiB", 2 ** 30], ["MiB", MIB], ["KiB", 1024]];

/** Like toFixed, but exact ties go to the even digit, as in Python: 15.125 is "15.12". */
function toFixedEven(value, digits) {
  const text = value.toFixed(digits);
  const isTie = Math.abs(value * 2 ** (digits + 1)) % 2 === 1;  // ties: odd / 2^(digits + 1)
  if (!isTie || text.at(-1) % 2 === 0) return text;
  return (value - Math.sign(value) * 10 ** -digits / 2).toFixed(digits);
}

/** 9437184 as "9.00 MiB", like lsq_core.units.format_bytes. */
function formatBytes(count) {
  const unit = SIZES.find(([, size]) => Math.abs(count) >= size);
  return unit ? `${toFixedEven(count / unit[1], 2)} ${unit[0]}` : `${toFixedEven(count, 0)} B`;
}

/** 636459991 as "607 MiB": three digits, for tight spaces. */
function shortBytes(count) {
  const [name, size] = SIZES.find(([, size]) => count >= 0.9995 * size) ?? ["B", 1];
  return `${formatNumber(count / size, 3)} ${name}`;
}

/** 0.0412 as "+4.1 %", like lsq_core.ui.words.signed_percent. */
function signedPercent(share) {
  const text = toFixedEven(100 * Math.abs(share), 1);
  return `${text === "0.0" ? "" : share < 0 ? "−" : "+"}${text} %`;
}

/** 0.314 as "+0.31", with the given decimals; a value that rounds to zero has no sign. */
function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  return `${Number(text) === 0 ? "" : value < 0 ? "−" : "+"}${text}`;
}

/** 0.000123 as "0.012 %", with two significant digits. */
function formatPercent(share) {
  if (!(share > 0)) return "0 %";
  const value = 100 * share;
  return `${formatNumber(value, 2)} %`;
}

/** Format with the given significant digits, without an exponent if that stays short. */
function formatNumber(value, digits) {
  if (value === 0 || !Number.isFinite(value)) return String(value);
  value = Number(value.toPrecision(digits));
  const size = Math.floor(Math.log10(Math.abs(value)));
  if (size < -5 || size > 6) {
    return value.toExponential(digits - 1).replace("e+", "e").replace("-", "−");
  }
  const text = value.toFixed(Math.max(0, digits - 1 - size));
  const [whole, part] = text.replace("-", "−").split(".");
  const grouped = size > 2 ? whole.replace(/\B(?=(\d{3})+$)/g, ",") : whole;
  return part ? `${grouped}.${part}` : grouped;
}

/** A count with its noun, singular or plural. */
function counted(count, thing, things) {
  return `${count.toLocaleString("en")} ${count === 1 ? thing : things}`;
}
