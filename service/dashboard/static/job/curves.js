// Loss and its companions: fetched in buckets, drawn at most every 2 s, fetched again where the user zooms in.
import { get, query } from "../api.js";
import { Board, Chart } from "../charts.js";
import { chosenView, controls } from "../controls.js";
import { h } from "../dom.js";
import { figure, loss, short } from "../format.js";
import { atMost } from "../live.js";
import { DARK, LIGHT, described, gaps, grain, line, places, superseded } from "../series.js";
import { isDark } from "../theme.js";

const POINTS = 1000;
const FIELDS = "learning_rate,grad_norm,tokens,tokens_per_second,step_seconds,data_seconds,eval_loss,at";
const SMALL = [
  ["Learning rate", [["learning_rate", "rate"]], { write: figure }],
  ["Gradient norm", [["grad_norm", "norm"]], { write: figure, log: true }],
  ["Tokens/s", [["tokens_per_second", "tokens/s"]], { write: short }],
  ["Step time (s)", [["step_seconds", "whole step"], ["data_seconds", "waiting for data"]], { write: figure, log: true }],
];

export class Curves {
  constructor(address) {
    this.address = address;
    this.board = new Board();
    ({ axis: this.board.axis, half: this.half } = chosenView("step"));
    this.board.onZoom = () => this.refetch();
    this.board.onTheme = () => this.got && this.draw();
    this.lossChart = new Chart("Train loss", { height: 300, write: loss });
    this.loss = this.board.add(this.lossChart);
    this.smallCharts = SMALL.map(([name, , options]) => new Chart(name, { ...options, height: 150 }));
    this.small = h("div", { class: "small" }, this.smallCharts.map((chart) => this.board.add(chart)));
    this.bar = this.controls();
    this.old = new Map();
    this.stale = atMost(() => this.refetch());
    this.mark = null;
  }

  controls() {
    const axis = (chosen) => {
      this.board.axis = chosen;
      this.board.setZoom(null);
    };
    const half = (chosen) => {
      this.half = chosen;
      this.refetch();
    };
    const hint = h("span", { class: "muted" }, "Drag to zoom, double-click for the whole run");
    return controls({ axis: this.board.axis, half: this.half }, "step", axis, half, hint);
  }

  /** Called with every look at the job: asks for points only where something may have changed. */
  async update(job) {
    const mark = `${job.progress.step} ${job.attempt} ${job.status}`;
    this.job = job;
    if (mark === this.mark) return;
    this.mark = mark;
    await this.refetch();
  }

  async refetch() {
    const number = (this.asked = (this.asked ?? 0) + 1);
    const [from, to] = this.steps();
    const wanted = { max_points: POINTS, ema_half_life: this.half, fields: FIELDS, after_step: from, until_step: to };
    try {
      const [metrics, attempts, checkpoints] = await Promise.all([
        get(query(`${this.address}/metrics`, wanted)), get(`${this.address}/attempts`), get(`${this.address}/checkpoints`)]);
      if (number !== this.asked || this.gone) return;
      this.got = { rows: metrics.data, resolution: metrics.resolution, attempts: attempts.data, checkpoints: checkpoints.data };
      if (from === null) this.whole = metrics.data;
      await this.fetchOld(attempts.data);
      this.draw();
    } catch (error) {
      if (error.name === "TypeError") throw error;
    }
  }

  /** What the zoom is in steps, a little wider; [null, null] for all. */
  steps() {
    const { zoom, axis } = this.board;
    if (!zoom) return [null, null];
    let ends = zoom;
    if (axis !== "step") {
      if (!this.whole) return [null, null];
      const xs = places(this.whole, axis, this.got.attempts);
      const value = (x) => (axis === "clock" ? Date.parse(typeof x === "string" ? x.replace(" ", "T") : x) : x);
      const inside = this.whole.filter((_, i) => value(xs[i]) >= value(zoom[0]) && value(xs[i]) <= value(zoom[1]));
      if (!inside.length) return [null, null];
      ends = [inside[0].first_step, inside.at(-1).step];
    }
    const edge = Math.max(1, (ends[1] - ends[0]) * 0.05);
    return [Math.max(0, Math.floor(ends[0] - edge)), Math.max(1, Math.ceil(ends[1] + edge))];
  }

  async fetchOld(attempts) {
    for (const [number, from, to] of superseded(attempts)) {
      if (this.old.has(number)) continue;
      this.old.set(number, []);
      const found = await get(query(`${this.address}/metrics`, { attempt: number, after_step: from, until_step: to, max_points: 500, fields: "tokens,at" }));
      this.old.set(number, found.data);
    }
  }

  draw() {
    const { rows, attempts } = this.got;
    const { axis } = this.board;
    const xs = places(rows, axis, attempts);
    const breaks = gaps(rows, axis, attempts);
    const colours = isDark() ? DARK : LIGHT;
    const note = grain(this.got.resolution);
    this.lossChart.show({ ...this.lossContent(rows, xs, breaks, colours), note: [note, this.nonfinite(rows)].filter(Boolean).join(" · ") });
    this.smallCharts.forEach((chart, i) => chart.show(smallContent(SMALL[i], rows, xs, breaks, colours)));
    this.board.redraw().catch((error) => console.warn(error));
  }

  nonfinite(rows) {
    const many = rows.reduce((sum, row) => sum + row.nonfinite_count, 0);
    return many ? `${many} not finite` : "";
  }

  lossContent(rows, xs, breaks, colours) {
    const ys = (name) => rows.map((row) => row[name]);
    const [main, accent] = colours;
    const band = { line: { width: 0 }, hoverinfo: "skip" };
    const low = line(xs, ys("loss_min"), breaks);
    const high = line(xs, ys("loss_max"), breaks);
    const traces = [
      { uid: "low", ...low, ...band }, { uid: "high", ...high, ...band, fill: "tonexty", fillcolor: `${main}26` },
      { uid: "last", ...line(xs, ys("loss"), breaks), line: { width: 1, color: `${main}59` } },
      { uid: "ema", ...line(xs, ys("loss_ema"), breaks), line: { width: 2, color: main }, main: true, counted: true },
      ...this.extra(rows, xs, accent),
    ];
    const values = rows.map((row) => [row.step.toLocaleString("en-US"), loss(row.loss_ema), loss(row.loss), loss(row.loss_min), loss(row.loss_max)]);
    return { traces, values, columns: ["step", "smoothed", "last", "least", "most"], shapes: this.marks(rows, xs),
      label: described("Train loss", rows, (row) => row.loss_ema, loss), now: loss(rows.at(-1)?.loss_ema) };
  }

  /** Evaluations, points that were not finite, and what a later attempt went over again. */
  extra(rows, xs, accent) {
    const evals = rows.flatMap((row, i) => (row.eval_loss === null || row.eval_loss === undefined ? [] : [[xs[i], row.eval_loss]]));
    const bad = rows.flatMap((row, i) => (row.nonfinite_count ? [[xs[i], row.loss_ema ?? rows.findLast((one, k) => k < i && one.loss_ema !== null)?.loss_ema ?? 0]] : []));
    const points = (uid, found, marker) => ({ uid, x: found.map(([x]) => x), y: found.map(([, y]) => y), mode: "markers", marker });
    const grey = "#7b8794";
    const old = [...this.old].map(([number, found]) => ({
      uid: `old-${number}`, x: places(found, this.board.axis, this.got.attempts), y: found.map((row) => row.loss), line: { width: 1, color: grey, dash: "dot" } }));
    return [points("eval", evals, { size: 7, symbol: "diamond", color: accent }), points("bad", bad, { size: 9, symbol: "x-thin", line: { width: 2, color: accent } }), ...old];
  }

  /** Thin rules: restarts, saves, alerts. */
  marks(rows, xs) {
    const at = (step) => {
      if (this.board.axis === "step") return step;
      const i = rows.findIndex((row) => row.step >= step);
      return i < 0 ? null : xs[i];
    };
    const rule = (step, color, dash, height = 1) => ({
      type: "line", xref: "x", yref: "paper", x0: at(step), x1: at(step), y0: 0, y1: height, layer: "below", line: { width: 1, color, dash } });
    const [soft, strong] = isDark() ? ["#5a6672", "#E69F00"] : ["#9aa5b1", "#D55E00"];
    const { attempts, checkpoints } = this.got;
    const found = [
      ...checkpoints.map((one) => rule(one.step, soft, "solid", 0.05)),
      ...attempts.slice(1).filter((one) => one.start_step !== null).map((one) => rule(one.start_step, soft, "dash")),
      ...(this.job?.alerts ?? []).filter((one) => one.step).map((one) => rule(one.step, strong, "dot")),
    ];
    const inside = (shape) => shape.x0 !== null && rows.length && (this.board.axis !== "step" || (shape.x0 >= rows[0].first_step - 1 && shape.x0 <= rows.at(-1).step));
    return found.filter(inside);
  }

  close() {
    this.gone = true;
    this.stale.stop();
    this.board.close();
  }
}

export function smallContent([name, fields, { write }], rows, xs, breaks, colours) {
  const pick = (field) => rows.map((row) => row[field] ?? null);
  const traces = fields.map(([field], i) => ({
    uid: field, ...line(xs, pick(field), breaks), line: { width: 1.5, color: colours[i], dash: i ? "dot" : "solid" }, main: i === 0, counted: true }));
  const values = rows.map((row) => [row.step.toLocaleString("en-US"), ...fields.map(([field]) => write(row[field]))]);
  const first = fields[0][0];
  const note = fields.length > 1 ? fields.map(([, words], i) => `${i ? "···" : "—"} ${words}`).join("   ") : "";
  return { traces, values, columns: ["step", ...fields.map(([, words]) => words)], note,
    label: described(name, rows, (row) => row[first], write), now: write(rows.at(-1)?.[first]) };
}
