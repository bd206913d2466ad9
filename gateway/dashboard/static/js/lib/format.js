// Figures as people read them. What is missing is a dash, never a zero.
const NONE = "–";
const missing = (value) => value === null || value === undefined || Number.isNaN(value);

/** 1234567 → "1.23 M" */
export function number(value, digits = 3) {
  if (missing(value)) return NONE;
  if (!Number.isFinite(value)) return "∞";
  const size = Math.abs(value);
  for (const [unit, from] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (size >= from) return `${precise(value / (unit === "k" ? 1e3 : from), digits)} ${unit}`;
  }
  return Number.isInteger(value) ? value.toLocaleString("en-US") : precise(value, digits);
}

const precise = (value, digits) => Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumSignificantDigits: digits });

/** 0.1234 → "12.3 %" */
export const percent = (value, digits = 1) => missing(value) ? NONE : `${(value * 100).toFixed(digits)} %`;

/** Seconds → "12 ms", "1.23 s", "4 min" */
export function seconds(value) {
  if (missing(value)) return NONE;
  const size = Math.abs(value);
  if (size < 1) return `${precise(value * 1000, 3)} ms`;
  if (size < 120) return `${precise(value, 3)} s`;
  if (size < 7200) return `${precise(value / 60, 2)} min`;
  if (size < 172800) return `${precise(value / 3600, 2)} h`;
  return `${precise(value / 86400, 2)} d`;
}

export const millis = (value) => missing(value) ? NONE : seconds(value / 1000);

export function bytes(value) {
  if (missing(value)) return NONE;
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (Math.abs(value) >= size) return `${precise(value / size, 3)} ${unit}`;
  }
  return `${value} B`;
}

/** Dollars: cents from a dollar on, more places below. */
export function dollars(value) {
  if (missing(value)) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "$0";
  if (size >= 100000) return `$${number(value)}`;
  if (size >= 1) return `$${value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
  return `$${Number(value.toPrecision(2)).toLocaleString("en-US", { maximumFractionDigits: 8 })}`;
}

/** Unix seconds → "5 s ago" */
export function ago(unix_s, now_s = Date.now() / 1000) {
  if (missing(unix_s)) return NONE;
  const passed = now_s - unix_s;
  if (passed < 0) return `in ${seconds(Math.ceil(-passed))}`;
  return passed < 1 ? "now" : `${seconds(Math.floor(passed))} ago`;
}

/** Unix seconds → the local date and time. */
export const time = (unix_s) => missing(unix_s) ? NONE : new Date(unix_s * 1000).toLocaleString("sv-SE");
