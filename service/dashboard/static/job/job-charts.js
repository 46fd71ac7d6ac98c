// Charts of the job page: fetches metrics in buckets at most every 2 s, and finer ones for the zoomed range.
import { get, withQuery } from "../api.js";
import { chartControls, chartSettings } from "../chart-controls.js";
import { DARK_COLORS, LIGHT_COLORS, rowsAfterPause, stepRange, supersededRanges, xValues } from "../chart-data.js";
import { Chart, ChartGroup, loadLibrary } from "../charts.js";
import { h } from "../dom.js";
import { loss } from "../format.js";
import { throttle } from "../polling.js";
import { isDark } from "../theme.js";
import { eventLines, lossContent } from "./loss-chart.js";
import { SMALL_CHARTS, chartContent } from "./metric-charts.js";

const MAX_POINTS = 1000;
const BASE_FIELDS = ["learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_seconds", "eval_loss", "at"];

export class JobCharts {
  constructor(address) {
    this.address = address;
    this.group = new ChartGroup();
    ({ axis: this.group.axis, half: this.halfLife } = chartSettings("step"));
    this.group.onZoom = () => this.refetch();
    this.group.onTheme = () => this.data && this.draw();
    this.lossChart = new Chart("Train loss", { height: 300, format: loss });
    this.loss = this.group.add(this.lossChart);
    this.smallCharts = SMALL_CHARTS.map((one) => new Chart(one.name, { ...one, height: 150 }));
    this.small = h("div", { class: "small" }, this.smallCharts.map((chart) => this.group.add(chart)));
    this.bar = this.controls();
    this.superseded = new Map();
    this.scheduleRefetch = throttle(() => this.refetch());
    this.tab = null;
  }

  controls() {
    const axis = (chosen) => {
      this.group.axis = chosen;
      this.group.hover(null);
      this.group.setZoom(null);
    };
    const half = (chosen) => {
      this.halfLife = chosen;
      this.refetch();
    };
    const hint = h("span", { class: "muted" }, "Drag to zoom, double-click for the whole run");
    return chartControls({ axis: this.group.axis, half: this.halfLife }, "step", axis, half, hint);
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
    this.prefetched.catch(() => {});
  }

  async refetch() {
    const number = (this.requestNumber = (this.requestNumber ?? 0) + 1);
    const response = this.prefetched ?? this.fetch();
    this.prefetched = null;
    try {
      const { metrics, attempts, checkpoints, isWhole } = await response;
      if (number !== this.requestNumber || this.isClosed) return;
      this.data = { rows: metrics.data, resolution: metrics.resolution, attempts: attempts.data, checkpoints: checkpoints.data };
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
    const wanted = { max_points: MAX_POINTS, ema_half_life: this.halfLife, fields, after_step: from, until_step: to };
    const [metrics, attempts, checkpoints] = await Promise.all([
      get(withQuery(`${this.address}/metrics`, wanted)), get(`${this.address}/attempts`), get(`${this.address}/checkpoints`)]);
    return { metrics, attempts, checkpoints, isWhole: from === null };
  }

  async fetchSuperseded(attempts) {
    for (const [number, from, to] of supersededRanges(attempts)) {
      if (this.superseded.has(number)) continue;
      this.superseded.set(number, []);
      const found = await get(withQuery(`${this.address}/metrics`, { attempt: number, after_step: from, until_step: to, max_points: 500, fields: "tokens,at" }));
      this.superseded.set(number, found.data);
    }
  }

  draw() {
    const data = { ...this.data, alerts: this.alerts };
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
