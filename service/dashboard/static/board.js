// All charts of a page: one x axis and one zoom for all, hover in step.
import { count, short } from "./format.js";
import { mark } from "./marks.js";
import { keep, kept } from "./router.js";
import { moment } from "./series.js";
import { changed } from "./theme.js";

export class Board {
  constructor() {
    this.charts = new Set();
    this.axis = "step";
    this.zoom = readZoom();
    this.onZoom = () => {};
    this.onTheme = () => this.redraw();
    this.recolour = () => this.onTheme();
    changed.addEventListener("change", this.recolour);
  }

  add(chart) {
    chart.board = this;
    this.charts.add(chart);
    return chart.node;
  }

  remove(chart) {
    this.charts.delete(chart);
    chart.close();
  }

  /** One after the other in the order of the page; each that is new is seen before the next is made. */
  async redraw() {
    const number = (this.drawing = (this.drawing ?? 0) + 1);
    for (const chart of this.charts) {
      if (number !== this.drawing) return;
      const isNew = !chart.started;
      await chart.draw();
      if (chart.started) mark("curve");
      if (isNew && chart.started) await painted();
    }
  }

  /** [from, to] on the x axis, or null for all; kept in the address. */
  setZoom(zoom, from = null) {
    this.zoom = zoom;
    keep("zoom", zoom ? zoom.map((value) => (typeof value === "number" ? +value.toPrecision(8) : value)).join("..") : null);
    for (const chart of this.charts) if (chart !== from) chart.applyZoom();
    this.onZoom();
  }

  /** The pointer is at x in one of them, or in none. */
  hover(x) {
    for (const chart of this.charts) chart.point(x);
  }

  /** x for people. */
  place(x) {
    if (this.axis === "clock") return new Date(moment(x)).toLocaleTimeString();
    if (this.axis === "active") return `${x.toFixed(2)} h`;
    return this.axis === "tokens" ? `${short(x)} tokens` : `step ${count(x)}`;
  }

  close() {
    changed.removeEventListener("change", this.recolour);
    for (const chart of this.charts) chart.close();
  }
}

/** Once what was drawn is on the screen; a hidden tab has no frames. */
const painted = () => new Promise((done) => {
  requestAnimationFrame(() => setTimeout(done));
  setTimeout(done, 100);
});

function readZoom() {
  const parts = (kept("zoom") ?? "").split("..");
  if (parts.length !== 2 || parts.some((part) => part === "")) return null;
  return parts.every((part) => Number.isFinite(Number(part))) ? parts.map(Number) : parts;
}
