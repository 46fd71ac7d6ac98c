// Converts rows of metrics to the data of charts. Pure.
import { t, tn } from "./i18n.js";

export const LIGHT_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#1F2933"];
export const DARK_COLORS = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442"];
export const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
export const AXES = { step: t("Step"), tokens: t("Tokens"), active: t("Active time (h)"), clock: t("Wall clock") };
/** Choices of smoothing, [value in the URL, label]: a number is the width of a centred kernel in steps, `mean-50` a running mean with a half-life of 50 steps. */
export const SMOOTHINGS = [
  ["auto", t("automatic")], ["0", t("none")], ...[10, 50, 200, 1000].map((steps) => [String(steps), t("centred, {n} steps", { n: steps })]),
  ...[10, 50, 200, 1000].map((steps) => [`mean-${steps}`, t("running mean, {n} steps", { n: steps })]),
];
export const DEFAULT_SMOOTHING = "auto";

/** The query parameters of the metrics route for a choice of smoothing. */
export const smoothingQuery = (smoothing) => (smoothing.startsWith("mean-") ? { ema_half_life: smoothing.slice(5) } : { smooth_width: smoothing });

/** The smoothed loss of a row, whichever was requested. */
export const smoothedLoss = (row) => (row.loss_smooth === undefined ? row.loss_ema : row.loss_smooth) ?? null;

/** "smoothed over 50 steps". `width`: `smooth_width` of the response. */
export function smoothingText(smoothing, width) {
  if (smoothing.startsWith("mean-")) return t("running mean, half-life {n} steps: it lags", { n: smoothing.slice(5) });
  return width ? tn(width, "smoothed over {n} step", "smoothed over {n} steps", { n: width.toLocaleString("en-US") }) : "";
}

const MIN_PAUSE_MS = 60_000;
const FLAT_FRACTION = 0.02;

/** Returns the x value of every row. Active time excludes the time between attempts. */
export function xValues(rows, axis, attempts) {
  if (axis === "tokens") return rows.map((row) => row.tokens ?? null);
  if (axis === "clock") return rows.map((row) => (row.at ? localTimestamp(row.at) : null));
  if (axis === "step") return rows.map((row) => row.step);
  const spans = attempts.map((attempt) => [Date.parse(attempt.started_at ?? attempt.created_at), Date.parse(attempt.ended_at ?? new Date())]);
  return rows.map((row) => (row.at ? activeHours(Date.parse(row.at), spans) : null));
}

/** Converts a zoom to a slightly wider range of steps, [null, null] for the whole run. `whole`: rows of the whole run, or undefined. */
export function stepRange(zoom, axis, whole, attempts) {
  if (!zoom) return [null, null];
  let ends = zoom;
  if (axis !== "step") {
    const xs = xValues(whole ?? [], axis, attempts);
    const inside = (whole ?? []).filter((_, i) => toNumber(xs[i]) >= toNumber(zoom[0]) && toNumber(xs[i]) <= toNumber(zoom[1]));
    if (!inside.length) return [null, null];
    ends = [inside[0].first_step, inside.at(-1).step];
  }
  const edge = Math.max(1, (ends[1] - ends[0]) * 0.05);
  return [Math.max(0, Math.floor(ends[0] - edge)), Math.max(1, Math.ceil(ends[1] + edge))];
}

/** Local time as text: plotly has no time zones. */
export function localTimestamp(at) {
  const then = new Date(at);
  return new Date(then - then.getTimezoneOffset() * 60_000).toISOString().replace("T", " ").replace("Z", "");
}

/** Converts x to a number; a date becomes ms. */
export const toNumber = (x) => (typeof x === "string" ? Date.parse(x.replace(" ", "T")) : x);

function activeHours(at, spans) {
  return spans.reduce((sum, [from, to]) => sum + Math.max(0, Math.min(at, to) - from), 0) / 3_600_000;
}

/** Returns the indexes of rows that follow a pause, where the line is interrupted. Only wall-clock time shows pauses. */
export function rowsAfterPause(rows, axis, attempts) {
  if (axis !== "clock") return new Set();
  const begun = new Map(attempts.map((attempt) => [attempt.number, Date.parse(attempt.started_at ?? attempt.created_at)]));
  return new Set(rows.flatMap((row, i) => {
    const before = rows[i - 1];
    const changed = before && row.attempt !== before.attempt;
    return changed && begun.get(row.attempt) - Date.parse(before.at) > MIN_PAUSE_MS ? [i] : [];
  }));
}

/** Returns plotly's range options: nearly constant values are drawn as a flat line instead of magnified noise. {} for other values. */
export function yRangeOptions(traces) {
  const values = traces.flatMap((trace) => trace.y.filter(Number.isFinite));
  const [low, high] = [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
  const size = Math.max(Math.abs(low), Math.abs(high));
  if (!values.length || high - low > FLAT_FRACTION * size) return {};
  // Exact limits: for a single value plotly would add 1 above and below, however small the value is.
  const [minallowed, maxallowed] = size === 0 ? [0, 1] : [low - size / 10, high + size / 10];
  return { minallowed, maxallowed };
}

const CLIFF_SHARE = 0.05; // of the points
const MIN_POINTS = 20;
const RISE_SHARE = 0.05; // of the whole fall: a rise of more than this is a spike, not noise of the fall
const WORTHWHILE = 1.3;

/**
 * Returns `{top, full, points}` if the first steps of falling curves would flatten all others: `top` is the largest value after the cliff, `full` that of all, `points` the number
 * of points above `top`. null if there is no such cliff. `falls` marks the traces that may have one; a spike ends it, so that none is left out.
 */
export function cliffTop(traces) {
  const falling = traces.filter((trace) => trace.falls);
  if (!falling.length) return null;
  const ends = new Map(falling.map((trace) => [trace, cliffEnd(points(trace))]));
  const earliest = Math.min(...ends.values());
  let [top, full, low] = [-Infinity, -Infinity, Infinity];
  for (const trace of traces) {
    for (const [x, y] of points(trace)) {
      full = Math.max(full, y);
      low = Math.min(low, y);
      if (x >= (ends.get(trace) ?? earliest)) top = Math.max(top, y);
    }
  }
  if (!(top > low) || full - low < WORTHWHILE * (top - low)) return null;
  return { top, full, points: Math.max(...falling.map((trace) => points(trace).filter(([, y]) => y > top).length)) };
}

/** Where the cliff of a curve ends: after 5 % of its points, or where it first rises. -Infinity for a short curve. */
function cliffEnd(points) {
  if (points.length < MIN_POINTS) return -Infinity;
  const fall = points[0][1] - points.reduce((low, [, y]) => Math.min(low, y), Infinity);
  const last = Math.floor(points.length * CLIFF_SHARE);
  let low = Infinity;
  for (const [x, y] of points.slice(0, last)) {
    if (y > low + RISE_SHARE * fall) return x;
    low = Math.min(low, y);
  }
  return points[last][0];
}

const points = ({ x: xs, y: ys }) => xs.flatMap((x, i) => (x === null || !Number.isFinite(ys[i]) ? [] : [[toNumber(x), ys[i]]]));

/** Tick distance of a log axis: every decade, or 1, 2 and 5 of each, so that numbers do not overlap. */
export function logTicks(traces) {
  const values = traces.flatMap((trace) => trace.y.filter((value) => Number.isFinite(value) && value > 0));
  const decades = Math.log10(values.reduce((a, b) => Math.max(a, b), 0) / values.reduce((a, b) => Math.min(a, b), Infinity));
  return decades > 3 ? { dtick: 1 } : decades > 0.5 ? { dtick: "D2" } : {};
}

/** Returns x and y of a line, with nulls at the gaps. */
export function lineWithGaps(xs, ys, breaks) {
  if (!breaks.size) return { x: xs, y: ys };
  const points = { x: [], y: [] };
  xs.forEach((x, i) => {
    if (breaks.has(i)) {
      points.x.push(x);
      points.y.push(null);
    }
    points.x.push(x);
    points.y.push(ys[i]);
  });
  return points;
}

/** The names of the held-out sets in the rows. */
export const heldOutSets = (rows) => [...new Set(rows.flatMap((row) => Object.keys(row.eval ?? {})))];

const isPresent = (value) => value !== null && value !== undefined;

/** Counts values that a log axis cannot show: zeros, negatives, and missing ones if the series has any value. */
export function countNotShown(values) {
  return values.some(isPresent) ? values.filter((value) => !isPresent(value) || value <= 0).length : 0;
}

/** "1 point = 32 steps": the bucket size, or the distance between two reports. */
export function pointSizeText(resolution, rows) {
  const apart = rows.length > 1 ? Math.round((rows.at(-1).step - rows[0].step) / (rows.length - 1)) : 1;
  const steps = resolution > 1 ? resolution : Math.max(1, apart);
  return tn(steps, "1 point = {n} step", "1 point = {n} steps", { n: steps.toLocaleString("en-US") });
}

/** "Train loss, step 0 to 12,400, now 2.913" */
export function chartLabel(name, rows, value, format) {
  if (!rows.length) return t("{name}, no data yet", { name });
  const last = rows.findLast((row) => value(row) !== null && value(row) !== undefined);
  const range = { name, from: (rows[0].first_step ?? rows[0].step).toLocaleString("en-US"), to: rows.at(-1).step.toLocaleString("en-US") };
  return last ? t("{name}, step {from} to {to}, now {now}", { ...range, now: format(value(last)) }) : t("{name}, step {from} to {to}", range);
}

/** Step ranges of earlier attempts that a later attempt trained again: [attempt, after step, until step]. */
export function supersededRanges(attempts) {
  return attempts.flatMap((attempt, i) => {
    const later = attempts.slice(i + 1).map((next) => next.start_step).filter((step) => step !== null);
    const from = Math.min(...later);
    return attempt.end_step !== null && from < attempt.end_step ? [[attempt.number, from, attempt.end_step]] : [];
  });
}

/** Splits a fork's rows into `[inherited, own]`. `own` starts with the last inherited row, where the two lines meet. */
export function splitInherited(rows, id) {
  const first = rows.findIndex((row) => (row.job_id ?? id) === id);
  if (first < 0) return [rows, []];
  return [rows.slice(0, first), rows.slice(Math.max(0, first - 1))];
}
