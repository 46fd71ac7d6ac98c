// The metrics' rows as what charts draw. Pure.

export const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#1F2933"];
export const DARK = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442"];
export const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
export const AXES = { step: "Step", tokens: "Tokens", active: "Active time (h)", clock: "Wall clock" };
export const HALF_LIVES = [0, 10, 50, 200, 1000];

const PAUSE_MS = 60_000;
const LEVEL = 0.02;

/** x of every row on the chosen axis; active time leaves out what lies between attempts. */
export function places(rows, axis, attempts) {
  if (axis === "tokens") return rows.map((row) => row.tokens ?? null);
  if (axis === "clock") return rows.map((row) => (row.at ? wallClock(row.at) : null));
  if (axis === "step") return rows.map((row) => row.step);
  const spans = attempts.map((one) => [Date.parse(one.started_at ?? one.created_at), Date.parse(one.ended_at ?? new Date())]);
  return rows.map((row) => (row.at ? activeHours(Date.parse(row.at), spans) : null));
}

/** What a zoom is in steps, a little wider; [null, null] for all. `whole` are the rows of the whole run, where they are known. */
export function stepsOf(zoom, axis, whole, attempts) {
  if (!zoom) return [null, null];
  let ends = zoom;
  if (axis !== "step") {
    const xs = places(whole ?? [], axis, attempts);
    const inside = (whole ?? []).filter((_, i) => moment(xs[i]) >= moment(zoom[0]) && moment(xs[i]) <= moment(zoom[1]));
    if (!inside.length) return [null, null];
    ends = [inside[0].first_step, inside.at(-1).step];
  }
  const edge = Math.max(1, (ends[1] - ends[0]) * 0.05);
  return [Math.max(0, Math.floor(ends[0] - edge)), Math.max(1, Math.ceil(ends[1] + edge))];
}

/** Local, as the chart library writes dates: it knows no zones. */
export function wallClock(at) {
  const then = new Date(at);
  return new Date(then - then.getTimezoneOffset() * 60_000).toISOString().replace("T", " ").replace("Z", "");
}

/** x as a number: of a wall clock in ms. */
export const moment = (x) => (typeof x === "string" ? Date.parse(x.replace(" ", "T")) : x);

function activeHours(at, spans) {
  return spans.reduce((sum, [from, to]) => sum + Math.max(0, Math.min(at, to) - from), 0) / 3_600_000;
}

/** Where the line breaks: before these rows the run stood still. Only on the axis where standing still takes room. */
export function gaps(rows, axis, attempts) {
  if (axis !== "clock") return new Set();
  const begun = new Map(attempts.map((one) => [one.number, Date.parse(one.started_at ?? one.created_at)]));
  return new Set(rows.flatMap((row, i) => {
    const before = rows[i - 1];
    const changed = before && row.attempt !== before.attempt;
    return changed && begun.get(row.attempt) - Date.parse(before.at) > PAUSE_MS ? [i] : [];
  }));
}

/** Where a y axis begins and ends: values that hardly differ are a level, and not the noise of their last digits. {} for others. */
export function headroom(traces) {
  const values = traces.flatMap((one) => one.y.filter(Number.isFinite));
  const [least, most] = [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
  const size = Math.max(Math.abs(least), Math.abs(most));
  if (!values.length || most - least > LEVEL * size) return {};
  // To the point: else the library puts 1 above and below what is but one value, however small it is.
  const [minallowed, maxallowed] = size === 0 ? [0, 1] : [least - size / 10, most + size / 10];
  return { minallowed, maxallowed };
}

/** Where a log axis has its numbers: at 1, 2 and 5 of each decade where all nine would stand in each other's way. */
export function logTicks(traces) {
  const values = traces.flatMap((one) => one.y.filter((value) => Number.isFinite(value) && value > 0));
  const decades = Math.log10(values.reduce((a, b) => Math.max(a, b), 0) / values.reduce((a, b) => Math.min(a, b), Infinity));
  return decades > 3 ? { dtick: 1 } : decades > 0.5 ? { dtick: "D2" } : {};
}

/** A line's x and y, with nulls put in at the gaps. */
export function line(xs, ys, breaks) {
  if (!breaks.size) return { x: xs, y: ys };
  const found = { x: [], y: [] };
  xs.forEach((x, i) => {
    if (breaks.has(i)) {
      found.x.push(x);
      found.y.push(null);
    }
    found.x.push(x);
    found.y.push(ys[i]);
  });
  return found;
}

const isNumber = (value) => value !== null && value !== undefined;

/** How many values a log axis cannot show: zeros, negatives, and those that were no number in a series that has some. */
export function unshown(values) {
  return values.some(isNumber) ? values.filter((value) => !isNumber(value) || value <= 0).length : 0;
}

/** "1 point = 32 steps": what the service put together, or what lies between two reports. */
export function grain(resolution, rows) {
  const apart = rows.length > 1 ? Math.round((rows.at(-1).step - rows[0].step) / (rows.length - 1)) : 1;
  const steps = resolution > 1 ? resolution : Math.max(1, apart);
  return `1 point = ${steps.toLocaleString("en-US")} ${steps === 1 ? "step" : "steps"}`;
}

/** "Train loss, step 0 to 12,400, now 2.913" */
export function described(name, rows, value, write) {
  if (!rows.length) return `${name}, no point yet`;
  const last = rows.findLast((row) => value(row) !== null && value(row) !== undefined);
  const now = last ? `, now ${write(value(last))}` : "";
  return `${name}, step ${(rows[0].first_step ?? rows[0].step).toLocaleString("en-US")} to ${rows.at(-1).step.toLocaleString("en-US")}${now}`;
}

/** The parts of earlier attempts that a later one went over again: [attempt, after step, up to step]. */
export function superseded(attempts) {
  return attempts.flatMap((one, i) => {
    const later = attempts.slice(i + 1).map((next) => next.start_step).filter((step) => step !== null);
    const from = Math.min(...later);
    return one.end_step !== null && from < one.end_step ? [[one.number, from, one.end_step]] : [];
  });
}

/** A fork's rows as `[inherited, own]`. Its own begin with the last inherited one: there the two lines meet. */
export function forked(rows, id) {
  const first = rows.findIndex((row) => (row.job_id ?? id) === id);
  if (first < 0) return [rows, []];
  return [rows.slice(0, first), rows.slice(Math.max(0, first - 1))];
}
