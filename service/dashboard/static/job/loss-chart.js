// The loss: its band, its mean, its last values, and what happened to the run, as marks. Pure.
import { loss } from "../format.js";
import { described, grain, line, places } from "../chart-data.js";

const GREY = "#7b8794";
const isMeasured = (value) => value !== null && value !== undefined;

/** For `Chart.show`. `view` is `{rows, xs, breaks, colours, axis}`, `got` what was fetched, `old` superseded rows by attempt. */
export function lossContent(view, got, old) {
  const { rows, xs, breaks, colours: [main, accent] } = view;
  const ys = (name) => rows.map((row) => row[name]);
  const traces = [
    ...band(view, main),
    { uid: "last", ...line(xs, ys("loss"), breaks), line: { width: 1, color: `${main}59` } },
    { uid: "ema", ...line(xs, ys("loss_ema"), breaks), line: { width: 2, color: main }, main: true, counted: ys("loss_ema") },
    evaluations(view, accent), notFinite(view, accent), ...superseded(view, got, old),
  ];
  const values = rows.map((row) => [row.step.toLocaleString("en-US"), loss(row.loss_ema), loss(row.loss), loss(row.loss_min), loss(row.loss_max)]);
  return { traces, values, columns: ["step", "smoothed", "last", "least", "most"], shapes: marks(view, got),
    label: described("Train loss", rows, (row) => row.loss_ema, loss), now: newest(rows), note: key(view, got, old) };
}

/** Both values that the picture ends with, said apart: the facts beside it have the last one. */
function newest(rows) {
  const [smoothed, last] = ["loss_ema", "loss"].map((name) => rows.findLast((row) => isMeasured(row[name]))?.[name]);
  return isMeasured(smoothed) ? `${loss(smoothed)} smoothed, ${loss(last)} last` : loss(smoothed);
}

/** From the least to the most, over points without a finite loss: a fill with a hole is drawn crosswise. */
function band({ rows, xs, breaks }, color) {
  const there = rows.flatMap((row, i) => (row.loss_min === null ? [] : [i]));
  const holes = new Set(there.flatMap((i, k) => ([...breaks].some((one) => one <= i && one > (there[k - 1] ?? -1)) ? [k] : [])));
  const edge = (name) => line(there.map((i) => xs[i]), there.map((i) => rows[i][name]), holes);
  const plain = { line: { width: 0 }, hoverinfo: "skip" };
  return [{ uid: "low", ...edge("loss_min"), ...plain }, { uid: "high", ...edge("loss_max"), ...plain, fill: "tonexty", fillcolor: `${color}26` }];
}

const points = (uid, found, more) => ({ uid, x: found.map(([x]) => x), y: found.map(([, y]) => y), mode: "markers", ...more });

function evaluations({ rows, xs }, color) {
  const found = rows.flatMap((row, i) => (isMeasured(row.eval_loss) ? [[xs[i], row.eval_loss]] : []));
  return points("eval", found, { marker: { size: 7, symbol: "diamond", color } });
}

/** A cross at the height of the mean, with how many there were. */
function notFinite({ rows, xs, colours }, color) {
  let height = rows.find((row) => row.loss_ema !== null)?.loss_ema ?? 0;
  const found = rows.flatMap((row, i) => {
    height = row.loss_ema ?? height;
    return row.nonfinite_count ? [[xs[i], height, row.nonfinite_count]] : [];
  });
  const text = found.map(([, , many]) => (many > 1 ? `${many}×` : ""));
  return { ...points("bad", found, { marker: { size: 9, symbol: "x-thin", line: { width: 2, color } } }), mode: "markers+text", text, textposition: "top center", textfont: { size: 10, color: colours[1] } };
}

/** What a later attempt went over again: thin, grey, dotted. */
function superseded({ axis, rows }, { attempts }, old) {
  const inside = (row) => !rows.length || (row.step >= rows[0].first_step && row.first_step <= rows.at(-1).step);
  return [...old].map(([number, all]) => [number, all.filter(inside)]).map(([number, found]) => ({
    uid: `old-${number}`, x: places(found, axis, attempts), y: found.map((row) => row.loss), line: { width: 1, color: GREY, dash: "dot" } }));
}

/** Thin rules: restarts dashed, alerts dotted, saves short and at the foot. */
export function marks({ rows, xs, axis, colours }, { attempts, checkpoints, alerts }) {
  if (!rows.length) return [];
  const at = (step) => {
    if (step < rows[0].first_step - 1 || step > rows.at(-1).step) return null;
    return axis === "step" ? step : (xs[rows.findIndex((row) => row.step >= step)] ?? null);
  };
  const rule = (step, color, dash, height = 1) => ({
    type: "line", xref: "x", yref: "paper", x0: at(step), x1: at(step), y0: 0, y1: height, layer: "below", line: { width: 1, color, dash } });
  const found = [
    ...checkpoints.map((one) => rule(one.step, GREY, "solid", 0.06)),
    ...attempts.slice(1).filter((one) => one.start_step !== null).map((one) => rule(one.start_step, GREY, "dash")),
    ...alerts.filter((one) => isMeasured(one.step)).map((one) => rule(one.step, colours[1], "dot")),
  ];
  return found.filter((shape) => shape.x0 !== null);
}

/** What stands below: the grain, and of the marks those that there are. */
function key({ rows }, { resolution, attempts, checkpoints, alerts }, old) {
  const bad = rows.reduce((sum, row) => sum + row.nonfinite_count, 0);
  const there = [
    [true, "band least to most"],
    [bad, `✕ ${bad.toLocaleString("en-US")} not finite`],
    [rows.some((row) => isMeasured(row.eval_loss)), "◆ evaluation"],
    [attempts.length > 1, "┆ new attempt"],
    [old.size, "··· gone over again"],
    [alerts.some((one) => isMeasured(one.step)), "⁞ alert"],
    [checkpoints.length, "╷ saved"],
  ];
  return rows.length ? [grain(resolution, rows), ...there.filter(([is]) => is).map(([, words]) => words)].join(" · ") : "";
}
