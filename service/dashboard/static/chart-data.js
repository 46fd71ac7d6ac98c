// Converts rows of metrics to the data of charts. Pure.

export const LIGHT_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#1F2933"];
export const DARK_COLORS = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442"];
export const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
export const AXES = { step: "Step", tokens: "Tokens", active: "Active time (h)", clock: "Wall clock" };
export const HALF_LIVES = [0, 10, 50, 200, 1000];

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
  return `1 point = ${steps.toLocaleString("en-US")} ${steps === 1 ? "step" : "steps"}`;
}

/** "Train loss, step 0 to 12,400, now 2.913" */
export function chartLabel(name, rows, value, format) {
  if (!rows.length) return `${name}, no data yet`;
  const last = rows.findLast((row) => value(row) !== null && value(row) !== undefined);
  const now = last ? `, now ${format(value(last))}` : "";
  return `${name}, step ${(rows[0].first_step ?? rows[0].step).toLocaleString("en-US")} to ${rows.at(-1).step.toLocaleString("en-US")}${now}`;
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
