// Draws charts with plotly. `Plotly.react` is used for every update, because it keeps the zoom. The library is loaded with the first chart.
import { AXES, DEFAULT_SMOOTHING, SMOOTHINGS, cliffTop, countNotShown, logTicks, toNumber, yRangeOptions } from "./chart-data.js";
import { saveChart } from "./chart-export.js";
import { announce, h, markPaint, setAttr, setText, setVisible, updateList } from "./dom.js";
import { compactNumber, count } from "./format.js";
import { locale, t, tn } from "./i18n.js";
import { LevelRule } from "./level-rule.js";
import { Menu } from "./menu.js";
import { getParam, setParam } from "./router.js";
import { isDark, themeChange } from "./theme.js";

// Labels at the ends of up to five lines, in place of a legend. Pure.

const MAX_LABELS = 5;
const LABEL_LIFT = 9; // px above the end of a line that ends among others
const MIN_DISTANCE = 13; // px between two labels
const LETTER_WIDTH = 6.2; // px, approximate
const LEFT_MARGIN = 52; // px
const EDGE_FRACTION = 0.02; // of the width: a line that ends this near to the right edge has its label in the margin

/** Returns `{room, annotations}`: the right margin in px, and plotly's annotations. `zoom`: [from, to] on the x axis or null; `width` in px. */
function endLabels(traces, { isLog, height, width, ink, ground, zoom, top }) {
  const shown = ({ x, y }, i) => Number.isFinite(y[i]) && (!isLog || y[i] > 0) && x[i] !== null && (!zoom || (toNumber(x[i]) >= toNumber(zoom[0]) && toNumber(x[i]) <= toNumber(zoom[1])));
  const ends = traces.filter((trace) => trace.end).flatMap((trace) => {
    const i = trace.y.findLastIndex((_, at) => shown(trace, at));
    return i < 0 ? [] : [{ name: truncate(trace.end), x: trace.x[i], y: trace.y[i], continues: i < trace.y.findLastIndex(Number.isFinite) }];
  });
  if (ends.length < 2 || ends.length > MAX_LABELS) return { room: 12, annotations: [] };
  const value = (y) => (isLog ? Math.log10(y) : y);
  const points = traces.flatMap((trace) => trace.y.flatMap((y, i) => (shown(trace, i) ? [[toNumber(trace.x[i]), value(y)]] : [])));
  const [left, right] = zoom ? zoom.map(toNumber) : extent(points.map(([x]) => x));
  const [low, high] = extent(points.map(([, y]) => (isLog ? y : Math.min(y, top))));
  const isAtEdge = (end) => end.continues || toNumber(end.x) >= right - EDGE_FRACTION * (right - left);
  const room = 12 + Math.min(120, Math.max(0, ...ends.filter(isAtEdge).map((end) => end.name.length)) * LETTER_WIDTH);
  const wide = (width - LEFT_MARGIN - room) / (right - left || 1);
  const tall = (height - 32) / (high - low || 1);
  const placed = avoidOverlaps(ends.map((end) => ({ ...end, atEdge: isAtEdge(end), from: isAtEdge(end) ? width : (toNumber(end.x) - left) * wide, up: (value(end.y) - low) * tall + (isAtEdge(end) ? 0 : LABEL_LIFT), at: (value(end.y) - low) * tall })));
  const annotations = placed.map(({ name, x, y, atEdge, shift }) => ({
    ...(atEdge ? { xref: "paper", x: 1 } : { xref: "x", x, bgcolor: ground, borderpad: 0 }), xanchor: "left", xshift: 3, yref: "y", y: value(y), yshift: shift,
    showarrow: false, text: escapeHtml(name), font: { size: 11, color: ink } }));
  return { room, annotations };
}

const extent = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

/** Moves labels up until none overlaps another. */
function avoidOverlaps(ends) {
  const placed = [];
  for (const end of [...ends].sort((a, b) => a.up - b.up)) {
    let { up } = end;
    const neighbors = placed.filter((other) => end.from < other.from + other.name.length * LETTER_WIDTH && other.from < end.from + end.name.length * LETTER_WIDTH);
    for (const other of neighbors.sort((a, b) => a.up - b.up)) if (up < other.up + MIN_DISTANCE && up > other.up - MIN_DISTANCE) up = other.up + MIN_DISTANCE;
    placed.push({ ...end, up, shift: up - end.at });
  }
  return placed;
}

const truncate = (name) => (name.length > 18 ? `${name.slice(0, 17)}…` : name);

/** Plotly interprets some HTML tags in texts, and job names are user input. */
const escapeHtml = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const CONFIG = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false };
const FRAME_MS = 8; // of work after which the browser may paint
const PIXELS_PER_TICK = 70; // px that one number below the x axis needs
let libraryPromise = null;

const libraryAddress = () => document.querySelector("meta[name=charts]").content;

/** Starts the download of plotly without running it, which would delay the first text. */
export function preloadLibrary() {
  if (!libraryPromise && libraryAddress()) document.head.append(h("link", { rel: "preload", as: "script", href: libraryAddress(), fetchpriority: "low" }));
}

/** Loads plotly once. Its URL is in a meta tag, not a script tag, so it does not delay text and tables. */
export function loadLibrary() {
  libraryPromise ??= new Promise((done, failed) => {
    const address = libraryAddress();
    const script = h("script", { src: address, onload: () => done(window.Plotly), onerror: () => ((libraryPromise = null), failed(new Error("charts"))) });
    document.head.append(script);
  });
  return libraryPromise;
}

/** Only charts in or near the viewport are drawn. */
const visibility = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting, boundingClientRect } of entries) {
    target.chart.width = boundingClientRect.width;
    target.chart.onVisibility(isIntersecting);
  }
}, { rootMargin: "300px" });

export class Chart {
  /** `log`: whether the y axis starts as logarithmic; `height` in px; `format` writes a value; `ticks`: plotly's tick format. */
  constructor(name, { log = false, height = 190, format = String, ticks = null } = {}) {
    this.ticks = ticks;
    this.name = name;
    this.log = log;
    this.height = height;
    this.format = format;
    this.content = null;
    this.plot = h("div", { class: "plot" });
    this.crosshair = h("div", { class: "crosshair", hidden: true });
    this.box = h("div", { class: "plotbox" }, this.plot, this.crosshair);
    this.plot.style.height = `${height}px`;
    this.note = h("span", { class: "muted" });
    this.now = h("strong", { class: "readout" });
    this.logButton = h("button", { type: "button", class: "quiet", "aria-pressed": String(log), onclick: () => this.toggleLog() }, t("log"));
    this.dataButton = h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => this.toggleData() }, t("data"));
    this.cliffButton = h("button", { type: "button", class: "quiet", "aria-pressed": "false", hidden: true, title: t("Show the first steps too"), onclick: () => this.toggleCliff() }, t("full range"));
    this.rule = new LevelRule(this);
    this.menu = new Menu("⋯", (at) => this.menuActions(at), { name: t("Save {chart}", { chart: name }), quiet: true });
    this.box.addEventListener("contextmenu", (event) => this.onContextMenu(event));
    this.box.append(this.rule.node);
    this.resetButton = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.group.setZoom(null) }, t("whole run"));
    this.tableBox = h("div", { class: "scroll values", hidden: true, tabindex: "0" });
    const head = h("figcaption", {}, h("span", { class: "title" }, name), this.now, h("span", { class: "tools" }, this.resetButton, this.cliffButton, this.rule.button, this.logButton, this.dataButton, this.menu.node));
    this.node = h("figure", { class: "chart", role: "group", "aria-label": t("{name}, no data yet", { name }) }, head, this.box, this.note, this.rule.table, this.tableBox);
    setVisible(this.rule.button, false);
    this.node.chart = this;
    this.isVisible = false;
    this.width = 400;
    visibility.observe(this.node);
  }

  onVisibility(wanted) {
    this.isVisible = wanted;
    if (wanted && this.isStale) this.draw().catch((error) => console.warn(error));
  }

  /**
   * Sets `{traces, shapes, label, now, note, columns, values, runs}`, which the next `draw` uses. Besides plotly's attributes a trace has `main` (its points are those of the
   * crosshair), `end` (label at its end), `label` (column of the CSV), `counted` (values that a log axis may not show) and `falls` (its first steps may be left out of the y range).
   * `runs`: see LevelRule. `values()` returns the rows of the table.
   */
  show(content) {
    this.content = content;
  }

  /** Whether there is no point to draw. */
  get isEmpty() {
    return Boolean(this.content) && !this.content.traces.some((trace) => trace.y.some(Number.isFinite));
  }

  /** Updates the texts now, and the plot now if it is visible, otherwise when it becomes visible. */
  async draw() {
    if (!this.content) return;
    const { traces, label } = this.content;
    const { isEmpty } = this;
    setAttr(this.node, "aria-label", label);
    // Who zooms has chosen what to see, and a log axis has room for the first steps.
    this.cliff = this.log || this.group.zoom ? null : cliffTop(traces);
    setVisible(this.cliffButton, this.cliff);
    this.updateReadout(this.at ?? null);
    setText(this.note, this.noteText(isEmpty));
    setVisible(this.box, !isEmpty);
    setVisible(this.resetButton, this.group.zoom);
    if (!this.tableBox.hidden) this.fillData();
    this.isStale = !this.isVisible;
    if (this.isStale || isEmpty) return;
    if (!this.started) setText(this.note, t("Drawing…"));
    const Plotly = await loadLibrary().catch((error) => {
      setText(this.note, t("The chart library could not be loaded. The values are under “data”."));
      throw error;
    });
    if (this.isClosed) return;
    setText(this.note, this.noteText(false));
    const [ink, , ground] = themeColors();
    const ends = endLabels(traces, { isLog: this.log, height: this.height, width: this.width, ink, ground, zoom: this.group.zoom, top: this.cliff && !this.showsCliff ? this.cliff.top : Infinity });
    const drawn = traces.filter((trace) => trace.x.length).map(({ counted: _, main: __, end: ___, label: ____, falls: _____, ...trace }) => ({ type: "scatter", mode: traceMode(trace), hoverinfo: "none", ...trace, y: this.log ? trace.y.map(onlyPositive) : trace.y }));
    await Plotly.react(this.plot, drawn, this.layout(ends), this.started ? undefined : CONFIG);
    if (!this.started) this.addListeners();
    markPaint("curve");
    await this.applyZoom();
    this.updateCrosshair();
    this.rule.update();
  }

  noteText(isEmpty) {
    const { traces, note = "" } = this.content;
    const values = (trace) => (trace.counted === true ? trace.y : trace.counted);
    const notShown = this.log ? traces.filter((trace) => trace.counted).reduce((sum, trace) => sum + countNotShown(values(trace)), 0) : 0;
    const empty = !isEmpty ? "" : this.content.values?.().length ? t("Not reported by this run") : t("No data yet");
    const above = this.cliff && !this.showsCliff ? tn(this.cliff.points, "first {n} point above, up to {top}", "first {n} points above, up to {top}", { n: count(this.cliff.points), top: this.format(this.cliff.full) }) : "";
    return [empty || note, above, notShown ? t("{n} not shown on a log axis", { n: notShown }) : ""].filter(Boolean).join(" · ");
  }

  layout({ room, annotations }) {
    const [ink, grid] = themeColors();
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { size: 11 }, automargin: false };
    const date = this.group.axis === "clock";
    return {
      uirevision: this.group.axis, autosize: true, height: this.height, margin: { l: 52, r: room, t: 6, b: 26 }, showlegend: false, dragmode: "zoom",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 11, color: ink },
      hovermode: "x", hoverdistance: -1, shapes: this.content.shapes ?? [], annotations, separators: ".,",
      xaxis: { ...axis, autorange: true, type: date ? "date" : "linear", nticks: Math.min(10, Math.max(4, Math.floor(this.width / PIXELS_PER_TICK))), ...(date ? {} : { tickformat: "~s", rangemode: "normal" }) },
      yaxis: { ...axis, ...(this.log ? logTicks(this.content.traces) : { autorangeoptions: this.yOptions() }), autorange: true, type: this.log ? "log" : "linear", nticks: 5, fixedrange: false, tickformat: this.ticks ?? (this.log ? "~g" : "~r") },
    };
  }

  yOptions() {
    const { cliff, content } = this;
    return cliff && !this.showsCliff ? { clipmax: cliff.top + HEADROOM * Math.abs(cliff.top - lowest(content.traces)) } : yRangeOptions(content.traces);
  }

  titleText() {
    return [this.name, this.content.now ?? ""].filter(Boolean).join("   ");
  }

  onContextMenu(event) {
    event.preventDefault();
    this.menu.open({ x: event.clientX, y: event.clientY });
  }

  /** `at`: where the menu was opened in the window, or null. A page can set `extraActions(x)`, which returns more items for a place on the x axis. */
  menuActions(at) {
    const { xaxis } = this.plot._fullLayout ?? {};
    const x = at && xaxis ? xaxis.p2d(at.x - this.plot.getBoundingClientRect().left - xaxis._offset) : null;
    const save = (label, kind, why = null) => ({ label, why, press: () => saveChart(this, kind).catch((error) => announce(t("{name} was not saved: {reason}", { name: this.name, reason: error.message }))) });
    const isDrawn = this.started ? null : t("the chart is not drawn");
    return [save(t("Save as PNG"), "png", isDrawn), save(t("Save as SVG"), "svg", isDrawn), save(t("Save the values as CSV"), "csv", this.content ? null : t("there are no values yet")), ...(this.extraActions?.(x) ?? [])];
  }

  addListeners() {
    this.started = true;
    this.plot.on("plotly_relayout", (change) => {
      if (this.isRelayouting) return;
      const from = change["xaxis.range[0]"];
      if (from !== undefined) this.group.setZoom([from, change["xaxis.range[1]"]], this);
      else if (change["xaxis.autorange"]) this.group.setZoom(null, this);
    });
    // After each drawing and each change of the window's width.
    this.plot.on("plotly_afterplot", () => this.rule.update());
    this.plot.on("plotly_doubleclick", () => this.group.setZoom(null));
    this.plot.on("plotly_hover", (event) => event.points?.[0] && this.group.hover(this.nearestX(event.points[0].x)));
    // Not plotly's unhover event: it also fires on every update, and would clear the values under a pointer that does not move.
    this.plot.addEventListener("pointerleave", () => this.group.hover(null));
  }

  /** Returns the x value of the main line that is nearest to x. */
  nearestX(x) {
    const main = this.content.traces.find((trace) => trace.main);
    const at = main ? nearestIndex(main, x) : -1;
    return at < 0 ? x : main.x[at];
  }

  /** Shows a crosshair at x and the values there. The pointer may be over another chart. null hides it. */
  hoverAt(x) {
    this.at = x;
    this.updateReadout(x);
    this.updateCrosshair();
  }

  updateReadout(x) {
    if (!this.content) return;
    const lines = x === null ? [] : this.content.traces.filter((trace) => trace.main || trace.end);
    const values = lines.map((line) => [line.y[nearestIndex(line, x)], line.end]).filter(([y]) => Number.isFinite(y));
    const text = values.map(([y, name]) => (name && lines.length > 1 ? `${name} ${this.format(y)}` : this.format(y))).join("   ");
    setText(this.now, text ? t("{values} at {place}", { values: text, place: this.group.formatX(x) }) : (this.content.now ?? ""));
  }

  updateCrosshair() {
    const { xaxis } = this.plot._fullLayout ?? {};
    const place = this.at !== null && this.at !== undefined && xaxis ? xaxis.d2p(this.at) : NaN;
    const inside = place >= 0 && place <= xaxis._length;
    setVisible(this.crosshair, inside);
    if (inside) this.crosshair.style.left = `${Math.round(xaxis._offset + place)}px`;
  }

  async applyZoom() {
    setVisible(this.resetButton, this.group.zoom);
    if (!this.started || this.isClosed) return;
    if (!this.isVisible) {
      this.isStale = true;
      return;
    }
    const { zoom } = this.group;
    const shown = this.plot.layout?.xaxis;
    const same = zoom ? shown && !shown.autorange && zoom.every((value, i) => value === shown.range[i]) : shown?.autorange;
    if (same) return;
    this.isRelayouting = true;
    const change = zoom ? { "xaxis.range": [...zoom], "xaxis.autorange": false } : { "xaxis.autorange": true, "yaxis.autorange": true };
    await window.Plotly.relayout(this.plot, change);
    this.isRelayouting = false;
    this.updateCrosshair();
  }

  toggleLog() {
    this.log = !this.log;
    setAttr(this.logButton, "aria-pressed", String(this.log));
    this.draw().catch((error) => console.warn(error));
  }

  toggleCliff() {
    this.showsCliff = !this.showsCliff;
    setAttr(this.cliffButton, "aria-pressed", String(this.showsCliff));
    this.draw().catch((error) => console.warn(error));
  }

  toggleData() {
    this.tableBox.hidden = !this.tableBox.hidden;
    setAttr(this.dataButton, "aria-expanded", String(!this.tableBox.hidden));
    if (!this.tableBox.hidden) this.fillData();
  }

  /** Fills the table with the newest values. */
  fillData() {
    const { columns = [] } = this.content ?? {};
    const values = this.content?.values?.() ?? [];
    if (!this.body) {
      this.body = h("tbody");
      const head = h("thead", {}, h("tr", {}, columns.map((name) => h("th", { scope: "col", class: "num" }, name))));
      this.tableBox.append(h("table", {}, h("caption", { class: "visually-hidden" }, t("{name}, newest first", { name: this.name })), head, this.body));
      setAttr(this.tableBox, "aria-label", t("{name} as a table", { name: this.name }));
      setAttr(this.tableBox, "role", "region");
    }
    const newest = values.slice(-200).reverse();
    updateList(this.body, newest, (row) => row[0], (row) => h("tr", {}, row.map(() => h("td", { class: "num" }))), (part, row) => row.forEach((value, i) => setText(part.children[i], value)));
  }

  close() {
    this.isClosed = true;
    visibility.unobserve(this.node);
    if (this.started) window.Plotly.purge(this.plot);
  }
}

export class ChartGroup {
  /** `keepsZoom`: the zoom is kept in the URL. Only one group of a page can do this. */
  constructor({ keepsZoom = true } = {}) {
    this.charts = new Set();
    this.axis = "step";
    this.keepsZoom = keepsZoom;
    this.zoom = keepsZoom ? readZoomParam() : null;
    this.onZoom = () => {};
    this.onTheme = () => this.redraw();
    this.onThemeChange = () => this.onTheme();
    themeChange.addEventListener("change", this.onThemeChange);
  }

  add(chart) {
    chart.group = this;
    this.charts.add(chart);
    return chart.node;
  }

  remove(chart) {
    this.charts.delete(chart);
    chart.close();
  }

  /** Draws the charts one after the other, in page order. A chart drawn for the first time is painted before the next one is drawn. */
  async redraw() {
    const number = (this.redrawNumber = (this.redrawNumber ?? 0) + 1);
    for (const chart of this.charts) {
      if (number !== this.redrawNumber) return;
      const began = performance.now();
      const isNew = !chart.started;
      await chart.draw();
      // Several charts in one frame would make scrolling jump.
      if ((isNew && chart.started) || performance.now() - began > FRAME_MS) await nextPaint();
    }
  }

  /** Sets [from, to] on the x axis, or null for the whole run. */
  setZoom(zoom, from = null) {
    this.zoom = zoom;
    if (this.keepsZoom) setParam("zoom", zoom ? zoom.map((value) => (typeof value === "number" ? +value.toPrecision(8) : value)).join("..") : null);
    for (const chart of this.charts) if (chart !== from) chart.applyZoom();
    this.onZoom();
  }

  /** Shows the crosshair of all charts at x, or hides it if x is null. */
  hover(x) {
    for (const chart of this.charts) chart.hoverAt(x);
  }

  /** Writes an x value as text. */
  formatX(x) {
    if (this.axis === "clock") return new Date(toNumber(x)).toLocaleTimeString(locale);
    if (this.axis === "active") return `${x.toFixed(2)} h`;
    return this.axis === "tokens" ? t("{n} tokens", { n: compactNumber(x) }) : t("step {step}", { step: count(x) });
  }

  close() {
    themeChange.removeEventListener("change", this.onThemeChange);
    for (const chart of this.charts) chart.close();
  }
}

/** Resolves after the next frame is painted; after 100 ms in a hidden tab, which has no frames. */
const nextPaint = () => new Promise((done) => {
  requestAnimationFrame(() => setTimeout(done));
  setTimeout(done, 100);
});

function readZoomParam() {
  const parts = (getParam("zoom") ?? "").split("..");
  if (parts.length !== 2 || parts.some((part) => part === "")) return null;
  return parts.every((part) => Number.isFinite(Number(part))) ? parts.map(Number) : parts;
}

const HEADROOM = 0.06; // of the y range
const lowest = (traces) => traces.reduce((low, trace) => trace.y.reduce((least, y) => (Number.isFinite(y) ? Math.min(least, y) : least), low), Infinity);

/** Colors of text, of the grid, and of the background of labels between lines. */
const themeColors = () => (isDark() ? ["#a3adb8", "#2a3138", "rgba(17,20,24,.8)"] : ["#52606d", "#e6e9ed", "rgba(255,255,255,.8)"]);

/** On a log axis plotly draws a zero as a line that falls out of the plot. */
const onlyPositive = (y) => (y > 0 ? y : null);

/** A line with a single point needs a marker to be visible. */
const traceMode = ({ y }) => (y.filter(Number.isFinite).length > 1 ? "lines" : "lines+markers");

/** Returns the index of the finite value nearest to x, or -1 if there is none. */
function nearestIndex({ x: xs, y: ys }, x) {
  const wanted = toNumber(x);
  let best = -1;
  let smallest = Infinity;
  xs.forEach((x, i) => {
    if (x === null || !Number.isFinite(ys[i])) return;
    const apart = Math.abs(toNumber(x) - wanted);
    if (apart < smallest) [best, smallest] = [i, apart];
  });
  return best;
}

// The selects above the charts: x axis and smoothing. Both are kept in the URL.

/** Returns `{axis, smoothing}` of the URL, or the defaults. */
export function chartSettings(defaultAxis) {
  const smoothing = getParam("smooth");
  return { axis: getParam("x") in AXES ? getParam("x") : defaultAxis, smoothing: SMOOTHINGS.some(([value]) => value === smoothing) ? smoothing : DEFAULT_SMOOTHING };
}

/** Creates both selects; `onAxis` and `onSmoothing` are called with a new choice. `defaultAxis` is the default axis, which the URL leaves out. */
export function chartControls({ axis, smoothing }, defaultAxis, onAxis, onSmoothing, ...more) {
  const along = h("select", { id: "axis" }, Object.entries(AXES).map(([key, name]) => h("option", { value: key }, name)));
  const smooth = h("select", { id: "smooth" }, SMOOTHINGS.map(([value, label]) => h("option", { value }, label)));
  along.value = axis;
  smooth.value = smoothing;
  along.addEventListener("change", () => {
    setParam("x", along.value === defaultAxis ? null : along.value);
    onAxis(along.value);
  });
  smooth.addEventListener("change", () => {
    setParam("smooth", smooth.value === DEFAULT_SMOOTHING ? null : smooth.value);
    onSmoothing(smooth.value);
  });
  const pair = (id, label, choice) => h("span", { class: "choice" }, h("label", { for: id }, label), choice);
  return h("div", { class: "bar" }, pair("axis", t("X axis"), along), pair("smooth", t("Smoothing"), smooth), ...more);
}
