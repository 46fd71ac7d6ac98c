// Curves of several jobs in the same charts, and the settings in which they differ. A fork's curve starts on its parent's.
import { ApiError, get, withQuery } from "../api.js";
import { DARK_COLORS, DASHES, LIGHT_COLORS, chartLabel, heldOutSets, lineWithGaps, rowsAfterPause, smoothedLoss, smoothingQuery, splitInherited, stepRange, xValues } from "../chart-data.js";
import { Chart, ChartGroup, chartControls, chartSettings } from "../charts.js";
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { compactNumber, count, fewDigits, loss } from "../format.js";
import { accuracy } from "../job/evaluations-tab.js";
import { poll } from "../polling.js";
import { getParam, setParam } from "../router.js";
import { differingSettings } from "../spec-diff.js";
import { isDark } from "../theme.js";

const MAX_JOBS = 10;
// Batch sizes differ, so steps are not comparable.
const DEFAULT_AXIS = "tokens";
const MAX_POINTS = 1000;
const FIELDS = "learning_rate,grad_norm,tokens,tokens_per_second,at,eval_loss,eval_bpb,eval";
const field = (name) => (row) => row[name] ?? null;
// Most rows have no evaluation. `set`: the chosen held-out set, or "" for all together.
const evaluated = (whole, unit) => (row, set) => (set ? row.eval?.[set]?.[unit] : row[whole]) ?? null;
const CHARTS = [
  { name: "Train loss", of: smoothedLoss, height: 340, format: loss },
  { name: "Gradient norm", of: field("grad_norm"), height: 170, format: fewDigits, log: true },
  { name: "Tokens/s", of: field("tokens_per_second"), height: 170, format: compactNumber, ticks: "~s" },
  { name: "Learning rate", of: field("learning_rate"), height: 170, format: fewDigits },
  { name: "Held-out loss", of: evaluated("eval_loss", "loss"), height: 220, format: loss, sparse: true },
  { name: "Held-out bits per byte", of: evaluated("eval_bpb", "bpb"), height: 220, format: loss, sparse: true },
];

export const comparePage = { title: "Compare", open };

function open(place) {
  const page = new ComparePage(place);
  return () => page.close();
}

class ComparePage {
  constructor(place) {
    this.loaded = new Map();
    this.group = new ChartGroup();
    ({ axis: this.group.axis, smoothing: this.smoothing } = chartSettings(DEFAULT_AXIS));
    this.charts = CHARTS.map((chart) => new Chart(chart.name, chart));
    this.group.onTheme = () => this.draw();
    this.group.onZoom = () => this.poller.now();
    const nodes = this.charts.map((chart) => this.group.add(chart));
    const [first, small, heldOut] = [nodes[0], nodes.filter((_, i) => i && !CHARTS[i].sparse), nodes.filter((_, i) => CHARTS[i].sparse)];
    this.legend = h("ul", { class: "legend" });
    this.choices = h("div", { class: "choices" });
    this.hint = h("p", { class: "muted" }, "Choose jobs to compare.");
    this.missingNote = h("p", { class: "error", role: "status", hidden: true });
    this.search = h("input", { type: "search", id: "find-job", placeholder: "Part of a name, or an id", autocomplete: "off", oninput: () => this.poller.now() });
    this.table = h("table", {}, h("caption", { class: "visually-hidden" }, "Differing settings"));
    this.settings = h("section", { hidden: true }, h("h2", {}, "Settings that differ"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Differing settings" }, this.table));
    this.scoreTable = h("table", {}, h("caption", { class: "visually-hidden" }, "Scores on tasks"));
    this.scores = h("section", { hidden: true }, h("h2", {}, "Scores on tasks"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores on tasks" }, this.scoreTable));
    this.set = getParam("set") ?? "";
    this.setChoice = h("select", { id: "held-out-set", onchange: () => this.chooseSet(this.setChoice.value) });
    this.setBar = h("div", { class: "bar", hidden: true }, h("label", { for: "held-out-set" }, "Held-out set"), this.setChoice);
    this.heldOut = h("section", { hidden: true }, this.setBar, h("div", { class: "small two" }, heldOut));
    this.drawn = h("div", { hidden: true }, this.legend, first, this.heldOut, h("div", { class: "small three" }, small));
    const chooser = h("details", { open: !this.chosen().length }, h("summary", {}, "Jobs"),
      h("div", { class: "bar" }, h("label", { for: "find-job" }, "Find"), this.search, h("span", { class: "muted" }, `up to ${MAX_JOBS}`)), this.choices);
    place.append(h("h1", {}, "Compare"), this.controls(), chooser, this.hint, this.missingNote, this.drawn, this.scores, this.settings);
    this.poller = poll(() => this.load());
  }

  controls() {
    const axis = (chosen) => {
      this.group.axis = chosen;
      this.group.hover(null);
      this.group.setZoom(null);
      this.draw();
    };
    const smoothing = (chosen) => {
      this.smoothing = chosen;
      this.loaded.clear();
      this.poller.now();
    };
    return chartControls({ axis: this.group.axis, smoothing: this.smoothing }, DEFAULT_AXIS, axis, smoothing);
  }

  chosen() {
    return (getParam("jobs") ?? "").split(",").filter(Boolean).slice(0, MAX_JOBS);
  }

  choose(id, wanted) {
    const others = this.chosen().filter((other) => other !== id);
    setParam("jobs", (wanted ? [...others, id] : others).join(","));
    this.poller.now();
  }

  chooseSet(name) {
    this.set = name;
    setParam("set", name);
    this.draw();
  }

  async load() {
    const ids = this.chosen();
    this.jobs = (await get(withQuery("/jobs", { search: this.search.value.trim(), limit: 100 }))).data;
    await Promise.all(ids.map((id) => this.loadJob(id)));
    this.drawChoices();
    const missing = ids.filter((id) => !this.loaded.has(id));
    setVisible(this.missingNote, missing.length);
    setText(this.missingNote, `Not found: ${missing.join(", ")}`);
    for (const id of this.loaded.keys()) if (!ids.includes(id)) this.loaded.delete(id);
    await this.draw();
  }

  /** Fetches a job's curve if it has changed, and the zoomed range. */
  async loadJob(id) {
    const address = `/jobs/${encodeURIComponent(id)}`;
    const job = this.jobs.find((known) => known.id === id) ?? (await get(address).catch(nullIfNotFound));
    if (!job) return;
    const known = this.loaded.get(id);
    const mark = `${job.progress.step} ${job.attempt} ${job.status}`;
    if (known?.mark !== mark) {
      const [whole, attempts, scores] = await Promise.all([this.fetchRows(job, [null, null]), get(`${address}/attempts`), get(`${address}/evaluations?newest=true`)]);
      this.loaded.set(id, { zoomed: known?.zoomed ?? null, mark, job, whole, attempts: attempts.data, scores: scores.data });
    }
    await this.fetchZoomed(this.loaded.get(id));
  }

  async fetchRows(job, [from, to]) {
    const wanted = { max_points: MAX_POINTS, ...smoothingQuery(this.smoothing), fields: FIELDS, lineage: job.parent ? true : null, after_step: from, until_step: to };
    return (await get(withQuery(`/jobs/${encodeURIComponent(job.id)}/metrics`, wanted))).data;
  }

  /** Fetches finer rows for the zoomed range; the previous rows stay until they arrive. */
  async fetchZoomed(run) {
    const { zoom, axis } = this.group;
    const wanted = JSON.stringify([zoom, axis, run.mark]);
    if (run.zoomedFor === wanted) return;
    const [from, to] = stepRange(zoom, axis, run.whole, run.attempts);
    const zoomed = from === null ? null : await this.fetchRows(run.job, [from, to]);
    Object.assign(run, { zoomed, zoomedFor: wanted });
  }

  drawChoices() {
    const ids = this.chosen();
    const chosen = ids.map((id) => this.loaded.get(id)?.job).filter(Boolean);
    const some = [...chosen, ...this.jobs.filter((job) => !ids.includes(job.id) && job.progress.step > 0)];
    updateList(this.choices, some, (job) => job.id, (job) => this.choice(job), (part, job) => {
      part.box.checked = ids.includes(job.id);
      part.box.disabled = !part.box.checked && ids.length >= MAX_JOBS;
      setText(part.name, `${job.name}  ${job.id}  ${job.status}  step ${count(job.progress.step)}`);
    });
  }

  choice(job) {
    const box = h("input", { type: "checkbox", id: `choose-${job.id}`, onchange: () => this.choose(job.id, box.checked) });
    const name = h("label", { for: `choose-${job.id}` });
    return Object.assign(h("div", {}, box, name), { box, name });
  }

  async draw() {
    const runs = this.chosen().map((id) => this.loaded.get(id)).filter(Boolean);
    setVisible(this.hint, !runs.length);
    setVisible(this.drawn, runs.length);
    this.drawLegend(runs);
    this.drawScores(runs);
    this.drawSettings(runs);
    if (!runs.length) return;
    this.drawSetChoice(runs);
    this.charts.forEach((chart, i) => chart.show(this.content(CHARTS[i], runs)));
    await this.group.redraw();
  }

  style(i) {
    const colors = isDark() ? DARK_COLORS : LIGHT_COLORS;
    // After the last color, repeat the colors with other dashes.
    const round = Math.floor(i / colors.length);
    return { color: colors[i % colors.length], dash: DASHES[(i + round) % DASHES.length] };
  }

  /** Lists the held-out sets of all runs, if there are several. */
  drawSetChoice(runs) {
    const rows = runs.flatMap((run) => run.whole);
    const names = heldOutSets(rows);
    setVisible(this.heldOut, rows.some((row) => field("eval_loss")(row) !== null));
    setVisible(this.setBar, names.length > 1);
    if (this.set && !names.includes(this.set)) this.set = "";
    const options = ["", ...names];
    updateList(this.setChoice, options, (name) => name, (name) => h("option", { value: name }), (option, name) => setText(option, name || "all together"));
    this.setChoice.value = this.set;
  }

  content(chart, runs) {
    const { name, format } = chart;
    const value = (row) => chart.of(row, this.set);
    const shown = name.startsWith("Held-out") && this.set ? `${name} of ${this.set}` : name;
    const traces = runs.flatMap((run, i) => this.lines(run, i, chart, value, runs));
    const label = `${chartLabel(shown, visibleRows(runs[0]), value, format)}, ${runs.length} ${runs.length === 1 ? "job" : "jobs"}`;
    return { traces, values: tableRows(runs, chart, value), columns: ["step", ...runs.map((run) => run.job.name)], label, note: "",
      runs: name === "Train loss" ? runs.map((run) => ({ name: run.job.name, rows: run.whole, attempts: run.attempts, of: value })) : [] };
  }

  /** The traces of a job. A fork starts on its parent's line; what it inherited from jobs that are not shown is a thin dotted line. */
  lines(run, i, { name, sparse }, value, runs) {
    const { job, attempts } = run;
    const { axis } = this.group;
    const style = this.style(i);
    const drawn = (uid, part, more) => ({ uid, ...lineWithGaps(xValues(part, axis, attempts), part.map(value), rowsAfterPause(part, axis, attempts)), ...(sparse ? { mode: "lines+markers", marker: { size: 5 } } : {}), ...more });
    const rows = visibleRows(run).filter((row) => !sparse || value(row) !== null);
    const [inherited, whole] = splitInherited(rows, job.id);
    // Attempts of the fork do not cover the time of its ancestors.
    const joins = axis === "step" || axis === "tokens";
    const own = joins ? whole : whole.filter((row) => (row.job_id ?? job.id) === job.id);
    const mine = drawn(job.id, own, { line: { width: 1.8, ...style }, main: i === 0, end: job.name, counted: true, falls: name === "Train loss" });
    if (!joins || !inherited.length) return [mine];
    const shown = new Set(runs.map((run) => run.job.id));
    const alone = inherited.filter((row) => !shown.has(row.job_id));
    const joinMarker = drawn(`${job.id}-joint`, own.slice(0, 1), { label: `${job.name}, fork`, mode: "markers", marker: { size: 7, symbol: "circle-open", color: style.color, line: { width: 2, color: style.color } } });
    const before = drawn(`${job.id}-before`, alone, { label: `${job.name}, before the fork`, line: { width: 1, color: style.color, dash: "dot" } });
    return alone.length ? [before, joinMarker, mine] : [joinMarker, mine];
  }

  drawLegend(runs) {
    updateList(this.legend, runs.map((run, i) => [run, i]), ([run]) => run.job.id, () => h("li", {}, h("span", { class: "swatch", "aria-hidden": "true" }), h("a"), h("span", { class: "muted" })), (part, [run, i]) => {
      const { color, dash } = this.style(i);
      part.firstChild.style.borderTopColor = color;
      part.firstChild.style.borderTopStyle = dash === "solid" ? "solid" : dash === "dot" ? "dotted" : "dashed";
      setAttr(part.children[1], "href", `/jobs/${run.job.id}`);
      setText(part.children[1], run.job.name);
      const from = run.job.parent?.step ? `, ○ forked at step ${count(run.job.parent.step)}` : "";
      setText(part.lastChild, `${run.job.status}, step ${count(run.job.progress.step)}, loss ${loss(run.job.progress.loss)}${from}`);
    });
  }

  /** The newest score of each job on each task, one row per task. */
  drawScores(runs) {
    const tasks = [...new Set(runs.flatMap((run) => run.scores.map((score) => score.task)))].sort();
    setVisible(this.scores, tasks.length);
    const mark = JSON.stringify(runs.map((run) => [run.job.id, run.scores]));
    if (mark === this.scoresMark) return;
    this.scoresMark = mark;
    const head = h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Task"), runs.map((run) => h("th", { scope: "col" }, run.job.name))));
    const body = tasks.map((task) => {
      const scores = runs.map((run) => run.scores.find((score) => score.task === task));
      const files = new Set(scores.filter(Boolean).map((score) => score.file_sha256));
      const name = h("th", { scope: "row" }, task, files.size > 1 ? h("span", { class: "muted" }, " (different files: not comparable)") : "");
      return h("tr", {}, name, scores.map((score) => h("td", {}, score ? scoreText(score) : "")));
    });
    this.scoreTable.replaceChildren(this.scoreTable.caption, head, h("tbody", {}, body));
  }

  drawSettings(runs) {
    // The names are in the table head.
    const rows = runs.length > 1 ? differingSettings(runs.map((run) => run.job.spec)).filter(([name]) => name !== "name") : [];
    setVisible(this.settings, rows.length);
    const mark = JSON.stringify([runs.map((run) => run.job.id), rows]);
    if (mark === this.settingsMark) return;
    this.settingsMark = mark;
    const head = h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Setting"), runs.map((run) => h("th", { scope: "col" }, run.job.name))));
    const body = h("tbody", {}, rows.map(([name, values]) => h("tr", {}, h("th", { scope: "row", class: "mono" }, name), values.map((value) => h("td", {}, value)))));
    this.table.replaceChildren(this.table.caption, head, body);
  }

  close() {
    this.poller();
    this.group.close();
  }
}

function scoreText({ acc, acc_norm, bpb, step }) {
  const parts = [["acc", accuracy(acc)], ["acc_norm", acc_norm === null ? null : accuracy(acc_norm)], ["bpb", fewDigits(bpb)]];
  return `${parts.filter(([, text]) => text !== null).map(([name, text]) => `${name} ${text}`).join(", ")}, step ${count(step)}`;
}

/** The rows to draw: the zoomed range if it is loaded. */
const visibleRows = ({ zoomed, whole }) => zoomed ?? whole;

/** One row per step that any job has, one column per job. */
function tableRows(runs, { sparse, format }, value) {
  const known = runs.map((run) => new Map(visibleRows(run).map((row) => [row.step, value(row)]).filter(([, found]) => !sparse || found !== null)));
  const steps = [...new Set(known.flatMap((values) => [...values.keys()]))].sort((a, b) => a - b);
  return steps.map((step) => [count(step), ...known.map((values) => format(values.get(step)))]);
}

/** For `catch`: null if the job was deleted; throws other errors. */
function nullIfNotFound(error) {
  if (error instanceof ApiError && error.status === 404) return null;
  throw error;
}
