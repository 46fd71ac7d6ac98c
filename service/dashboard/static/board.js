// All charts of a page: one x axis and one zoom for all, hover in step.
import { count, short } from "./format.js";
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

  redraw() {
    return Promise.all([...this.charts].map((chart) => chart.draw()));
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

function readZoom() {
  const parts = (kept("zoom") ?? "").split("..");
  if (parts.length !== 2 || parts.some((part) => part === "")) return null;
  return parts.every((part) => Number.isFinite(Number(part))) ? parts.map(Number) : parts;
}
