// Charts by plotly: only `react`, so that a zoom survives every update. The library is loaded at the first chart.
import { attr, h, list, text } from "./dom.js";
import { keep, kept } from "./router.js";
import { unshown } from "./series.js";
import { changed, isDark } from "./theme.js";

const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };
let loading = null;

/** The library, once. Its address stands in the page's head, so that it is asked for after text and tables are there. */
export function library() {
  loading ??= new Promise((done, failed) => {
    const address = document.querySelector("meta[name=charts]").content;
    const script = h("script", { src: address, onload: () => done(window.Plotly), onerror: () => ((loading = null), failed(new Error("charts"))) });
    document.head.append(script);
  });
  return loading;
}

/** All charts of a page: one x axis and one zoom for all, hover in step. */
export class Board {
  constructor() {
    this.charts = [];
    this.axis = "step";
    this.zoom = readZoom();
    this.onZoom = () => {};
    this.onTheme = () => this.redraw();
    this.recolour = () => this.onTheme();
    changed.addEventListener("change", this.recolour);
  }

  add(chart) {
    chart.board = this;
    this.charts.push(chart);
    return chart.node;
  }

  redraw() {
    return Promise.all(this.charts.map((chart) => chart.draw()));
  }

  /** [from, to] on the x axis, or null for all. */
  setZoom(zoom, from = null) {
    this.zoom = zoom;
    keep("zoom", zoom ? zoom.map((value) => (typeof value === "number" ? +value.toPrecision(8) : value)).join("..") : null);
    for (const chart of this.charts) if (chart !== from) chart.applyZoom();
    this.onZoom();
  }

  hover(x, from) {
    for (const chart of this.charts) if (chart !== from) chart.point(x);
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

export class Chart {
  /** `log` is how the y axis begins; `height` in px. */
  constructor(name, { log = false, height = 190, write = String } = {}) {
    this.name = name;
    this.log = log;
    this.height = height;
    this.write = write;
    this.content = null;
    this.plot = h("div", { class: "plot" });
    this.plot.style.height = `${height}px`;
    this.note = h("span", { class: "muted" });
    this.now = h("strong", { class: "now" });
    this.switch = h("button", { type: "button", class: "quiet", "aria-pressed": String(log), onclick: () => this.turn() }, "log");
    this.data = h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => this.toggleData() }, "data");
    this.reset = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.board.setZoom(null) }, "whole run");
    this.rows = h("div", { class: "scroll values", hidden: true, tabindex: "0" });
    const head = h("figcaption", {}, h("span", { class: "title" }, name), this.now, h("span", { class: "tools" }, this.reset, this.switch, this.data));
    this.node = h("figure", { class: "chart", role: "group", "aria-label": `${name}, no point yet` }, head, this.plot, this.note, this.rows);
  }

  /** `{traces, shapes, label, now, note, columns}`; drawn with the next `draw`. */
  show(content) {
    this.content = content;
  }

  async draw() {
    if (!this.content) return;
    const { traces, shapes = [], label, now = "", note = "" } = this.content;
    attr(this.node, "aria-label", label);
    text(this.now, now);
    const lost = this.log ? unshown(traces.filter((one) => one.counted).flatMap((one) => one.y)) : 0;
    text(this.note, [note, lost ? `${lost} not shown on a log axis` : ""].filter(Boolean).join(" · "));
    this.reset.hidden = !this.board.zoom;
    if (!this.rows.hidden) this.fillData();
    const Plotly = await library();
    if (this.gone) return;
    const drawn = traces.map(({ counted: _, ...trace }) => ({ type: "scatter", mode: "lines", hoverinfo: "none", ...trace }));
    await Plotly.react(this.plot, drawn, this.layout(shapes), this.started ? undefined : CONFIG);
    if (!this.started) this.listen();
    this.applyZoom();
  }

  layout(shapes) {
    const dark = isDark();
    const [ink, grid] = dark ? ["#a3adb8", "#2a3138"] : ["#52606d", "#e6e9ed"];
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { size: 11 }, automargin: false };
    const date = this.board.axis === "clock";
    return {
      uirevision: this.board.axis, autosize: true, height: this.height, margin: { l: 52, r: 12, t: 6, b: 26 }, showlegend: false, dragmode: "zoom",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 11, color: ink },
      hovermode: "x", hoverdistance: -1, shapes, separators: ".,",
      xaxis: { ...axis, autorange: true, type: date ? "date" : "linear", nticks: 6, ...(date ? {} : { tickformat: "~s", rangemode: "normal" }) },
      yaxis: { ...axis, autorange: true, type: this.log ? "log" : "linear", nticks: 5, fixedrange: false, tickformat: this.log ? "~g" : "~r" },
    };
  }

  listen() {
    this.started = true;
    this.plot.on("plotly_relayout", (change) => {
      if (this.moving) return;
      const from = change["xaxis.range[0]"];
      if (from !== undefined) this.board.setZoom([from, change["xaxis.range[1]"]], this);
      else if (change["xaxis.autorange"]) this.board.setZoom(null, this);
    });
    this.plot.on("plotly_doubleclick", () => this.board.setZoom(null));
    this.plot.on("plotly_hover", (event) => this.say(event));
    this.plot.on("plotly_unhover", () => this.plot.dispatchEvent(new Event("quiet")));
  }

  say(event) {
    const point = event.points?.[0];
    if (!point || this.pointing) return;
    this.board.hover(point.x, this);
    this.tell(point.x);
  }

  /** A rule at x, drawn in every chart, and the value beside the name. */
  point(x) {
    this.tell(x);
  }

  tell(x) {
    const main = this.content?.traces.find((one) => one.main);
    const at = main ? nearest(main.x, x) : -1;
    if (at < 0) return;
    text(this.now, this.write(main.y[at]));
    attr(this.now, "title", `at ${main.x[at]}`);
    clearTimeout(this.back);
    this.back = setTimeout(() => (text(this.now, this.content.now ?? ""), attr(this.now, "title", null)), 2500);
  }

  async applyZoom() {
    if (!this.started || this.gone) return;
    const { zoom } = this.board;
    this.reset.hidden = !zoom;
    const shown = this.plot.layout?.xaxis;
    const same = zoom ? shown && !shown.autorange && zoom.every((value, i) => value === shown.range[i]) : shown?.autorange;
    if (same) return;
    this.moving = true;
    const change = zoom ? { "xaxis.range": [...zoom], "xaxis.autorange": false } : { "xaxis.autorange": true, "yaxis.autorange": true };
    await window.Plotly.relayout(this.plot, change);
    this.moving = false;
  }

  turn() {
    this.log = !this.log;
    attr(this.switch, "aria-pressed", String(this.log));
    this.draw();
  }

  toggleData() {
    this.rows.hidden = !this.rows.hidden;
    attr(this.data, "aria-expanded", String(!this.rows.hidden));
    if (!this.rows.hidden) this.fillData();
  }

  /** The newest values as a table. */
  fillData() {
    const { columns = [], values = [] } = this.content ?? {};
    if (!this.body) {
      this.body = h("tbody");
      const head = h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col", class: "num" }, name))));
      this.rows.append(h("table", {}, h("caption", { class: "unseen" }, `${this.name}, newest first`), head, this.body));
      attr(this.rows, "aria-label", `${this.name} as a table`);
      attr(this.rows, "role", "region");
    }
    const newest = values.slice(-200).reverse();
    list(this.body, newest, (row) => row[0], (row) => h("tr", {}, row.map(() => h("td", { class: "num" }))), (part, row) => row.forEach((value, i) => text(part.children[i], value)));
  }

  close() {
    this.gone = true;
    clearTimeout(this.back);
    if (this.started) window.Plotly.purge(this.plot);
  }
}

function nearest(xs, x) {
  const wanted = typeof x === "string" ? Date.parse(x.replace(" ", "T")) : x;
  const value = (one) => (typeof one === "string" ? Date.parse(one) : one);
  let best = -1;
  xs.forEach((one, i) => {
    if (one !== null && (best < 0 || Math.abs(value(one) - wanted) < Math.abs(value(xs[best]) - wanted))) best = i;
  });
  return best;
}
