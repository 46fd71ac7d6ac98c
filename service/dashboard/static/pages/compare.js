// Several jobs over each other; a fork begins with its parent's curve. Only the settings in which they differ.
import { Refused, get, query } from "../api.js";
import { Board, Chart } from "../charts.js";
import { chosenView, controls } from "../chart-controls.js";
import { attr, h, list, show, text } from "../dom.js";
import { count, figure, loss, short } from "../format.js";
import { beat } from "../polling.js";
import { keep, kept } from "../router.js";
import { DARK, DASHES, LIGHT, described, forked, gaps, line, places, stepsOf } from "../chart-data.js";
import { differing } from "../spec-diff.js";
import { isDark } from "../theme.js";

const MOST = 10;
// Batches differ, so steps do not compare.
const USUAL = "tokens";
const POINTS = 1000;
const FIELDS = "learning_rate,grad_norm,tokens,tokens_per_second,at";
const CHARTS = [
  ["Train loss", "loss_ema", { height: 340, write: loss }],
  ["Gradient norm", "grad_norm", { height: 170, write: figure, log: true }],
  ["Tokens/s", "tokens_per_second", { height: 170, write: short, ticks: "~s" }],
  ["Learning rate", "learning_rate", { height: 170, write: figure }],
];

export const compare = { title: "Compare", open };

function open(place) {
  const page = new Page(place);
  return () => page.close();
}

class Page {
  constructor(place) {
    this.got = new Map();
    this.board = new Board();
    ({ axis: this.board.axis, half: this.half } = chosenView(USUAL));
    this.charts = CHARTS.map(([name, , options]) => new Chart(name, options));
    this.board.onTheme = () => this.draw();
    this.board.onZoom = () => this.look.now();
    const [first, ...small] = this.charts.map((chart) => this.board.add(chart));
    this.key = h("ul", { class: "key" });
    this.choices = h("div", { class: "choices" });
    this.hint = h("p", { class: "muted" }, "Choose jobs to lay over each other.");
    this.gone = h("p", { class: "wrong", role: "status", hidden: true });
    this.search = h("input", { type: "search", id: "find-job", placeholder: "Part of a name, or an id", autocomplete: "off", oninput: () => this.look.now() });
    this.table = h("table", {}, h("caption", { class: "unseen" }, "Differing settings"));
    this.settings = h("section", { hidden: true }, h("h2", {}, "Settings that differ"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Differing settings" }, this.table));
    this.drawn = h("div", { hidden: true }, this.key, first, h("div", { class: "small three" }, small));
    const chooser = h("details", { open: !this.chosen().length }, h("summary", {}, "Jobs"),
      h("div", { class: "bar" }, h("label", { for: "find-job" }, "Find"), this.search, h("span", { class: "muted" }, `up to ${MOST}`)), this.choices);
    place.append(h("h1", {}, "Compare"), this.controls(), chooser, this.hint, this.gone, this.drawn, this.settings);
    this.look = beat(() => this.load());
  }

  controls() {
    const axis = (chosen) => {
      this.board.axis = chosen;
      this.board.hover(null);
      this.board.setZoom(null);
      this.draw();
    };
    const half = (chosen) => {
      this.half = chosen;
      this.got.clear();
      this.look.now();
    };
    return controls({ axis: this.board.axis, half: this.half }, USUAL, axis, half);
  }

  chosen() {
    return (kept("jobs") ?? "").split(",").filter(Boolean).slice(0, MOST);
  }

  choose(id, wanted) {
    const others = this.chosen().filter((one) => one !== id);
    keep("jobs", (wanted ? [...others, id] : others).join(","));
    this.look.now();
  }

  async load() {
    const ids = this.chosen();
    this.jobs = (await get(query("/jobs", { search: this.search.value.trim(), limit: 100 }))).data;
    await Promise.all(ids.map((id) => this.fetch(id)));
    this.offer();
    const missing = ids.filter((id) => !this.got.has(id));
    show(this.gone, missing.length);
    text(this.gone, `Not there any more: ${missing.join(", ")}`);
    for (const id of this.got.keys()) if (!ids.includes(id)) this.got.delete(id);
    await this.draw();
  }

  /** A job's whole curve, where it has changed, and what is zoomed in to. */
  async fetch(id) {
    const address = `/jobs/${encodeURIComponent(id)}`;
    const job = this.jobs.find((one) => one.id === id) ?? (await get(address).catch(absent));
    if (!job) return;
    const known = this.got.get(id);
    const mark = `${job.progress.step} ${job.attempt} ${job.status}`;
    if (known?.mark !== mark) {
      const [whole, attempts] = await Promise.all([this.rows(job, [null, null]), get(`${address}/attempts`)]);
      this.got.set(id, { near: known?.near ?? null, mark, job, whole, attempts: attempts.data });
    }
    await this.focus(this.got.get(id));
  }

  async rows(job, [from, to]) {
    const wanted = { max_points: POINTS, ema_half_life: this.half, fields: FIELDS, lineage: job.parent ? true : null, after_step: from, until_step: to };
    return (await get(query(`/jobs/${encodeURIComponent(job.id)}/metrics`, wanted))).data;
  }

  /** Finer rows of what is zoomed in to. Those that are there stay until they come. */
  async focus(one) {
    const { zoom, axis } = this.board;
    const wanted = JSON.stringify([zoom, axis, one.mark]);
    if (one.focused === wanted) return;
    const [from, to] = stepsOf(zoom, axis, one.whole, one.attempts);
    const near = from === null ? null : await this.rows(one.job, [from, to]);
    Object.assign(one, { near, focused: wanted });
  }

  offer() {
    const ids = this.chosen();
    const chosen = ids.map((id) => this.got.get(id)?.job).filter(Boolean);
    const some = [...chosen, ...this.jobs.filter((job) => !ids.includes(job.id) && job.progress.step > 0)];
    list(this.choices, some, (job) => job.id, (job) => this.choice(job), (part, job) => {
      part.box.checked = ids.includes(job.id);
      part.box.disabled = !part.box.checked && ids.length >= MOST;
      text(part.name, `${job.name}  ${job.id}  ${job.status}  step ${count(job.progress.step)}`);
    });
  }

  choice(job) {
    const box = h("input", { type: "checkbox", id: `choose-${job.id}`, onchange: () => this.choose(job.id, box.checked) });
    const name = h("label", { for: `choose-${job.id}` });
    return Object.assign(h("div", {}, box, name), { box, name });
  }

  async draw() {
    const found = this.chosen().map((id) => this.got.get(id)).filter(Boolean);
    show(this.hint, !found.length);
    show(this.drawn, found.length);
    this.drawKey(found);
    this.drawSettings(found);
    if (!found.length) return;
    this.charts.forEach((chart, i) => chart.show(this.content(CHARTS[i], found)));
    await this.board.redraw();
  }

  style(i) {
    const colours = isDark() ? DARK : LIGHT;
    // The colours come again, with other dashes.
    const round = Math.floor(i / colours.length);
    return { color: colours[i % colours.length], dash: DASHES[(i + round) % DASHES.length] };
  }

  content([name, field, { write }], found) {
    const traces = found.flatMap((one, i) => this.lines(one, i, field, found));
    const label = `${described(name, rowsOf(found[0]), (row) => row[field] ?? null, write)}, ${found.length} ${found.length === 1 ? "job" : "jobs"}`;
    return { traces, values: tableOf(found, field, write), columns: ["step", ...found.map((one) => one.job.name)], label, note: "" };
  }

  /** A job's line; a fork's begins at its parent's, or with what it inherited from those that are not shown, thin. */
  lines(one, i, field, found) {
    const { job, attempts } = one;
    const { axis } = this.board;
    const style = this.style(i);
    const drawn = (uid, part, more) => ({ uid, ...line(places(part, axis, attempts), part.map((row) => row[field] ?? null), gaps(part, axis, attempts)), ...more });
    const [inherited, whole] = forked(rowsOf(one), job.id);
    // Its attempts say nothing of the time that its ancestors took.
    const joins = axis === "step" || axis === "tokens";
    const own = joins ? whole : whole.filter((row) => (row.job_id ?? job.id) === job.id);
    const mine = drawn(job.id, own, { line: { width: 1.8, ...style }, main: i === 0, end: job.name, counted: true });
    if (!joins || !inherited.length) return [mine];
    const shown = new Set(found.map((one) => one.job.id));
    const alone = inherited.filter((row) => !shown.has(row.job_id));
    const meeting = drawn(`${job.id}-joint`, own.slice(0, 1), { mode: "markers", marker: { size: 7, symbol: "circle-open", color: style.color, line: { width: 2, color: style.color } } });
    const before = drawn(`${job.id}-before`, alone, { line: { width: 1, color: style.color, dash: "dot" } });
    return alone.length ? [before, meeting, mine] : [meeting, mine];
  }

  drawKey(found) {
    list(this.key, found.map((one, i) => [one, i]), ([one]) => one.job.id, () => h("li", {}, h("span", { class: "swatch", "aria-hidden": "true" }), h("a"), h("span", { class: "muted" })), (part, [one, i]) => {
      const { color, dash } = this.style(i);
      part.firstChild.style.borderTopColor = color;
      part.firstChild.style.borderTopStyle = dash === "solid" ? "solid" : dash === "dot" ? "dotted" : "dashed";
      attr(part.children[1], "href", `/jobs/${one.job.id}`);
      text(part.children[1], one.job.name);
      const from = one.job.parent?.step ? `, ○ forked at step ${count(one.job.parent.step)}` : "";
      text(part.lastChild, `${one.job.status}, step ${count(one.job.progress.step)}, loss ${loss(one.job.progress.loss)}${from}`);
    });
  }

  drawSettings(found) {
    // The name stands in the head already.
    const rows = found.length > 1 ? differing(found.map((one) => one.job.spec)).filter(([name]) => name !== "name") : [];
    show(this.settings, rows.length);
    const mark = JSON.stringify([found.map((one) => one.job.id), rows]);
    if (mark === this.settingsMark) return;
    this.settingsMark = mark;
    const head = h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Setting"), found.map((one) => h("th", { scope: "col" }, one.job.name))));
    const body = h("tbody", {}, rows.map(([name, values]) => h("tr", {}, h("th", { scope: "row", class: "mono" }, name), values.map((value) => h("td", {}, value)))));
    this.table.replaceChildren(this.table.caption, head, body);
  }

  close() {
    this.look();
    this.board.close();
  }
}

/** What is drawn of a job: the part that is zoomed in to, once it is here. */
const rowsOf = ({ near, whole }) => near ?? whole;

/** A row for each step that any of them has, a column for each job. */
function tableOf(found, field, write) {
  const known = found.map((one) => new Map(rowsOf(one).map((row) => [row.step, row[field] ?? null])));
  const steps = [...new Set(known.flatMap((one) => [...one.keys()]))].sort((a, b) => a - b);
  return steps.map((step) => [count(step), ...known.map((one) => write(one.get(step)))]);
}

/** Nothing for a job that was deleted; other refusals go on. */
function absent(error) {
  if (error instanceof Refused && error.status === 404) return null;
  throw error;
}
