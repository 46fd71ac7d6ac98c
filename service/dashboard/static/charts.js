// Charts by plotly: only `react`, so that a zoom survives every update. The library is loaded at the first chart.
import { attr, h, list, mark, show, text } from "./dom.js";
import { count, short } from "./format.js";
import { endLabels } from "./line-labels.js";
import { keep, kept } from "./router.js";
import { headroom, logTicks, moment, unshown } from "./chart-data.js";
import { changed, isDark } from "./theme.js";

const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };
const TICK = 70; // px that a number below the x axis needs
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

/** Says which charts are seen, or nearly: the others are drawn when they are. */
const eyes = new IntersectionObserver((found) => {
  for (const { target, isIntersecting, boundingClientRect } of found) {
    target.chart.width = boundingClientRect.width;
    target.chart.seen(isIntersecting);
  }
}, { rootMargin: "300px" });

export class Chart {
  /** `log` is how the y axis begins; `height` in px; `ticks` how plotly writes them. */
  constructor(name, { log = false, height = 190, write = String, ticks = null } = {}) {
    this.ticks = ticks;
    this.name = name;
    this.log = log;
    this.height = height;
    this.write = write;
    this.content = null;
    this.plot = h("div", { class: "plot" });
    this.rule = h("div", { class: "rule", hidden: true });
    this.box = h("div", { class: "plotbox" }, this.plot, this.rule);
    this.plot.style.height = `${height}px`;
    this.note = h("span", { class: "muted" });
    this.now = h("strong", { class: "now" });
    this.switch = h("button", { type: "button", class: "quiet", "aria-pressed": String(log), onclick: () => this.turn() }, "log");
    this.data = h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => this.toggleData() }, "data");
    this.reset = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.board.setZoom(null) }, "whole run");
    this.rows = h("div", { class: "scroll values", hidden: true, tabindex: "0" });
    const head = h("figcaption", {}, h("span", { class: "title" }, name), this.now, h("span", { class: "tools" }, this.reset, this.switch, this.data));
    this.node = h("figure", { class: "chart", role: "group", "aria-label": `${name}, no point yet` }, head, this.box, this.note, this.rows);
    this.node.chart = this;
    this.isSeen = false;
    this.width = 400;
    eyes.observe(this.node);
  }

  seen(wanted) {
    this.isSeen = wanted;
    if (wanted && this.isStale) this.draw().catch((error) => console.warn(error));
  }

  /** `{traces, shapes, label, now, note, columns}`; drawn with the next `draw`. */
  show(content) {
    this.content = content;
  }

  /** The words at once; the picture now if it is seen, else when it will be. */
  async draw() {
    if (!this.content) return;
    const { traces, label } = this.content;
    const isEmpty = !traces.some((one) => one.y.some(Number.isFinite));
    attr(this.node, "aria-label", label);
    this.tell(this.at ?? null);
    text(this.note, this.words(isEmpty));
    show(this.box, !isEmpty);
    show(this.reset, this.board.zoom);
    if (!this.rows.hidden) this.fillData();
    this.isStale = !this.isSeen;
    if (this.isStale || isEmpty) return;
    if (!this.started) text(this.note, "Drawing…");
    const Plotly = await library().catch((error) => {
      text(this.note, "The chart library did not come; the values are under “data”.");
      throw error;
    });
    if (this.gone) return;
    text(this.note, this.words(false));
    const ends = endLabels(traces, { isLog: this.log, height: this.height, width: this.width, ink: inks()[0], ground: inks()[2], zoom: this.board.zoom });
    const drawn = traces.filter((one) => one.x.length).map(({ counted: _, main: __, end: ___, ...trace }) => ({ type: "scatter", mode: modeOf(trace), hoverinfo: "none", ...trace, y: this.log ? trace.y.map(positive) : trace.y }));
    await Plotly.react(this.plot, drawn, this.layout(ends), this.started ? undefined : CONFIG);
    if (!this.started) this.listen();
    await this.applyZoom();
    this.putRule();
  }

  words(isEmpty) {
    const { traces, note = "" } = this.content;
    const values = (one) => (one.counted === true ? one.y : one.counted);
    const lost = this.log ? traces.filter((one) => one.counted).reduce((sum, one) => sum + unshown(values(one)), 0) : 0;
    const none = this.content.values?.length ? "Not reported by this run so far" : "No point yet";
    const empty = isEmpty ? none : "";
    return [empty || note, lost ? `${lost} not shown on a log axis` : ""].filter(Boolean).join(" · ");
  }

  layout({ room, annotations }) {
    const [ink, grid] = inks();
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { size: 11 }, automargin: false };
    const date = this.board.axis === "clock";
    return {
      uirevision: this.board.axis, autosize: true, height: this.height, margin: { l: 52, r: room, t: 6, b: 26 }, showlegend: false, dragmode: "zoom",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 11, color: ink },
      hovermode: "x", hoverdistance: -1, shapes: this.content.shapes ?? [], annotations, separators: ".,",
      xaxis: { ...axis, autorange: true, type: date ? "date" : "linear", nticks: Math.min(10, Math.max(4, Math.floor(this.width / TICK))), ...(date ? {} : { tickformat: "~s", rangemode: "normal" }) },
      yaxis: { ...axis, ...(this.log ? logTicks(this.content.traces) : { autorangeoptions: headroom(this.content.traces) }), autorange: true, type: this.log ? "log" : "linear", nticks: 5, fixedrange: false, tickformat: this.ticks ?? (this.log ? "~g" : "~r") },
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
    this.plot.on("plotly_hover", (event) => event.points?.[0] && this.board.hover(this.near(event.points[0].x)));
    // Not plotly's own unhover: it comes with every update too, and what is read under a resting pointer would go.
    this.plot.addEventListener("pointerleave", () => this.board.hover(null));
  }

  /** The place of the main line that is nearest to x. */
  near(x) {
    const main = this.content.traces.find((one) => one.main);
    const at = main ? nearest(main, x) : -1;
    return at < 0 ? x : main.x[at];
  }

  /** The pointer is at x, here or in another chart: a rule there, and the values beside the name. */
  point(x) {
    this.at = x;
    this.tell(x);
    this.putRule();
  }

  tell(x) {
    if (!this.content) return;
    const told = x === null ? [] : this.content.traces.filter((one) => one.main || one.end);
    const values = told.map((one) => [one.y[nearest(one, x)], one.end]).filter(([y]) => Number.isFinite(y));
    const words = values.map(([y, name]) => (name && told.length > 1 ? `${name} ${this.write(y)}` : this.write(y))).join("   ");
    text(this.now, words ? `${words} at ${this.board.place(x)}` : (this.content.now ?? ""));
  }

  putRule() {
    const { xaxis } = this.plot._fullLayout ?? {};
    const place = this.at !== null && this.at !== undefined && xaxis ? xaxis.d2p(this.at) : NaN;
    const inside = place >= 0 && place <= xaxis._length;
    show(this.rule, inside);
    if (inside) this.rule.style.left = `${Math.round(xaxis._offset + place)}px`;
  }

  async applyZoom() {
    show(this.reset, this.board.zoom);
    if (!this.started || this.gone) return;
    if (!this.isSeen) {
      this.isStale = true;
      return;
    }
    const { zoom } = this.board;
    const shown = this.plot.layout?.xaxis;
    const same = zoom ? shown && !shown.autorange && zoom.every((value, i) => value === shown.range[i]) : shown?.autorange;
    if (same) return;
    this.moving = true;
    const change = zoom ? { "xaxis.range": [...zoom], "xaxis.autorange": false } : { "xaxis.autorange": true, "yaxis.autorange": true };
    await window.Plotly.relayout(this.plot, change);
    this.moving = false;
    this.putRule();
  }

  turn() {
    this.log = !this.log;
    attr(this.switch, "aria-pressed", String(this.log));
    this.draw().catch((error) => console.warn(error));
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
    eyes.unobserve(this.node);
    if (this.started) window.Plotly.purge(this.plot);
  }
}

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

/** Of words, of the grid, and of what lies under words that stand among lines. */
const inks = () => (isDark() ? ["#a3adb8", "#2a3138", "rgba(17,20,24,.8)"] : ["#52606d", "#e6e9ed", "rgba(255,255,255,.8)"]);

/** What a log axis can show: of a zero plotly would draw a fall out of the picture. */
const positive = (y) => (y > 0 ? y : null);

/** A line of one point is a point. */
const modeOf = ({ y }) => (y.filter(Number.isFinite).length > 1 ? "lines" : "lines+markers");

/** The index of the value that is nearest to x; -1 where there is none. */
function nearest({ x: xs, y: ys }, x) {
  const wanted = moment(x);
  let best = -1;
  let least = Infinity;
  xs.forEach((one, i) => {
    if (one === null || !Number.isFinite(ys[i])) return;
    const apart = Math.abs(moment(one) - wanted);
    if (apart < least) [best, least] = [i, apart];
  });
  return best;
}
