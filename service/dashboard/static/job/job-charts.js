// The charts of a job: those of the overview, and those of the metrics tab.
import { get, withQuery } from "../api.js";
import { DARK_COLORS, DASHES, LIGHT_COLORS, chartLabel, heldOutSets, lineWithGaps, pointSizeText, rowsAfterPause, smoothedLoss, smoothingQuery, smoothingText, stepRange, supersededRanges, toNumber, xValues } from "../chart-data.js";
import { Chart, ChartGroup, chartControls, chartSettings, loadLibrary, preloadLibrary } from "../charts.js";
import { h } from "../dom.js";
import { bytes, compactNumber, count, fewDigits, loss, percent } from "../format.js";
import { t } from "../i18n.js";
import { throttle } from "../polling.js";
import { isDark } from "../theme.js";

// Definitions of all charts of a job except the main loss chart: lines, number format, initial y axis. Pure.

const fieldLine = (name, label) => ({ name, label, of: (row) => row[name] ?? null, fields: [name] });
const SI = "~s";
/** More lines cannot be told apart. */
const MAX_SETS = 12;
const PERCENT = ".3~p";
const shareText = (value) => percent(value === null || value === undefined ? null : value * 100);

/** The small charts below the loss. */
export const SMALL_CHARTS = [
  { name: t("Learning rate"), lines: [fieldLine("learning_rate", t("rate"))], format: fewDigits },
  { name: t("Gradient norm"), lines: [fieldLine("grad_norm", t("norm"))], format: fewDigits, log: true },
  { name: t("Tokens/s"), lines: [fieldLine("tokens_per_second", t("tokens/s"))], format: compactNumber, ticks: SI },
  { name: t("Step time (s)"), lines: [fieldLine("step_seconds", t("step")), fieldLine("data_seconds", t("data"))], format: fewDigits, log: true },
];

/** The charts of the metrics tab. */
export const MORE_CHARTS = [
  { name: t("Evaluation loss"), lines: [{ ...fieldLine("eval_loss", t("evaluation")), sparse: true }], format: loss, ofSet: "loss" },
  { name: t("Bits per byte"), lines: [fieldLine("bpb", t("training")), { ...fieldLine("eval_bpb", t("evaluation")), sparse: true }], format: loss, ofSet: "bpb" },
  { name: t("Model FLOPs utilization"), lines: [fieldLine("mfu", t("MFU"))], format: shareText, ticks: PERCENT },
  { name: t("Peak memory"), lines: [fieldLine("memory_bytes", t("bytes"))], format: bytes, ticks: SI },
  { name: t("Perplexity"), lines: [{ name: "perplexity", label: "exp(loss)", of: (row) => (smoothedLoss(row) === null ? null : Math.exp(smoothedLoss(row))), fields: [] }], format: fewDigits, log: true },
  { name: t("Loss range within a point"), lines: [{ name: "spread", label: t("spread"), of: (row) => (row.loss_max === null ? null : row.loss_max - row.loss_min), fields: [] }], format: fewDigits },
  { name: t("Data wait as share of step time"), lines: [{ name: "waiting", label: t("share"), of: (row) => (row.step_seconds && row.data_seconds !== null ? row.data_seconds / row.step_seconds : null), fields: ["step_seconds", "data_seconds"] }], format: shareText, ticks: PERCENT },
  { name: t("Slowest rank over median"), lines: [fieldLine("step_seconds_spread", t("ratio"))], format: fewDigits },
  { name: t("Tokens"), lines: [fieldLine("tokens", t("tokens"))], format: compactNumber, ticks: SI },
  { name: t("Epoch"), lines: [fieldLine("epoch", t("epoch"))], format: fewDigits },
  { name: t("Auxiliary loss"), lines: [fieldLine("aux_loss", t("auxiliary"))], format: fewDigits },
  { name: t("Expert load, highest and lowest"), lines: [expertLine("highest", t("highest"), Math.max), expertLine("lowest", t("lowest"), Math.min)], format: shareText, ticks: PERCENT },
];

function expertLine(name, label, pick) {
  return { name, label, of: (row) => (row.expert_load?.length ? pick(...row.expert_load) : null), fields: ["expert_load"] };
}

/** The fields that a chart needs. */
export const chartFields = ({ lines, ofSet }) => [...lines.flatMap((part) => part.fields), ...(ofSet ? ["eval"] : [])];

/** The lines of a chart: its own, and one for each held-out set if there are several. */
function chartLines({ lines, ofSet }, sets) {
  if (!ofSet || sets.length < 2) return lines;
  return [...lines, ...sets.slice(0, MAX_SETS).map((name) => ({ name: `set-${name}`, label: name, of: (row) => row.eval?.[name]?.[ofSet] ?? null, sparse: true }))];
}

/** Returns what `Chart.show` takes. */
export function chartContent(chart, { rows, xs, breaks, colors, shapes }) {
  const sets = chart.ofSet ? heldOutSets(rows) : [];
  const lines = chartLines(chart, sets);
  const traces = lines.map((part, i) => lineTrace(part, i, lines.length, { rows, xs, breaks, colors }));
  const values = () => rows.map((row) => [count(row.step), ...lines.map((part) => chart.format(part.of(row)))]);
  const [first] = lines;
  const note = sets.length > MAX_SETS ? t("{n} more held-out sets are in the CSV", { n: (sets.length - MAX_SETS).toLocaleString("en-US") }) : "";
  return { traces, values, shapes, note, columns: [t("step"), ...lines.map((part) => part.label)], label: chartLabel(chart.name, rows, first.of, chart.format),
    now: chart.format(rows.findLast((row) => first.of(row) !== null)?.[first.name] ?? first.of(rows.at(-1) ?? {}) ?? null) };
}

function lineTrace(part, i, count, { rows, xs, breaks, colors }) {
  const ys = rows.map(part.of);
  const dash = i < 2 ? ["solid", "dot"][i] : DASHES[(i + Math.floor(i / colors.length)) % DASHES.length];
  const style = { line: { width: part.faint ? 1 : 1.5, color: part.faint ? `${colors[0]}73` : colors[i % colors.length], dash: part.faint ? "solid" : dash } };
  const more = { uid: part.name, main: i === 0, end: count > 1 ? part.label : null, label: part.label, falls: part.falls };
  if (!part.sparse) return { ...lineWithGaps(xs, ys, breaks), ...style, ...more, counted: ys };
  // Most rows have no value: connect those that have one.
  const there = rows.flatMap((_, k) => (ys[k] === null ? [] : [k]));
  return { x: there.map((k) => xs[k]), y: there.map((k) => ys[k]), mode: "lines+markers", marker: { size: 5 }, ...style, ...more, counted: there.map((k) => ys[k]) };
}

// Content of the loss chart: min-max band, smoothed and last loss, and events of the run as marks. Pure.

const GREY = "#7b8794";
const isMeasured = (value) => value !== null && value !== undefined;

/** Returns what `Chart.show` takes. `view`: `{rows, xs, breaks, colours, axis}`; `data`: the fetched rows and events; `oldRows`: superseded rows by attempt. */
export function lossContent(view, data, oldRows) {
  const { rows, xs, breaks, colors: [main, accent] } = view;
  const ys = (name) => rows.map((row) => row[name]);
  const traces = [
    ...lossBand(view, main),
    { uid: "last", ...lineWithGaps(xs, ys("loss"), breaks), line: { width: 1, color: `${main}59` } },
    { uid: "smoothed", ...lineWithGaps(xs, rows.map(smoothedLoss), breaks), line: { width: 2, color: main }, main: true, counted: rows.map(smoothedLoss) },
    evaluationMarkers(view, accent), nonFiniteMarkers(view, accent), ...supersededLines(view, data, oldRows),
  ];
  const values = () => rows.map((row) => [count(row.step), loss(smoothedLoss(row)), loss(row.loss), loss(row.loss_min), loss(row.loss_max)]);
  return { traces, values, columns: [t("step"), t("smoothed"), t("last"), t("min"), t("max")], shapes: eventLines(view, data),
    label: chartLabel(t("Train loss"), rows, smoothedLoss, loss), now: currentLoss(rows), note: legendText(view, data, oldRows),
    runs: [{ name: data.name, rows: data.wholeRun, attempts: data.attempts, of: smoothedLoss }] };
}

/** The newest smoothed and last value. */
function currentLoss(rows) {
  const [smoothed, last] = [smoothedLoss, (row) => row.loss].map((of) => rows.map(of).findLast(isMeasured));
  return isMeasured(smoothed) ? t("{smoothed} smoothed, {last} last", { smoothed: loss(smoothed), last: loss(last) }) : loss(smoothed);
}

/** Band from min to max without points that have no finite loss: plotly fills a polygon with gaps wrongly. */
function lossBand({ rows, xs, breaks }, color) {
  const there = rows.flatMap((row, i) => (row.loss_min === null ? [] : [i]));
  const holes = new Set(there.flatMap((i, k) => ([...breaks].some((gap) => gap <= i && gap > (there[k - 1] ?? -1)) ? [k] : [])));
  const edge = (name) => lineWithGaps(there.map((i) => xs[i]), there.map((i) => rows[i][name]), holes);
  const plain = { line: { width: 0 }, hoverinfo: "skip" };
  return [{ uid: "low", label: t("min"), ...edge("loss_min"), ...plain }, { uid: "high", label: t("max"), falls: true, ...edge("loss_max"), ...plain, fill: "tonexty", fillcolor: `${color}26` }];
}

const markerTrace = (uid, points, more) => ({ uid, x: points.map(([x]) => x), y: points.map(([, y]) => y), mode: "markers", ...more });

function evaluationMarkers({ rows, xs }, color) {
  const points = rows.flatMap((row, i) => (isMeasured(row.eval_loss) ? [[xs[i], row.eval_loss]] : []));
  return markerTrace("eval", points, { label: t("evaluation"), marker: { size: 7, symbol: "diamond", color } });
}

/** Crosses at the height of the smoothed loss, with the number of non-finite steps. */
function nonFiniteMarkers({ rows, xs, colors }, color) {
  let height = rows.map(smoothedLoss).find(isMeasured) ?? 0;
  const points = rows.flatMap((row, i) => {
    height = smoothedLoss(row) ?? height;
    return row.nonfinite_count ? [[xs[i], height, row.nonfinite_count]] : [];
  });
  const text = points.map(([, , times]) => (times > 1 ? `${times}×` : ""));
  return { ...markerTrace("bad", points, { label: t("not finite, at the smoothed loss"), marker: { size: 9, symbol: "x-thin", line: { width: 2, color } } }), mode: "markers+text", text, textposition: "top center", textfont: { size: 10, color: colors[1] } };
}

/** Steps of an earlier attempt that a later one trained again: thin, grey, dotted. */
function supersededLines({ axis, rows }, { attempts }, oldRows) {
  const inside = (row) => !rows.length || (row.step >= rows[0].first_step && row.first_step <= rows.at(-1).step);
  return [...oldRows].map(([number, all]) => [number, all.filter(inside)]).map(([number, rows]) => ({
    uid: `old-${number}`, label: t("superseded steps of attempt {n}", { n: number }), x: xValues(rows, axis, attempts), y: rows.map((row) => row.loss), line: { width: 1, color: GREY, dash: "dot" } }));
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
  const shapes = [
    ...checkpoints.map((checkpoint) => rule(checkpoint.step, GREY, "solid", 0.06)),
    ...attempts.slice(1).filter((attempt) => attempt.start_step !== null).map((attempt) => rule(attempt.start_step, GREY, "dash")),
    ...alerts.filter((alert) => isMeasured(alert.step)).map((alert) => rule(alert.step, colors[1], "dot")),
  ];
  return shapes.filter((shape) => shape.x0 !== null);
}

/** The note below the chart: steps per point, and a legend of the marks in use. */
function legendText({ rows }, { resolution, attempts, checkpoints, alerts, smoothing, smoothWidth }, oldRows) {
  const bad = rows.reduce((sum, row) => sum + row.nonfinite_count, 0);
  const there = [
    [true, t("band min to max")],
    [bad, t("✕ {n} not finite", { n: bad.toLocaleString("en-US") })],
    [rows.some((row) => isMeasured(row.eval_loss)), t("◆ evaluation")],
    [attempts.length > 1, t("┆ new attempt")],
    [oldRows.size, t("··· superseded steps")],
    [alerts.some((alert) => isMeasured(alert.step)), t("⁞ alert")],
    [checkpoints.length, t("╷ checkpoint")],
  ];
  return rows.length ? [pointSizeText(resolution, rows), smoothingText(smoothing, smoothWidth), ...there.filter(([is]) => is).map(([, text]) => text)].filter(Boolean).join(" · ") : "";
}

// Charts of the job page: fetches metrics in buckets at most every 2 s, and finer ones for the zoomed range.

const MAX_POINTS = 1000;
const BASE_FIELDS = ["learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds", "eval_loss", "at"];

export class JobCharts {
  /** `startsFrom(checkpoint)`: items of the loss chart's menu for the checkpoint at the pointer. */
  constructor(address, startsFrom) {
    Object.assign(this, { address, startsFrom });
    this.group = new ChartGroup();
    ({ axis: this.group.axis, smoothing: this.smoothing } = chartSettings("step"));
    this.group.onZoom = () => this.refetch();
    this.group.onTheme = () => this.data && this.draw();
    this.lossChart = new Chart(t("Train loss"), { height: 300, format: loss });
    this.loss = this.group.add(this.lossChart);
    this.smallCharts = SMALL_CHARTS.map((chart) => new Chart(chart.name, { ...chart, height: 150 }));
    this.small = h("div", { class: "small" }, this.smallCharts.map((chart) => this.group.add(chart)));
    this.bar = this.controls();
    this.superseded = new Map();
    this.scheduleRefetch = throttle(() => this.refetch());
    this.tab = null;
    this.lossChart.extraActions = (x) => this.checkpointActions(x);
  }

  /** Items of the loss chart's menu at `x`: what starts from the checkpoint that is nearest to this place, or from the newest one. */
  checkpointActions(x) {
    const { rows = [], attempts, checkpoints = [] } = this.data ?? {};
    if (!checkpoints.length) return [];
    const xs = x === null ? [] : xValues(rows, this.group.axis, attempts).map(toNumber);
    const apart = (i) => Math.abs(xs[i] - toNumber(x));
    const step = xs.length ? rows[xs.reduce((best, _, i) => (apart(i) < apart(best) ? i : best), 0)].step : Infinity;
    const nearest = checkpoints.reduce((best, one) => (Math.abs(one.step - step) < Math.abs(best.step - step) || step === Infinity && one.step > best.step ? one : best));
    return [{ heading: t("Checkpoint at step {step}", { step: count(nearest.step) }) }, ...this.startsFrom(nearest)];
  }

  controls() {
    const axis = (chosen) => {
      this.group.axis = chosen;
      this.group.hover(null);
      this.group.setZoom(null);
    };
    const smoothing = (chosen) => {
      this.smoothing = chosen;
      this.refetch();
    };
    const hint = h("span", { class: "muted" }, t("Drag to zoom, double-click for the whole run"));
    return chartControls({ axis: this.group.axis, smoothing: this.smoothing }, "step", axis, smoothing, hint);
  }

  /** `{fields, draw(view)}` of an open tab that draws the same rows, or null. */
  setTab(tab) {
    this.tab = tab;
    // The prefetched response lacks fields of the tab.
    if (tab) this.prefetched = null;
    if (tab && this.data) this.refetch();
  }

  /** Called with every poll of the job; fetches points only if something may have changed. */
  async update(job) {
    const mark = `${job.progress.step} ${job.attempt} ${job.status} ${job.checkpoint?.step} ${job.alerts.length}`;
    this.alerts = job.alerts;
    this.name = job.name;
    if (mark === this.mark) return;
    const isFirst = this.mark === undefined;
    this.mark = mark;
    // Load plotly after the text is painted, while the points are fetched.
    if (isFirst) requestAnimationFrame(() => setTimeout(() => loadLibrary().catch(() => {})));
    if (isFirst) await this.refetch();
    else this.scheduleRefetch();
  }

  /** Fetches before the job itself is known, so that both requests run in parallel. */
  prefetch() {
    this.prefetched = this.fetch();
    preloadLibrary();
    this.prefetched.catch(() => {});
  }

  async refetch() {
    const number = (this.requestNumber = (this.requestNumber ?? 0) + 1);
    const response = this.prefetched ?? this.fetch();
    this.prefetched = null;
    try {
      const { metrics, attempts, checkpoints, isWhole } = await response;
      if (number !== this.requestNumber || this.isClosed) return;
      this.data = { rows: metrics.data, resolution: metrics.resolution, smoothing: this.smoothing, smoothWidth: metrics.smooth_width, attempts: attempts.data, checkpoints: checkpoints.data };
      if (isWhole) this.wholeRun = metrics.data;
      await this.fetchSuperseded(attempts.data);
      this.draw();
    } catch (error) {
      // Retry with the next poll.
      this.mark = null;
      if (error.name === "TypeError") throw error;
    }
  }

  async fetch() {
    const [from, to] = stepRange(this.group.zoom, this.group.axis, this.wholeRun, this.data?.attempts);
    const fields = [...new Set([...BASE_FIELDS, ...(this.tab?.fields ?? [])])].join(",");
    const wanted = { max_points: MAX_POINTS, ...smoothingQuery(this.smoothing), fields, after_step: from, until_step: to };
    const [metrics, attempts, checkpoints] = await Promise.all([
      get(withQuery(`${this.address}/metrics`, wanted)), get(`${this.address}/attempts`), get(`${this.address}/checkpoints`)]);
    return { metrics, attempts, checkpoints, isWhole: from === null };
  }

  async fetchSuperseded(attempts) {
    for (const [number, from, to] of supersededRanges(attempts)) {
      if (this.superseded.has(number)) continue;
      this.superseded.set(number, []);
      try {
        const page = await get(withQuery(`${this.address}/metrics`, { attempt: number, after_step: from, until_step: to, max_points: 500, fields: "tokens,at" }));
        this.superseded.set(number, page.data);
      } catch (error) {
        this.superseded.delete(number);
        throw error;
      }
    }
  }

  draw() {
    const data = { ...this.data, alerts: this.alerts, name: this.name ?? t("this run"), wholeRun: this.wholeRun ?? this.data.rows };
    const { rows, attempts } = data;
    const { axis } = this.group;
    const view = { rows, axis, xs: xValues(rows, axis, attempts), breaks: rowsAfterPause(rows, axis, attempts), colors: isDark() ? DARK_COLORS : LIGHT_COLORS };
    view.shapes = eventLines(view, { ...data, checkpoints: [] });
    this.lossChart.show(lossContent(view, data, this.superseded));
    this.smallCharts.forEach((chart, i) => chart.show(chartContent(SMALL_CHARTS[i], view)));
    this.tab?.draw(view);
    this.group.redraw().catch((error) => console.warn(error));
  }

  close() {
    this.isClosed = true;
    this.scheduleRefetch.stop();
    this.group.close();
  }
}
