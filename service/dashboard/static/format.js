// Formats numbers, sizes and times.
import { locale, t } from "./i18n.js";

export const NONE = "–";
const integerFormat = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const isNumber = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const count = (value) => (isNumber(value) ? integerFormat.format(value) : NONE);

/** 1.31 B, 406 M, 118k */
export function compactNumber(value) {
  if (!isNumber(value)) return NONE;
  for (const [size, unit] of [[1e12, " T"], [1e9, " B"], [1e6, " M"], [1e4, "k"]]) {
    if (Math.abs(value) >= size) {
      const scaled = unit === "k" ? value / 1e3 : value / size;
      return `${scaled >= 100 ? scaled.toFixed(0) : scaled >= 10 ? scaled.toFixed(1) : scaled.toFixed(2)}${unit}`;
    }
  }
  return integerFormat.format(value);
}

export const loss = (value) => (isNumber(value) ? value.toFixed(3) : NONE);
export const percent = (value) => (isNumber(value) ? `${value.toFixed(value < 10 ? 1 : 0)} %` : NONE);

/** Four significant digits. */
export function fewDigits(value) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5) return compactNumber(value);
  return size < 1e-3 ? value.toExponential(2) : Number(value.toPrecision(4)).toString();
}

export function bytes(value) {
  if (!isNumber(value)) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = value;
  let place = 0;
  while (size >= 1000 && place < units.length - 1) {
    size /= 1000;
    place += 1;
  }
  return `${place && size < 100 ? size.toFixed(1) : size.toFixed(0)} ${units[place]}`;
}

/** 45 s, 3 min, 2 h 10 min, 3 d 4 h */
export function duration(seconds) {
  if (!isNumber(seconds)) return NONE;
  const all = Math.max(0, Math.round(seconds));
  if (all < 90) return t("{n} s", { n: all });
  const minutes = Math.round(all / 60);
  if (minutes < 60) return t("{n} min", { n: minutes });
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? t("{hours} h {minutes} min", { hours, minutes: minutes % 60 }) : t("{hours} h", { hours });
  return hours % 24 ? t("{days} d {hours} h", { days: Math.floor(hours / 24), hours: hours % 24 }) : t("{days} d", { days: hours / 24 });
}

export const secondsSince = (at, now = Date.now()) => (at ? (now - Date.parse(at)) / 1000 : null);
export const ago = (at) => (at ? t("{duration} ago", { duration: duration(secondsSince(at)) }) : NONE);
let dateTimeFormat = null; // A new one for each row of a table would be slow.

/** Local date and time, to the second. */
export function dateTime(at) {
  if (!at) return "";
  dateTimeFormat ??= new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "medium" });
  return dateTimeFormat.format(new Date(at));
}

/** Local time; with the date if it is not today. */
export function timeOrDateTime(at) {
  if (!at) return NONE;
  const then = new Date(at);
  const time = then.toLocaleTimeString(locale, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  const today = then.toDateString() === new Date().toDateString();
  return today ? time : `${then.toLocaleDateString(locale, { month: "short", day: "numeric" })} ${time}`;
}
