// Content of the loss chart: min-max band, smoothed and last loss, and events of the run as marks. Pure.
import { chartLabel, lineWithGaps, pointSizeText, xValues } from "../chart-data.js";
import { loss } from "../format.js";

const GREY = "#7b8794";
const isMeasured = (value) => value !== null && value !== undefined;

/** Returns what `Chart.show` takes. `view`: `{rows, xs, breaks, colours, axis}`; `data`: the fetched rows and events; `oldRows`: superseded rows by attempt. */
export function lossContent(view, data, oldRows) {
  const { rows, xs, breaks, colors: [main, accent] } = view;
  const ys = (name) => rows.map((row) => row[name]);
  const traces = [
    ...lossBand(view, main),
    { uid: "last", ...lineWithGaps(xs, ys("loss"), breaks), line: { width: 1, color: `${main}59` } },
    { uid: "ema", ...lineWithGaps(xs, ys("loss_ema"), breaks), line: { width: 2, color: main }, main: true, counted: ys("loss_ema") },
    evaluationMarkers(view, accent), nonFiniteMarkers(view, accent), ...supersededLines(view, data, oldRows),
  ];
  const values = rows.map((row) => [row.step.toLocaleString("en-US"), loss(row.loss_ema), loss(row.loss), loss(row.loss_min), loss(row.loss_max)]);
  return { traces, values, columns: ["step", "smoothed", "last", "min", "max"], shapes: eventLines(view, data),
    label: chartLabel("Train loss", rows, (row) => row.loss_ema, loss), now: currentLoss(rows), note: legendText(view, data, oldRows) };
}

/** The newest smoothed and last value. */
function currentLoss(rows) {
  const [smoothed, last] = ["loss_ema", "loss"].map((name) => rows.findLast((row) => isMeasured(row[name]))?.[name]);
  return isMeasured(smoothed) ? `${loss(smoothed)} smoothed, ${loss(last)} last` : loss(smoothed);
}

/** Band from min to max without points that have no finite loss: plotly fills a polygon with gaps wrongly. */
function lossBand({ rows, xs, breaks }, color) {
  const there = rows.flatMap((row, i) => (row.loss_min === null ? [] : [i]));
  const holes = new Set(there.flatMap((i, k) => ([...breaks].some((one) => one <= i && one > (there[k - 1] ?? -1)) ? [k] : [])));
  const edge = (name) => lineWithGaps(there.map((i) => xs[i]), there.map((i) => rows[i][name]), holes);
  const plain = { line: { width: 0 }, hoverinfo: "skip" };
  return [{ uid: "low", ...edge("loss_min"), ...plain }, { uid: "high", ...edge("loss_max"), ...plain, fill: "tonexty", fillcolor: `${color}26` }];
}

const markerTrace = (uid, found, more) => ({ uid, x: found.map(([x]) => x), y: found.map(([, y]) => y), mode: "markers", ...more });

function evaluationMarkers({ rows, xs }, color) {
  const found = rows.flatMap((row, i) => (isMeasured(row.eval_loss) ? [[xs[i], row.eval_loss]] : []));
  return markerTrace("eval", found, { marker: { size: 7, symbol: "diamond", color } });
}

/** Crosses at the height of the smoothed loss, with the number of non-finite steps. */
function nonFiniteMarkers({ rows, xs, colors }, color) {
  let height = rows.find((row) => row.loss_ema !== null)?.loss_ema ?? 0;
  const found = rows.flatMap((row, i) => {
    height = row.loss_ema ?? height;
    return row.nonfinite_count ? [[xs[i], height, row.nonfinite_count]] : [];
  });
  const text = found.map(([, , times]) => (times > 1 ? `${times}×` : ""));
  return { ...markerTrace("bad", found, { marker: { size: 9, symbol: "x-thin", line: { width: 2, color } } }), mode: "markers+text", text, textposition: "top center", textfont: { size: 10, color: colors[1] } };
}

/** Steps of an earlier attempt that a later one trained again: thin, grey, dotted. */
function supersededLines({ axis, rows }, { attempts }, oldRows) {
  const inside = (row) => !rows.length || (row.step >= rows[0].first_step && row.first_step <= rows.at(-1).step);
  return [...oldRows].map(([number, all]) => [number, all.filter(inside)]).map(([number, found]) => ({
    uid: `old-${number}`, x: xValues(found, axis, attempts), y: found.map((row) => row.loss), line: { width: 1, color: GREY, dash: "dot" } }));
}

/** Vertical lines: restarts dashed, alerts dotted, checkpoints short at the bottom. */
export function eventLines({ rows, xs, axis, colors }, { attempts, checkpoints, alerts }) {
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
    ...alerts.filter((one) => isMeasured(one.step)).map((one) => rule(one.step, colors[1], "dot")),
  ];
  return found.filter((shape) => shape.x0 !== null);
}

/** The note below the chart: steps per point, and a legend of the marks in use. */
function legendText({ rows }, { resolution, attempts, checkpoints, alerts }, oldRows) {
  const bad = rows.reduce((sum, row) => sum + row.nonfinite_count, 0);
  const there = [
    [true, "band min to max"],
    [bad, `✕ ${bad.toLocaleString("en-US")} not finite`],
    [rows.some((row) => isMeasured(row.eval_loss)), "◆ evaluation"],
    [attempts.length > 1, "┆ new attempt"],
    [oldRows.size, "··· superseded steps"],
    [alerts.some((one) => isMeasured(one.step)), "⁞ alert"],
    [checkpoints.length, "╷ checkpoint"],
  ];
  return rows.length ? [pointSizeText(resolution, rows), ...there.filter(([is]) => is).map(([, words]) => words)].join(" · ") : "";
}
