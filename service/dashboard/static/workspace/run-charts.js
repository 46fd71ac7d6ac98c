// Curves of several jobs in the same charts, and the settings in which they differ. A fork's curve starts on its parent's; folded jobs are a mean and a band.
import { get, withQuery } from "../api.js";
import { DARK_COLORS, DASHES, LIGHT_COLORS, chartLabel, heldOutSets, lineWithGaps, rowsAfterPause, smoothedLoss, smoothingQuery, splitInherited, stepRange, xValues } from "../chart-data.js";
import { Chart, ChartGroup, chartControls, chartSettings } from "../charts.js";
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { compactNumber, count, fewDigits, loss } from "../format.js";
import { t, tn } from "../i18n.js";
import { accuracy } from "../job/evaluations-tab.js";
import { getParam, setParam } from "../router.js";
import { differingSettings } from "../spec-diff.js";
import { wordFor } from "../status.js";
import { isDark } from "../theme.js";
import { meanOfLines } from "./folding.js";
import { showSwatch } from "./job-table.js";

// Batch sizes differ, so steps are not comparable.
const DEFAULT_AXIS = "tokens";
const POINTS = [[4, 1000], [12, 500], [Infinity, 250]]; // up to so many jobs, so many points of each
const MAX_LABEL = 18; // letters
const SCORES_REFRESH_MS = 30_000;
const FIELDS = "learning_rate,grad_norm,tokens,tokens_per_second,at,eval_loss,eval_bpb,eval";
const TIME_AXES = new Set(["active", "clock"]);
const isNarrow = matchMedia("(max-width: 700px)");
const field = (name) => (row) => row[name] ?? null;
// Most rows have no evaluation. `set`: the chosen held-out set, or "" for all together.
const evaluated = (whole, unit) => (row, set) => (set ? row.eval?.[set]?.[unit] : row[whole]) ?? null;
const CHARTS = [
  { name: t("Train loss"), of: smoothedLoss, height: 340, format: loss },
  { name: t("Gradient norm"), of: field("grad_norm"), height: 170, format: fewDigits, log: true },
  { name: t("Tokens/s"), of: field("tokens_per_second"), height: 170, format: compactNumber, ticks: "~s" },
  { name: t("Learning rate"), of: field("learning_rate"), height: 170, format: fewDigits },
  { name: t("Held-out loss"), of: evaluated("eval_loss", "loss"), height: 220, format: loss, sparse: true },
  { name: t("Held-out bits per byte"), of: evaluated("eval_bpb", "bpb"), height: 220, format: loss, sparse: true },
];

export const MAX_LINES = 10;
export const MAX_RUNS = 40; // in all lines together

/** Returns color and dash of the line in a slot: after the last color, the colors are repeated with other dashes. */
export function lineStyle(slot) {
  const colors = isDark() ? DARK_COLORS : LIGHT_COLORS;
  return { color: colors[slot % colors.length], dash: DASHES[(slot + Math.floor(slot / colors.length)) % DASHES.length] };
}

export class RunCharts {
  /** `onChange` is called when other data are needed: another zoom, axis or smoothing. */
  constructor(onChange) {
    this.onChange = onChange;
    this.lines = [];
    this.loaded = new Map();
    this.group = new ChartGroup();
    ({ axis: this.group.axis, smoothing: this.smoothing } = chartSettings(DEFAULT_AXIS));
    this.charts = CHARTS.map((chart) => new Chart(chart.name, chart));
    this.group.onTheme = () => this.draw();
    this.group.onZoom = onChange;
    const nodes = this.charts.map((chart) => this.group.add(chart));
    const [first, small, heldOut] = [nodes[0], nodes.filter((_, i) => i && !CHARTS[i].sparse), nodes.filter((_, i) => CHARTS[i].sparse)];
    this.legend = h("ul", { class: "legend" });
    this.emptyNote = h("p", { class: "muted", hidden: true });
    this.settings = new ComparisonTable(t("Settings that differ"), t("Differing settings"), t("Setting"));
    this.scores = new ComparisonTable(t("Scores on tasks"), t("Scores on tasks"), t("Task"));
    this.set = getParam("set") ?? "";
    this.setChoice = h("select", { id: "held-out-set", onchange: () => this.chooseSet(this.setChoice.value) });
    this.setBar = h("div", { class: "bar", hidden: true }, h("label", { for: "held-out-set" }, t("Held-out set")), this.setChoice);
    this.heldOut = h("section", { hidden: true }, this.setBar, h("div", { class: "small two" }, heldOut));
    this.controls = this.createControls();
    this.node = h("div", { hidden: true }, this.legend, first, this.heldOut, h("div", { class: "small three" }, small), this.emptyNote, this.scores.node, this.settings.node);
  }

  createControls() {
    const axis = (chosen) => {
      this.group.axis = chosen;
      this.group.hover(null);
      this.group.setZoom(null);
      this.draw();
    };
    const smoothing = (chosen) => {
      this.smoothing = chosen;
      this.loaded.clear();
      this.onChange();
    };
    return chartControls({ axis: this.group.axis, smoothing: this.smoothing }, DEFAULT_AXIS, axis, smoothing);
  }

  chooseSet(name) {
    this.set = name;
    setParam("set", name);
    this.draw();
  }

  /** Fetches what has changed and draws the lines, `[{key, name, slot, jobs}]`. */
  async update(lines) {
    this.setLines(lines);
    const jobs = lines.flatMap((line) => line.jobs);
    await Promise.all(jobs.map((job) => this.loadJob(job, jobs.length)));
    const wanted = new Set(jobs.map((job) => job.id));
    for (const id of this.loaded.keys()) if (!wanted.has(id)) this.loaded.delete(id);
    // Most polls bring nothing new, and a redraw of all charts takes several frames.
    const mark = this.drawnMark();
    if (mark === this.drawn) return;
    await this.draw();
    this.drawn = mark;
  }

  /** Changes whenever `update` must draw again; the controls and the theme draw by themselves. */
  drawnMark() {
    return JSON.stringify(this.loadedLines().map(({ key, name, slot, runs }) => [key, name, slot, runs.map((run) =>
      [run.job.id, run.job.name, run.job.progress.loss, Boolean(run.job.spec), run.mark, run.attemptsOf, run.scoredAt, run.zoomedFor])]));
  }

  /** Sets what is drawn, before the data of new lines are there. */
  setLines(lines) {
    this.lines = lines;
  }

  /** Fetches a job's curve if it has changed, and the zoomed range. */
  async loadJob(job, total) {
    const address = `/jobs/${encodeURIComponent(job.id)}`;
    const known = this.loaded.get(job.id);
    const points = POINTS.find(([most]) => total <= most)[1];
    const mark = `${job.progress.step} ${job.attempt} ${job.status} ${points} ${this.smoothing}`;
    const run = { ...known, job, points };
    if (known?.mark !== mark) {
      run.whole = await this.fetchRows(run, [null, null]);
      run.mark = mark;
    }
    const state = `${job.attempt} ${job.status}`;
    if (known?.attemptsOf !== state) [run.attempts, run.attemptsOf] = [(await get(`${address}/attempts`)).data, state];
    const isOld = performance.now() - (known?.scoredAt ?? -Infinity) > SCORES_REFRESH_MS && known?.mark !== mark;
    if (known?.scoresOf !== state || isOld) [run.scores, run.scoresOf, run.scoredAt] = [(await get(`${address}/evaluations?newest=true`)).data, state, performance.now()];
    await this.fetchZoomed(run);
    this.loaded.set(job.id, run);
  }

  async fetchRows({ job, points }, [from, to]) {
    const wanted = { max_points: points, ...smoothingQuery(this.smoothing), fields: FIELDS, lineage: job.parent ? true : null, after_step: from, until_step: to };
    return (await get(withQuery(`/jobs/${encodeURIComponent(job.id)}/metrics`, wanted))).data;
  }

  /** Fetches finer rows for the zoomed range; the previous rows stay until they arrive. */
  async fetchZoomed(run) {
    const { zoom, axis } = this.group;
    const wanted = JSON.stringify([zoom, axis, run.mark]);
    if (run.zoomedFor === wanted) return;
    const [from, to] = stepRange(zoom, axis, run.whole, run.attempts);
    run.zoomed = from === null ? null : await this.fetchRows(run, [from, to]);
    run.zoomedFor = wanted;
  }

  /** The lines with the jobs whose curves are there. */
  loadedLines() {
    return this.lines.map((line) => ({ ...line, runs: line.jobs.map((job) => this.loaded.get(job.id)).filter(Boolean) })).filter((line) => line.runs.length);
  }

  async draw() {
    const lines = this.loadedLines();
    setVisible(this.node, lines.length);
    this.drawLegend(lines);
    this.drawScores(lines);
    this.drawSettings(lines);
    if (!lines.length) return;
    this.drawSetChoice(lines);
    this.charts.forEach((chart, i) => chart.show(this.content(CHARTS[i], lines)));
    this.hideEmptyCharts();
    await this.group.redraw();
  }

  /** A chart without a point is only named; the first one is always there. */
  hideEmptyCharts() {
    const empty = this.charts.slice(1).filter((chart) => chart.isEmpty);
    for (const chart of this.charts) setVisible(chart.node, !empty.includes(chart));
    setVisible(this.emptyNote, empty.length);
    setText(this.emptyNote, t("No points of these jobs yet: {charts}", { charts: empty.map((chart) => chart.name).join(t(", ")) }));
  }

  /** Lists the held-out sets of all jobs, if there are several. */
  drawSetChoice(lines) {
    const rows = lines.flatMap((line) => line.runs.flatMap((run) => run.whole));
    const names = heldOutSets(rows);
    setVisible(this.heldOut, rows.some((row) => field("eval_loss")(row) !== null));
    setVisible(this.setBar, names.length > 1);
    if (this.set && !names.includes(this.set)) this.set = "";
    updateList(this.setChoice, ["", ...names], (name) => name, (name) => h("option", { value: name }), (option, name) => setText(option, name || t("all together")));
    this.setChoice.value = this.set;
  }

  content(chart, lines) {
    const { name, format } = chart;
    const value = (row) => chart.of(row, this.set);
    const shown = chart.sparse && this.set ? t("{chart} of {set}", { chart: name, set: this.set }) : name;
    const runs = lines.flatMap((line) => line.runs);
    const drawn = new Set(runs.map((run) => run.job.id));
    const traces = lines.flatMap((line, i) => (line.runs.length > 1 ? this.foldTraces(line, i === 0, chart, value) : this.jobTraces(line, i === 0, chart, value, drawn)));
    const label = tn(runs.length, "{label}, {n} job", "{label}, {n} jobs", { label: chartLabel(shown, visibleRows(runs[0]), value, format) });
    const folded = lines.some((line) => line.runs.length > 1);
    const note = folded && chart === CHARTS[0] ? t("thick: mean of folded jobs; band: lowest to highest; dotted: not all of them are there") : "";
    return { traces, values: () => tableRows(runs, chart, value), columns: [t("step"), ...runs.map((run) => run.job.name)], label, note,
      runs: chart === CHARTS[0] ? runs.map((run) => ({ name: run.job.name, rows: run.whole, attempts: run.attempts, of: value })) : [] };
  }

  drawnRows(run, { sparse }, value) {
    return visibleRows(run).filter((row) => !sparse || value(row) !== null);
  }

  /** The traces of a job. A fork starts on its parent's line; what it inherited from jobs that are not shown is a thin dotted line. */
  jobTraces({ runs: [run], slot, name }, isMain, chart, value, drawn) {
    const { job, attempts } = run;
    const { axis } = this.group;
    const style = lineStyle(slot);
    const trace = (uid, part, more) => ({ uid, ...lineWithGaps(xValues(part, axis, attempts), part.map(value), rowsAfterPause(part, axis, attempts)), ...(chart.sparse ? { mode: "lines+markers", marker: { size: 5 } } : {}), ...more });
    const [inherited, whole] = splitInherited(this.drawnRows(run, chart, value), job.id);
    // Attempts of the fork do not cover the time of its ancestors.
    const joins = !TIME_AXES.has(axis);
    const own = joins ? whole : whole.filter((row) => (row.job_id ?? job.id) === job.id);
    const mine = trace(job.id, own, { line: { width: 1.8, ...style }, main: isMain, end: endLabel(name), label: name, counted: true, falls: chart === CHARTS[0] });
    if (!joins || !inherited.length) return [mine];
    const alone = inherited.filter((row) => !drawn.has(row.job_id));
    const joinMarker = trace(`${job.id}-joint`, own.slice(0, 1), { label: t("{name}, fork", { name: job.name }), mode: "markers", marker: { size: 7, symbol: "circle-open", color: style.color, line: { width: 2, color: style.color } } });
    const before = trace(`${job.id}-before`, alone, { label: t("{name}, before the fork", { name: job.name }), line: { width: 1, color: style.color, dash: "dot" } });
    return alone.length ? [before, joinMarker, mine] : [joinMarker, mine];
  }

  /** The traces of folded jobs: the band, the mean, and dotted the mean of those that are left. On the wall clock, each job has its thin line. */
  foldTraces({ key, runs, slot, name }, isMain, chart, value) {
    const { axis } = this.group;
    const style = lineStyle(slot);
    const parts = runs.map((run) => {
      const rows = this.drawnRows(run, chart, value);
      return { x: xValues(rows, axis, run.attempts), y: rows.map(value) };
    });
    if (axis === "clock") return parts.map((part, i) => ({ uid: `${key}-${runs[i].job.id}`, ...part, line: { width: 1, ...style }, main: isMain && i === 0, end: i === 0 ? endLabel(name) : undefined, counted: true }));
    const { x, mean, low, high, whole } = meanOfLines(parts);
    const fill = transparent(style.color);
    const outline = { mode: "lines", line: { width: 0, color: style.color }, hoverinfo: "skip" };
    const markers = chart.sparse ? { mode: "lines+markers", marker: { size: 5 } } : {};
    const solid = { uid: key, x, y: mean.map((y, i) => (whole[i] ? y : null)), ...markers, line: { width: 2.4, ...style }, main: isMain, end: endLabel(name), label: name, counted: mean, falls: chart === CHARTS[0] };
    const traces = [{ uid: `${key}-low`, label: t("{name}, lowest", { name }), x, y: low, ...outline }, { uid: `${key}-high`, label: t("{name}, highest", { name }), x, y: high, ...outline, fill: "tonexty", fillcolor: fill }, solid];
    if (whole.every(Boolean)) return traces;
    // Each dotted part begins and ends on the mean of all.
    const dotted = mean.map((y, i) => (whole[i] && (whole[i - 1] ?? true) && (whole[i + 1] ?? true) ? null : y));
    return [...traces, { uid: `${key}-rest`, label: t("{name}, mean of some", { name }), x, y: dotted, mode: "lines", line: { width: 1.4, color: style.color, dash: "dot" } }];
  }

  drawLegend(lines) {
    updateList(this.legend, lines, (line) => line.key, () => h("li", {}, h("span", { class: "swatch", "aria-hidden": "true" }), h("a"), h("span", { class: "muted" })), (part, line) => {
      const [{ job }] = line.runs;
      showSwatch(part.firstChild, lineStyle(line.slot));
      const isFold = line.runs.length > 1;
      setAttr(part.children[1], "href", isFold ? null : `/jobs/${job.id}`);
      setText(part.children[1], line.name);
      const from = job.parent?.step ? t(", ○ forked at step {step}", { step: count(job.parent.step) }) : "";
      setText(part.lastChild, isFold ? t("mean of {n} jobs", { n: line.runs.length }) : t("{status}, step {step}, loss {loss}{fork}", { status: wordFor(job.status), step: count(job.progress.step), loss: loss(job.progress.loss), fork: from }));
    });
  }

  /** The newest score of each job on each task, one row per task. */
  drawScores(lines) {
    const runs = lines.flatMap((line) => line.runs);
    const tasks = [...new Set(runs.flatMap((run) => run.scores.map((score) => score.task)))].sort();
    this.scores.show(runs.map((run) => run.job.name), tasks.map((task) => {
      const scores = runs.map((run) => run.scores.find((score) => score.task === task));
      const files = new Set(scores.filter(Boolean).map((score) => score.file_sha256));
      return [task, scores.map((score) => (score ? scoreText(score) : "")), files.size > 1 ? t(" (different files: not comparable)") : ""];
    }));
  }

  /** The settings in which the lines differ; of folded jobs all values are shown. */
  drawSettings(lines) {
    const runs = lines.flatMap((line) => line.runs).filter((run) => run.job.spec);
    // The names are in the table head.
    const rows = runs.length > 1 ? differingSettings(runs.map((run) => run.job.spec)).filter(([name]) => name !== "name") : [];
    const place = new Map(runs.map((run, i) => [run.job.id, i]));
    const of = (values, line) => [...new Set(line.runs.map((run) => values[place.get(run.job.id)] ?? "–"))].join(", ");
    this.settings.show(lines.map((line) => line.name), rows.map(([name, values]) => [name, lines.map((line) => of(values, line)), ""]));
  }

  close() {
    this.group.close();
  }
}

/** A table with a column for each line; hidden while it has no rows. It is drawn again only if it differs, so that a selection in it stays. */
class ComparisonTable {
  constructor(title, caption, first) {
    this.first = first;
    this.table = h("table", {}, h("caption", { class: "visually-hidden" }, caption));
    this.node = h("section", { hidden: true }, h("h2", {}, title), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, this.table));
  }

  /** `rows`: `[[name, [text of each column], note]]`. */
  show(names, rows) {
    setVisible(this.node, rows.length);
    const mark = JSON.stringify([names, rows]);
    if (mark === this.mark) return;
    this.mark = mark;
    const head = h("thead", {}, h("tr", {}, [this.first, ...names].map((name) => h("th", { scope: "col" }, name))));
    const body = h("tbody", {}, rows.map(([name, values, note]) => h("tr", {}, h("th", { scope: "row", class: "mono" }, name, note && h("span", { class: "muted" }, note)), values.map((value) => h("td", {}, value)))));
    this.table.replaceChildren(this.table.caption, head, body);
  }
}

function scoreText({ acc, acc_norm, bpb, step }) {
  const parts = [["acc", accuracy(acc)], ["acc_norm", acc_norm === null ? null : accuracy(acc_norm)], ["bpb", loss(bpb)]];
  return t("{scores}, step {step}", { scores: parts.filter(([, text]) => text !== null).map(([name, text]) => `${name} ${text}`).join(", "), step: count(step) });
}

/** The rows to draw: the zoomed range if it is loaded. */
const visibleRows = ({ zoomed, whole }) => zoomed ?? whole;

/** The label at the end of a line: the end of a long name, because the names of a sweep begin alike. None on a phone, where it would be wider than the curve. */
function endLabel(name) {
  if (isNarrow.matches) return undefined;
  return name.length > MAX_LABEL ? `…${name.slice(1 - MAX_LABEL)}` : name;
}

/** "#0072B2" -> a color that lets lines below it shine through. */
const transparent = (color) => `rgba(${[1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)).join()},.16)`;

/** One row per step that any job has, one column per job. */
function tableRows(runs, { sparse, format }, value) {
  const known = runs.map((run) => new Map(visibleRows(run).map((row) => [row.step, value(row)]).filter(([, found]) => !sparse || found !== null)));
  const steps = [...new Set(known.flatMap((values) => [...values.keys()]))].sort((a, b) => a - b);
  return steps.map((step) => [count(step), ...known.map((values) => format(values.get(step)))]);
}
