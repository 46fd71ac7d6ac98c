// The workspace: a live table of jobs, the curves of the chosen ones, and the queue. Its state is in the address.
import { get, nullIfNotFound, sendJson, token } from "../api.js";
import { confirmAction } from "../confirm.js";
import { announce, copyText, h, markPaint, setAttr, setText, setVisible, updateList } from "../dom.js";
import { count } from "../format.js";
import { t, tNodes, tn } from "../i18n.js";
import { addShortcuts } from "../keyboard.js";
import { Menu } from "../menu.js";
import { canWatch, isWatched, setWatched } from "../notifications.js";
import { poll } from "../polling.js";
import { getParam, navigate, setParam } from "../router.js";
import { FINAL_STATUSES } from "../status.js";
import { chosenSlots, setChosen } from "../workspace/chosen.js";
import { ColumnChooser, shownColumns } from "../workspace/column-chooser.js";
import { NAME_COLUMN, findColumn, sortRows } from "../workspace/columns.js";
import { Filters, isFiltered, jobMatcher, queryFilter, showsDiscarded } from "../workspace/filters.js";
import { FOLDS, foldJobs, foldName } from "../workspace/folding.js";
import { JobStore } from "../workspace/job-store.js";
import { JobTable } from "../workspace/job-table.js";
import { MAX_LINES, MAX_RUNS, RunCharts, lineStyle } from "../workspace/run-charts.js";

const SPARK_POINTS = 64;
const SPARK_REFRESH_MS = 10_000;
const MAX_SPARKS_PER_POLL = 6; // sparklines fetched in one poll
const MAX_QUEUE = 20;
const isActive = (job) => !FINAL_STATUSES.has(job.status);
/** `of(job)`: whether the status allows it; the service has the last word. `question(jobs)`: what is asked first, with the number of jobs as text. `change(job)`: fields to set. */
const BULK_ACTIONS = [
  { verb: "pause", label: t("Pause"), of: (job) => ["queued", "preparing", "starting", "running"].includes(job.status) },
  { verb: "resume", label: t("Resume"), of: (job) => job.resumable },
  { verb: "cancel", label: t("Cancel"), of: isActive, question: (jobs) => t("Cancel {jobs}? Each saves a checkpoint first and then stops.", { jobs }) },
  { verb: "kill", label: t("Kill"), of: (job) => ["starting", "running", "pausing", "cancelling"].includes(job.status), question: (jobs) => t("Kill {jobs} now? They save nothing: progress since their newest checkpoints is lost.", { jobs }) },
  { verb: "discard", label: t("Discard: hide from lists"), of: (job) => !job.discarded, change: () => ({ discarded: true }) },
];
const AUTH_OPTION = '-H "Authorization: Bearer $TRAINYARD_TOKEN" ';
const exampleCommands = () => ["trainyard demo", "trainyard submit --data_path corpus.jsonl --watch",
  `curl ${token.get() ? AUTH_OPTION : ""}--json '{"data": {"data_path": "/data/corpus.jsonl"}}' ${location.origin}/jobs`];

export const jobsPage = { title: t("Jobs"), open };

function open(place) {
  const page = new Workspace(place);
  return () => page.close();
}

/** Returns `{key, descending}` of the column to sort by; null for the newest jobs first. */
function sorting() {
  const text = getParam("sort") ?? "";
  const key = text.replace(/^-/, "");
  return findColumn(key) || key === NAME_COLUMN.key ? { key, descending: text.startsWith("-") } : null;
}

/** The first press on a header sorts by it, the second turns the order round, the third shows the newest first again. */
function nextSort(key) {
  const now = sorting();
  if (now?.key !== key) return key;
  return now.descending ? null : `-${key}`;
}

class Workspace {
  constructor(place) {
    this.stores = new Map();
    this.sparks = new Map();
    this.devices = [];
    [this.listed, this.lines, this.columns] = [[], [], []];
    this.open = new Set((getParam("open") ?? "").split(",").filter(Boolean));
    this.count = h("span", { class: "muted", role: "status" });
    this.fold = h("select", { id: "fold", onchange: () => (setParam("fold", this.fold.value), this.draw(), this.poller.now()) }, Object.entries(FOLDS).map(([value, label]) => h("option", { value }, label)));
    this.fold.value = this.foldMode();
    this.chooser = new ColumnChooser(() => this.listed, () => (this.draw(), this.poller.now()));
    this.filters = new Filters(() => (this.draw(), this.poller.now()), h("span", { class: "choice end" }, h("label", { for: "fold" }, t("Fold")), this.fold), this.chooser.node);
    this.table = new JobTable({ sort: (key) => this.sort(key), choose: (row, wanted) => this.choose(row, wanted), toggle: (row) => this.toggle(row), move: () => this.loadSparksSoon() });
    this.charts = new RunCharts(() => this.poller.now());
    this.build(place);
    this.removeShortcuts = addShortcuts(this.shortcuts());
    this.poller = poll(() => this.load());
  }

  build(place) {
    this.empty = emptyState();
    this.nothing = h("p", { class: "muted", hidden: true }, t("No job matches the search and the filters."), " ", h("a", { href: "/" }, t("Show all")));
    this.loading = h("p", { class: "muted", role: "status" }, t("Loading the jobs…"));
    this.chosenCount = h("h2");
    this.watch = h("button", { type: "button", class: "quiet", onclick: () => this.toggleWatch() });
    this.compare = h("a", { class: "button" }, t("Compare"));
    this.menu = new Menu(t("Actions"), () => this.chosenActions(), { name: t("Actions on the chosen jobs") });
    const clear = h("button", { type: "button", class: "quiet", onclick: () => this.clear() }, t("Clear"));
    this.missingNote = h("p", { class: "muted", hidden: true });
    this.curves = h("section", { class: "curves", hidden: true, "aria-label": t("Curves of the chosen jobs") },
      h("div", { class: "head" }, this.chosenCount, h("div", { class: "bar" }, this.charts.controls, this.watch, this.menu.node, this.compare, clear)), this.missingNote, this.charts.node);
    this.queue = h("ol", { class: "queue" });
    this.queueRest = h("p", { class: "muted", hidden: true }, h("span"), " ", h("a", { href: "/system" }, t("Show the queue")));
    this.queueBox = h("section", { hidden: true }, h("h2", {}, t("Queue")), this.queue, this.queueRest);
    this.place = place;
    place.classList.add("workspace");
    place.append(h("div", { class: "head" }, h("h1", {}, t("Jobs")), this.count, h("a", { class: "button primary", href: "/submit" }, t("New job"))), this.filters.node,
      this.loading, this.empty, this.nothing, this.table.node, this.curves, this.queueBox);
    for (const part of [this.empty, this.table.node, this.filters.node]) setVisible(part, false);
  }

  foldMode() {
    return getParam("fold") in FOLDS ? getParam("fold") : "";
  }

  store() {
    const discarded = showsDiscarded();
    if (!this.stores.has(discarded)) this.stores.set(discarded, new JobStore(discarded));
    return this.stores.get(discarded);
  }

  async load() {
    const store = this.store();
    await store.update(queryFilter(), () => this.draw());
    if (this.columns.some((column) => column.key === "devices")) this.devices = (await get("/devices")).data;
    await this.findChosen();
    this.draw();
    await this.charts.update(this.lines);
    await this.loadSparks();
    this.draw();
  }

  /** Fetches the chosen jobs that are in no list, such as a discarded one, with each poll until they have ended. */
  async findChosen() {
    this.others ??= new Map();
    const isKnown = (id) => this.others.get(id) === null || FINAL_STATUSES.has(this.others.get(id)?.status);
    const due = chosenSlots().filter((id) => id && !this.findListed(id) && !isKnown(id));
    await Promise.all(due.map(async (id) => this.others.set(id, await get(`/jobs/${encodeURIComponent(id)}`).catch(nullIfNotFound))));
  }

  findListed(id) {
    for (const store of this.stores.values()) if (store.jobs.has(id)) return store.jobs.get(id);
    return null;
  }

  find(id) {
    return this.findListed(id) ?? this.others?.get(id) ?? null;
  }

  /** Fetches the sparklines of the jobs in view; a finished job's only once. */
  async loadSparks() {
    if (!this.columns.some((column) => column.key === "curve")) return;
    const due = this.table.jobsInView().filter((job) => {
      const known = this.sparks.get(job.id);
      const same = known?.step === job.progress.step;
      return job.progress.step > 0 && !same && !(known && !FINAL_STATUSES.has(job.status) && performance.now() - known.at < SPARK_REFRESH_MS);
    });
    await Promise.all(due.slice(0, MAX_SPARKS_PER_POLL).map(async (job) => {
      const metrics = await get(`/jobs/${job.id}/metrics?max_points=${SPARK_POINTS}`);
      const values = metrics.data.map((point) => point.loss_ema).filter((value) => value !== null);
      this.sparks.set(job.id, { at: performance.now(), step: job.progress.step, values });
    }));
    if (due.length > MAX_SPARKS_PER_POLL) this.loadSparksSoon();
  }

  /** Scrolling shows jobs without a sparkline. */
  loadSparksSoon() {
    clearTimeout(this.sparkTimer);
    this.sparkTimer = setTimeout(() => !document.hidden && this.loadSparks().then(() => this.table.refresh(), () => {}), 150);
  }

  sort(key) {
    setParam("sort", nextSort(key));
    this.draw();
  }

  toggle(row) {
    if (!this.open.delete(row.key)) this.open.add(row.key);
    setParam("open", [...this.open].join(","));
    this.draw();
  }

  choose(row, wanted) {
    const before = location.href;
    const ids = row.jobs.map((job) => job.id);
    setChosen(ids, wanted);
    const runs = chosenSlots().filter(Boolean).length;
    if (wanted && (runs > MAX_RUNS || this.chosenLines().length > MAX_LINES)) {
      history.replaceState(null, "", before);
      announce(t("At most {lines} curves of {runs} jobs are drawn", { lines: MAX_LINES, runs: MAX_RUNS }));
    }
    this.drawCurves();
  }

  clear() {
    setParam("jobs", null);
    this.drawCurves();
  }

  /** Draws the chosen curves now; the next poll tries again if the service is unreachable. */
  drawCurves() {
    this.draw();
    this.charts.update(this.lines).catch(() => this.poller.now());
  }

  /** The lines to draw: `{key, name, slot, jobs}`, in the order of their slots. Folded jobs are one line. */
  chosenLines() {
    const slots = chosenSlots();
    const jobs = slots.filter(Boolean).map((id) => this.find(id)).filter(Boolean);
    const folds = foldJobs(jobs, this.foldMode());
    const isFolded = folds.length < jobs.length;
    return folds.map(({ key, jobs: members }, i) => ({ key, jobs: members, name: this.nameOf(key, members), slot: isFolded ? i : slots.indexOf(members[0].id) }));
  }

  nameOf(key, jobs) {
    return this.foldMode() === "group" && key.startsWith("fold-") ? jobs[0].group : foldName(jobs);
  }

  /** The rows of the table: sorted, folded, and the jobs of an open fold below it. */
  rows() {
    const order = sorting();
    const column = order && (order.key === NAME_COLUMN.key ? NAME_COLUMN : findColumn(order.key));
    const sort = (rows) => (column ? sortRows(rows, column, order.descending) : rows);
    const slots = new Set(chosenSlots());
    const styles = new Map(this.lines.flatMap((line) => [[line.key, lineStyle(line.slot)], ...(line.jobs.length === 1 ? [[line.jobs[0].id, lineStyle(line.slot)]] : [])]));
    const row = (key, jobs, name, depth) => ({ key, jobs, name, depth, open: this.open.has(key), chosen: jobs.filter((job) => slots.has(job.id)).length, style: styles.get(key) ?? null });
    const folds = foldJobs(this.listed, this.foldMode()).map(({ key, jobs }) => row(key, jobs, this.nameOf(key, jobs), 0));
    return sort(folds).flatMap((fold) => {
      if (fold.jobs.length === 1 || !fold.open) return [fold];
      return [fold, ...sort(fold.jobs.map((job) => row(job.id, [job], job.name, 1)))];
    });
  }

  draw() {
    const store = this.store();
    const jobs = store.all();
    this.listed = jobs.filter(jobMatcher());
    this.lines = this.chosenLines();
    this.columns = shownColumns(jobs);
    const some = this.listed.length > 0;
    const isLoading = store.loadedAt === null;
    setVisible(this.loading, isLoading && !some);
    setVisible(this.empty, !isLoading && !jobs.length && !isFiltered());
    setVisible(this.nothing, !isLoading && !some && isFiltered());
    setVisible(this.filters.node, some || isFiltered());
    setVisible(this.table.node, some);
    this.filters.offer(jobs);
    setText(this.count, this.countText(store, jobs));
    this.table.show({ rows: this.rows(), columns: this.columns, sort: sorting(), isFull: this.lines.length >= MAX_LINES, context: { devices: (job) => this.held(job), spark: (job) => this.sparks.get(job.id)?.values ?? [] } });
    if (some) markPaint("text");
    this.drawChosen();
    this.drawQueue(jobs);
  }

  countText(store, jobs) {
    const more = store.isComplete ? "" : "+";
    const all = tn(jobs.length, "{n} job", "{n} jobs", { n: `${count(jobs.length)}${more}` });
    if (store.loadedAt === null) return t("{jobs}, loading", { jobs: all });
    return this.listed.length < jobs.length ? t("{n} of {jobs}", { n: count(this.listed.length), jobs: all }) : all;
  }

  held(job) {
    return this.devices.filter((device) => device.job_id === job.id).map((device) => device.id);
  }

  drawChosen() {
    const jobs = this.lines.flatMap((line) => line.jobs);
    setVisible(this.curves, jobs.length);
    this.place.classList.toggle("charted", jobs.length > 0);
    setText(this.chosenCount, t("{n} chosen", { n: count(jobs.length) }));
    setAttr(this.compare, "href", `/compare?jobs=${jobs.slice(0, MAX_LINES).map((job) => job.id).join(",")}`);
    setVisible(this.compare, jobs.length > 1);
    const watchable = jobs.filter(canWatch);
    setVisible(this.watch, watchable.length);
    setText(this.watch, watchable.every(isWatched) ? t("Do not notify me") : t("Notify me at the end"));
    const missing = chosenSlots().filter((id) => id && this.others?.get(id) === null && !this.find(id));
    setVisible(this.missingNote, missing.length);
    setText(this.missingNote, t("Not found: {ids}", { ids: missing.join(", ") }));
    this.charts.setLines(this.lines);
  }

  toggleWatch() {
    const jobs = this.lines.flatMap((line) => line.jobs).filter(canWatch);
    setWatched(jobs, !jobs.every(isWatched)).then(() => this.drawChosen());
    this.drawChosen();
  }

  /** Items of the menu: each acts on those of the chosen jobs whose status allows it. */
  chosenActions() {
    const jobs = this.lines.flatMap((line) => line.jobs);
    return BULK_ACTIONS.map(({ verb, label, of, question, change }) => {
      const fitting = jobs.filter(of);
      const what = tn(fitting.length, "{n} job", "{n} jobs", { n: count(fitting.length) });
      const press = async () => {
        if (question && !(await confirmAction(question(what), label))) return;
        await this.actOn(fitting, (job) => (change ? sendJson("PATCH", `/jobs/${job.id}`, change(job)) : sendJson("POST", `/jobs/${job.id}/${verb}`)), label);
      };
      return { label: fitting.length ? `${label}: ${what}` : label, why: fitting.length ? null : t("no chosen job is in a state for it"), danger: Boolean(question), press };
    });
  }

  /** Acts on one job after the other, and says how many the service refused and why the first one was. */
  async actOn(jobs, act, label) {
    const refused = [];
    for (const job of jobs) await act(job).catch((error) => refused.push(`${job.name}: ${error.message}`));
    announce([t("{action}: {done} of {all}", { action: label, done: count(jobs.length - refused.length), all: count(jobs.length) }), ...refused.slice(0, 1)].join(". "));
    this.poller.now();
  }

  drawQueue(jobs) {
    const queued = jobs.filter((job) => job.status === "queued" && job.queue).sort((a, b) => a.queue.position - b.queue.position);
    setVisible(this.queueBox, queued.length);
    setVisible(this.queueRest, queued.length > MAX_QUEUE);
    setText(this.queueRest.firstChild, t("and {n} more.", { n: count(queued.length - MAX_QUEUE) }));
    updateList(this.queue, queued.slice(0, MAX_QUEUE), (job) => job.id, () => h("li", {}, h("a"), h("span", { class: "muted" })), (part, job) => {
      setAttr(part, "value", job.queue.position);
      setAttr(part.firstChild, "href", `/jobs/${job.id}`);
      setText(part.firstChild, job.name);
      const priority = job.spec?.resources.priority;
      const waits = { what: job.queue.waiting_for, priority };
      setText(part.lastChild, ` ${priority ? t("waits for {what}, priority {priority}", waits) : t("waits for {what}", waits)}`);
    });
  }

  shortcuts() {
    const focused = (act) => () => {
      const row = this.table.focusedRow();
      return row ? act(row) : false;
    };
    return [
      { key: "j", does: t("move to the next row"), run: () => this.table.moveFocus(1) },
      { key: "k", does: t("move to the previous row"), run: () => this.table.moveFocus(-1) },
      { key: "x", does: t("choose the row, or not"), run: focused((row) => this.choose(row, row.chosen < row.jobs.length)) },
      { key: "o", does: t("open the job of the row, or its fold"), run: focused((row) => (row.jobs.length > 1 ? this.toggle(row) : navigate(`/jobs/${row.jobs[0].id}`))) },
      { key: "c", does: t("compare the chosen jobs on a page"), run: () => (this.lines.length ? navigate(this.compare.getAttribute("href")) : announce(t("Choose jobs first: x, or their check boxes"))) },
    ];
  }

  close() {
    this.poller();
    clearTimeout(this.sparkTimer);
    this.removeShortcuts();
    this.filters.close();
    this.chooser.close();
    this.table.close();
    this.charts.close();
  }
}

function emptyState() {
  const parts = exampleCommands().map((command) =>
    h("div", { class: "command" }, h("pre", { tabindex: "0" }, command), h("button", { type: "button", "aria-label": t("Copy: {command}", { command }), onclick: () => copyText(command, t("Command")) }, t("Copy"))));
  return h("div", { class: "empty" }, h("h2", {}, t("No job yet")), h("p", {}, tNodes("Start one with any of these commands, or with {form}:", { form: h("a", { href: "/submit" }, t("the form")) })), parts);
}
