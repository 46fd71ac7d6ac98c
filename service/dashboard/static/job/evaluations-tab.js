// The evaluations tab: scores on tasks over the steps, as charts and as a table.
import { ApiError, get, sendJson } from "../api.js";
import { DARK_COLORS, DASHES, LIGHT_COLORS } from "../chart-data.js";
import { Chart, ChartGroup } from "../charts.js";
import { createTable, h, setText, setVisible, updateList } from "../dom.js";
import { NONE, ago, count, dateTime, loss } from "../format.js";
import { t } from "../i18n.js";
import { wordFor } from "../status.js";
import { isDark } from "../theme.js";

const PAGE = 1000;
const MAX_SCORES = 20_000; // the newest ones
const MAX_ROWS = 500; // of the table; the charts have all
const PERCENT = ".3~p";
const OPEN_STATES = new Set(["pending", "running"]);

/** Formats a fraction, e.g. 52.1 %. */
export const accuracy = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : NONE);

const CHARTS = [
  [t("Accuracy"), "acc", { format: accuracy, ticks: PERCENT }],
  [t("Accuracy per byte of text (acc_norm)"), "acc_norm", { format: accuracy, ticks: PERCENT }],
  [t("Bits per byte of the right text"), "bpb", { format: loss }],
];
const COLUMNS = [[t("Step"), "num"], [t("Task")], ["acc", "num"], ["acc_norm", "num"], ["bpb", "num"], [t("Examples"), "num"], [t("Measured")], [t("When")]];

export class EvaluationsTab {
  constructor(place, address) {
    this.address = address;
    this.group = new ChartGroup({ keepsZoom: false });
    this.charts = CHARTS.map(([name, , options]) => new Chart(name, { ...options, height: 200 }));
    this.group.onTheme = () => this.draw();
    this.table = createTable(COLUMNS, t("Scores on tasks, newest step first"));
    this.table.node.classList.add("stack");
    this.none = h("p", { class: "muted", hidden: true }, t("No scores yet. Name task files in evaluation.tasks, or evaluate a checkpoint: trainyard evaluate."));
    this.note = h("span", { class: "muted", role: "status" });
    this.error = h("p", { class: "error", role: "alert" });
    this.button = h("button", { type: "button", hidden: true, onclick: () => this.evaluate() }, t("Evaluate the newest checkpoint"));
    this.grid = h("div", { class: "small two", hidden: true }, this.charts.map((chart) => this.group.add(chart)));
    place.append(h("div", { class: "bar" }, this.button, this.note), this.error, this.none, this.grid, this.table.node);
  }

  async update(job) {
    setVisible(this.button, job.checkpoint && job.spec.evaluation?.tasks.length);
    const mark = `${job.status} ${job.attempt} ${job.progress.step}`;
    if (mark === this.mark && !this.scores?.some((score) => OPEN_STATES.has(score.state))) return;
    this.mark = mark;
    try {
      this.scores = await this.fetchAll();
    } catch (error) {
      this.mark = null;
      if (error instanceof TypeError) throw error;
      return;
    }
    this.draw();
  }

  async fetchAll() {
    const scores = [];
    for (let more = true, after = ""; more; after = `&after=${scores.at(-1)?.id}`) {
      const page = await get(`${this.address}/evaluations?limit=${PAGE}${after}`);
      scores.push(...page.data);
      more = page.has_more;
    }
    return scores.slice(-MAX_SCORES);
  }

  async evaluate() {
    setText(this.error, "");
    try {
      await sendJson("POST", `${this.address}/checkpoints/latest/evaluate`, {});
      this.mark = null;
      this.scores = await this.fetchAll();
      this.draw();
    } catch (error) {
      setText(this.error, error instanceof ApiError ? [error.message, ...error.errors.map((problem) => `${problem.pointer}: ${problem.message}`)].join(" ") : error.message);
    }
  }

  draw() {
    if (!this.scores) return;
    const done = this.scores.filter((score) => score.state === "done");
    const open = this.scores.filter((score) => OPEN_STATES.has(score.state)).length;
    setVisible(this.none, !this.scores.length);
    setVisible(this.table.node, this.scores.length);
    setVisible(this.grid, done.length);
    const shown = this.scores.slice(-MAX_ROWS).reverse();
    const rest = this.scores.length > shown.length ? t("the newest {n} of {all} scores", { n: count(shown.length), all: count(this.scores.length) }) : "";
    setText(this.note, [open ? t("{n} being evaluated", { n: count(open) }) : "", rest].filter(Boolean).join(" · "));
    updateList(this.table.body, shown, (score) => `${score.id} ${score.state}`, scoreRow);
    if (!done.length) return;
    this.charts.forEach((chart, i) => chart.show(chartContent(CHARTS[i], done)));
    this.group.redraw().catch((error) => console.warn(error));
  }

  close() {
    this.group.close();
  }
}

function scoreRow(score) {
  const measured = score.evaluation_id === null ? t("in training") : t("on {device}", { device: score.device ?? "?" });
  const cells = [
    [count(score.step), "num"], [score.task], [accuracy(score.acc), "num"], [accuracy(score.acc_norm), "num"], [loss(score.bpb), "num"], [count(score.examples), "num"],
    [score.state === "done" ? measured : [wordFor(score.state), score.error].filter(Boolean).join(": "), "whole"],
  ];
  const when = h("td", { title: dateTime(score.created_at), "data-name": t("When").toLowerCase() }, ago(score.finished_at ?? score.created_at));
  return h("tr", {}, cells.map(([value, kind = ""], i) => h("td", { class: value === NONE ? `${kind} empty-cell` : kind, "data-name": COLUMNS[i][0].toLowerCase() }, value)), when);
}

/** Returns what `Chart.show` takes: one line per task. If a step was scored twice, the later score counts. */
export function chartContent([name, field, { format }], scores) {
  const colors = isDark() ? DARK_COLORS : LIGHT_COLORS;
  const tasks = [...new Set(scores.map((score) => score.task))].sort();
  const known = new Map(tasks.map((task) => [task, new Map(scores.filter((score) => score.task === task && Number.isFinite(score[field])).map((score) => [score.step, score[field]]))]));
  const traces = tasks.map((task, i) => {
    const points = [...known.get(task)];
    const line = { width: 1.5, color: colors[i % colors.length], dash: DASHES[Math.floor(i / colors.length) % DASHES.length] };
    return { uid: task, x: points.map(([step]) => step), y: points.map(([, value]) => value), mode: "lines+markers", marker: { size: 5 }, line, main: i === 0, end: task, counted: true };
  });
  const steps = [...new Set(scores.map((score) => score.step))].sort((a, b) => a - b);
  const values = () => steps.map((step) => [count(step), ...tasks.map((task) => format(known.get(task).get(step)))]);
  const newest = tasks.map((task) => `${task} ${format([...known.get(task).values()].at(-1))}`);
  return { traces, values, columns: [t("step"), ...tasks], label: t("{name}, newest: {values}", { name, values: newest.join(", ") }), note: "" };
}
