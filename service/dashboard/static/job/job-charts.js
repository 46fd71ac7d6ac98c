// A job's curves: fetched in buckets, drawn at most every 2 s, fetched again where the user zooms in.
import { get, query } from "../api.js";
import { Board, Chart, library } from "../charts.js";
import { chosenView, controls } from "../chart-controls.js";
import { h } from "../dom.js";
import { loss } from "../format.js";
import { atMost } from "../polling.js";
import { DARK, LIGHT, gaps, places, stepsOf, superseded } from "../chart-data.js";
import { isDark } from "../theme.js";
import { SMALL, contentOf } from "./metric-charts.js";
import { lossContent, marks } from "./loss-chart.js";

const POINTS = 1000;
const ALWAYS = ["learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds", "eval_loss", "at"];

export class Curves {
  constructor(address) {
    this.address = address;
    this.board = new Board();
    ({ axis: this.board.axis, half: this.half } = chosenView("step"));
    this.board.onZoom = () => this.refetch();
    this.board.onTheme = () => this.got && this.draw();
    this.lossChart = new Chart("Train loss", { height: 300, write: loss });
    this.loss = this.board.add(this.lossChart);
    this.smallCharts = SMALL.map((one) => new Chart(one.name, { ...one, height: 150 }));
    this.small = h("div", { class: "small" }, this.smallCharts.map((chart) => this.board.add(chart)));
    this.bar = this.controls();
    this.old = new Map();
    this.stale = atMost(() => this.refetch());
    this.extra = null;
  }

  controls() {
    const axis = (chosen) => {
      this.board.axis = chosen;
      this.board.hover(null);
      this.board.setZoom(null);
    };
    const half = (chosen) => {
      this.half = chosen;
      this.refetch();
    };
    const hint = h("span", { class: "muted" }, "Drag to zoom, double-click for the whole run");
    return controls({ axis: this.board.axis, half: this.half }, "step", axis, half, hint);
  }

  /** `{fields, draw(view)}` of a tab that shows more of the same rows; null where there is none. */
  join(extra) {
    this.extra = extra;
    // What was asked for before the tab was known has not all of its fields.
    if (extra) this.ahead = null;
    if (extra && this.got) this.refetch();
  }

  /** Called with every look at the job: asks for points only where something may have changed. */
  async update(job) {
    const mark = `${job.progress.step} ${job.attempt} ${job.status} ${job.checkpoint?.step} ${job.alerts.length}`;
    this.alerts = job.alerts;
    if (mark === this.mark) return;
    const isFirst = this.mark === undefined;
    this.mark = mark;
    // The text is painted first; the library is read while the points come.
    if (isFirst) requestAnimationFrame(() => setTimeout(() => library().catch(() => {})));
    if (isFirst) await this.refetch();
    else this.stale();
  }

  /** Asks before the job itself is known: the curve comes beside it, not behind it. */
  begin() {
    this.ahead = this.fetch();
    this.ahead.catch(() => {});
  }

  async refetch() {
    const number = (this.asked = (this.asked ?? 0) + 1);
    const asked = this.ahead ?? this.fetch();
    this.ahead = null;
    try {
      const { metrics, attempts, checkpoints, isWhole } = await asked;
      if (number !== this.asked || this.gone) return;
      this.got = { rows: metrics.data, resolution: metrics.resolution, attempts: attempts.data, checkpoints: checkpoints.data };
      if (isWhole) this.whole = metrics.data;
      await this.fetchOld(attempts.data);
      this.draw();
    } catch (error) {
      // The next look asks once more.
      this.mark = null;
      if (error.name === "TypeError") throw error;
    }
  }

  async fetch() {
    const [from, to] = stepsOf(this.board.zoom, this.board.axis, this.whole, this.got?.attempts);
    const fields = [...new Set([...ALWAYS, ...(this.extra?.fields ?? [])])].join(",");
    const wanted = { max_points: POINTS, ema_half_life: this.half, fields, after_step: from, until_step: to };
    const [metrics, attempts, checkpoints] = await Promise.all([
      get(query(`${this.address}/metrics`, wanted)), get(`${this.address}/attempts`), get(`${this.address}/checkpoints`)]);
    return { metrics, attempts, checkpoints, isWhole: from === null };
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
    const got = { ...this.got, alerts: this.alerts };
    const { rows, attempts } = got;
    const { axis } = this.board;
    const view = { rows, axis, xs: places(rows, axis, attempts), breaks: gaps(rows, axis, attempts), colours: isDark() ? DARK : LIGHT };
    view.shapes = marks(view, { ...got, checkpoints: [] });
    this.lossChart.show(lossContent(view, got, this.old));
    this.smallCharts.forEach((chart, i) => chart.show(contentOf(SMALL[i], view)));
    this.extra?.draw(view);
    this.board.redraw().catch((error) => console.warn(error));
  }

  close() {
    this.gone = true;
    this.stale.stop();
    this.board.close();
  }
}
