// The jobs page: a live table with search and filters, and the queue.
import { get, token, withQuery } from "../api.js";
import { copyText, createTable, h, setAttr, setText, setVisible, svg, updateList } from "../dom.js";
import { NONE, ago, compactNumber, count, dateTime, duration, loss, percent } from "../format.js";
import { poll } from "../polling.js";
import { getParam, getParams, setParam, setParams } from "../router.js";
import { FINAL_STATUSES, STATUSES, showStatus, statusBadge } from "../status.js";

// Search and filters of the jobs page: text, status, labels, group and discarded jobs, all kept in the URL.

const SCORES = { bpb: "best held-out bits per byte,", eval_loss: "best held-out loss,", loss: "smoothed loss" };
const DEBOUNCE_MS = 250; // Wait until the user stops typing.

/** Returns the query parameters for `/jobs`. */
function jobFilter() {
  const status = getParam("status");
  return { search: getParam("search"), status: status === "active" ? STATUSES.filter((name) => !FINAL_STATUSES.has(name)) : status, label: getParams("label").filter((name) => name.includes("=")),
    group: getParam("group"), discarded: getParam("discarded") ? "true" : null };
}

const isFiltered = () => Boolean(getParam("search") || getParam("status") || getParam("group") || getParam("discarded") || getParams("label").length);

class Filters {
  /** `onChange` is called after every change of a filter. */
  constructor(onChange) {
    this.onChange = onChange;
    this.search = h("input", { type: "search", id: "search", placeholder: "Part of a name, or an id", value: getParam("search") ?? "", oninput: () => this.onInput() });
    const options = [["", "any status"], ["active", "not finished"], ...STATUSES.map((name) => [name, name])];
    this.status = h("select", { id: "status", onchange: () => (setParam("status", this.status.value), onChange()) }, options.map(([value, label]) => h("option", { value }, label)));
    this.status.value = getParam("status") ?? "";
    this.label = h("input", { id: "label", placeholder: "key=value", size: "14", autocomplete: "off", onchange: () => this.add() });
    this.discarded = h("input", { type: "checkbox", id: "discarded", onchange: () => (setParam("discarded", this.discarded.checked ? "1" : ""), onChange()) });
    this.discarded.checked = getParam("discarded") !== null;
    this.chosen = h("span", { class: "labels chosen" });
    this.node = h("form", { class: "bar", role: "search", onsubmit: (event) => (event.preventDefault(), this.add()) }, h("label", { for: "search" }, "Search"), this.search,
      h("span", { class: "choice" }, h("label", { for: "status" }, "Status"), this.status), h("span", { class: "choice" }, h("label", { for: "label" }, "Label"), this.label),
      h("span", { class: "choice" }, this.discarded, h("label", { for: "discarded" }, "Discarded")), this.chosen);
    this.draw();
  }

  onInput() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (setParam("search", this.search.value.trim()), this.onChange()), DEBOUNCE_MS);
  }

  /** Adds a label filter; a job must match all of them. */
  add() {
    const text = this.label.value.trim();
    const broken = text !== "" && !text.includes("=");
    setAttr(this.label, "aria-invalid", broken ? "true" : null);
    if (broken || text === "") return;
    this.label.value = "";
    this.set([...new Set([...getParams("label"), text])]);
  }

  set(labels) {
    setParams("label", labels);
    this.draw();
    this.onChange();
  }

  /** Shows the chosen labels and the chosen group; a press removes one. */
  draw() {
    const group = getParam("group");
    const remove = (label) => {
      if (label.startsWith("group ")) setParam("group", "");
      this.set(getParams("label").filter((other) => other !== label));
      this.label.focus();
    };
    updateList(this.chosen, [...(group ? [`group ${group}`] : []), ...getParams("label")], (label) => label, (label) => h("button", { type: "button", class: "label", "aria-label": `Remove filter ${label}`, onclick: () => remove(label) }, label, " ×"));
  }

  close() {
    clearTimeout(this.timer);
  }
}

// A job as a table row: created once, then updated in place.

const isRunning = (job) => job.status === "running";

/** The columns: [label, class, value to sort by]. A press on the header sorts by it; a second one turns the order round. */
const COLUMNS = [
  ["Job", "", (job) => job.created_at], ["Group", "", (job) => job.group], ["Status", "", (job) => job.status], ["Progress", "", (job) => job.progress.percent],
  ["Loss", "num", (job) => job.progress.loss], ["Score", "num", (job) => job.score?.value ?? null], ["Curve", "num", null], ["Tokens/s", "num", (job) => (isRunning(job) ? job.progress.tokens_per_second : null)],
  ["ETA", "num", (job) => (isRunning(job) ? job.progress.eta_seconds : null)], ["Devices", "", (job, devices) => devices(job).join(", ") || null],
];
/** Orders of the service, which sorts all jobs; by another column the page sorts those that it has loaded. */
const SERVICE_ORDERS = { Job: "oldest", "-Job": "newest", Score: "score", "-Score": "-score" };

/** Returns [label of the column to sort by, whether in descending order]; by default the newest jobs are first. */
function sorting() {
  const text = getParam("sort") ?? "-Job";
  return text.startsWith("-") ? [text.slice(1), true] : [text, false];
}

/** Returns the jobs by the chosen column; those without a value are last. */
function sortJobs(jobs, devices) {
  const [label, descending] = sorting();
  const value = COLUMNS.find(([name]) => name === label)?.[2];
  if (!value || getParam("sort") in SERVICE_ORDERS || getParam("sort") === null) return jobs;
  const compare = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1 : (a < b ? -1 : 1) * (descending ? -1 : 1));
  return jobs.map((job) => [value(job, devices) ?? null, job]).sort(([a], [b]) => compare(a, b)).map(([, job]) => job);
}

function createJobRow() {
  const cells = {
    name: h("a", { class: "name" }), id: h("code"), made: h("span"), labels: h("span", { class: "labels" }), status: statusBadge(), why: h("span", { class: "status-detail" }),
    step: h("span"), share: h("span", { class: "muted" }), meter: h("progress", { class: "meter", max: "100" }), loss: h("span"), line: svg("polyline"),
    group: h("a"), score: h("span"), rate: h("td", { class: "num", "data-name": "tok/s" }), eta: h("td", { class: "num", "data-name": "ETA" }), devices: h("td", { class: "devices", "data-name": "on" }),
  };
  cells.spark = svg("svg", { class: "spark", viewBox: "0 0 84 22", "aria-hidden": "true" }, cells.line);
  const part = h("tr", {}, h("td", {}, cells.name, h("span", { class: "job-meta" }, cells.id, cells.made, cells.labels)), h("td", { "data-name": "group" }, cells.group), h("td", {}, cells.status, cells.why),
    h("td", { class: "progress" }, h("span", { class: "progress-text" }, cells.step, cells.share), cells.meter), h("td", { class: "num", "data-name": "loss" }, cells.loss), h("td", { class: "num", "data-name": "score" }, cells.score), h("td", {}, cells.spark), cells.rate, cells.eta, cells.devices);
  return Object.assign(part, { inside: cells });
}

/** Updates a row. `devices`: ids that the job holds; `curve`: recent values of its loss. */
function updateJobRow(part, job, devices, curve) {
  const { inside: cells } = part;
  const { progress } = job;
  setAttr(cells.name, "href", `/jobs/${job.id}`);
  setText(cells.name, job.name);
  setText(cells.id, job.id);
  setText(cells.made, ago(job.created_at));
  setAttr(cells.made, "title", dateTime(job.created_at));
  updateList(cells.labels, Object.entries(job.labels), ([key]) => key, () => h("a", { class: "label" }), (tag, [key, value]) => {
    setText(tag, `${key}=${value}`);
    setAttr(tag, "href", `/?label=${encodeURIComponent(`${key}=${value}`)}`);
  });
  showStatus(cells.status, job.status);
  setText(cells.why, statusDetail(job));
  setCell(cells.step, progress.steps ? `${count(progress.step)} / ${count(progress.steps)}` : progress.step ? count(progress.step) : NONE);
  setText(cells.share, progress.steps ? percent(progress.percent) : "");
  setVisible(cells.meter, progress.percent !== null);
  setAttr(cells.meter, "value", progress.percent ?? 0);
  setAttr(cells.meter, "aria-label", `Progress of ${job.name}`);
  setCell(cells.loss, progress.nonfinite ? "not finite" : loss(progress.loss));
  setCell(cells.score, job.score ? loss(job.score.value) : NONE);
  setAttr(cells.score, "title", job.score && `${SCORES[job.score.metric]} at step ${count(job.score.step)}`);
  setCell(cells.group, job.group ?? NONE);
  setAttr(cells.group, "href", job.group === null ? null : `/?group=${encodeURIComponent(job.group)}`);
  setAttr(cells.name, "title", job.description || null);
  const running = isRunning(job);
  setCell(cells.rate, running ? compactNumber(progress.tokens_per_second) : NONE);
  setCell(cells.eta, running ? duration(progress.eta_seconds) : NONE);
  setCell(cells.devices, devices.join(", ") || NONE);
  drawSparkline(cells.line, curve);
}

/** Sets the text of a cell. In a narrow window, CSS hides cells without a value. */
function setCell(node, text) {
  setText(node, text);
  node.closest("td").classList.toggle("empty-cell", text === NONE);
}

/** Why the job is not simply running: what it waits for, its phase, or why it ended. */
function statusDetail(job) {
  if (job.status === "queued") return `position ${count(job.queue.position)}, waits for ${job.queue.waiting_for}`;
  if (job.preparation) return `corpus ${percent(job.preparation.percent)}, ${duration(job.preparation.eta_seconds)} left`;
  const spaced = (name) => name?.replaceAll("_", " ");
  return [job.phase && job.phase !== "training" ? spaced(job.phase) : null, spaced(job.reason)].filter(Boolean).join(", ");
}

function drawSparkline(line, values) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const at = (value, i) => `${((i / Math.max(1, values.length - 1)) * 82 + 1).toFixed(1)},${(20 - ((value - low) / span) * 18).toFixed(1)}`;
  setAttr(line, "points", values.length > 1 ? values.map(at).join(" ") : "");
}

const PAGE_SIZE = 100;
const SPARK_POINTS = 64;
const SPARK_REFRESH_MS = 10_000;
const MAX_SPARKS_PER_POLL = 6; // sparklines fetched in one poll
const AUTH_OPTION = '-H "Authorization: Bearer $TRAINYARD_TOKEN" ';
const exampleCommands = () => ["trainyard demo", "trainyard submit --data_path corpus.jsonl --watch",
  `curl ${token.get() ? AUTH_OPTION : ""}--json '{"data": {"data_path": "/data/corpus.jsonl"}}' ${location.origin}/jobs`];

export const jobsPage = { title: "Jobs", open };

function open(place) {
  const state = { jobs: [], devices: [], queued: [], sparks: new Map(), more: false, limit: PAGE_SIZE };
  const view = build(place, state, () => poller.now());
  const poller = poll(async () => {
    await load(state);
    draw(view, state);
    await loadSparks(state);
    draw(view, state);
  });
  return () => (poller(), view.filters.close());
}

async function load(state) {
  const filter = { ...jobFilter(), order: SERVICE_ORDERS[getParam("sort") ?? "-Job"], limit: PAGE_SIZE };
  const pages = [await get(withQuery("/jobs", filter))];
  while (pages.at(-1).has_more && pages.length * PAGE_SIZE < state.limit) {
    pages.push(await get(withQuery("/jobs", { ...filter, after: pages.at(-1).data.at(-1).id })));
  }
  state.jobs = pages.flatMap((page) => page.data);
  state.more = pages.at(-1).has_more;
  const [queued, devices] = await Promise.all([get("/jobs?status=queued&limit=100"), get("/devices")]);
  state.queued = queued.data.sort((a, b) => a.queue.position - b.queue.position);
  state.devices = devices.data;
}

/** Fetches the sparklines of the newest jobs; a finished job's only once. */
async function loadSparks(state) {
  const due = state.jobs.slice(0, 30).filter((job) => {
    const known = state.sparks.get(job.id);
    const same = known?.step === job.progress.step;
    return job.progress.step > 0 && !same && !(known && !FINAL_STATUSES.has(job.status) && performance.now() - known.at < SPARK_REFRESH_MS);
  });
  await Promise.all(due.slice(0, MAX_SPARKS_PER_POLL).map(async (job) => {
    const metrics = await get(`/jobs/${job.id}/metrics?max_points=${SPARK_POINTS}`);
    const values = metrics.data.map((point) => point.loss_ema).filter((value) => value !== null);
    state.sparks.set(job.id, { at: performance.now(), step: job.progress.step, values });
  }));
}

function build(place, state, again) {
  const view = { filters: new Filters(again), rows: createTable(COLUMNS, "Jobs"), queue: h("ol", { class: "queue" }), count: h("span", { class: "muted", role: "status" }) };
  view.rows.node.classList.add("stack");
  view.heads = COLUMNS.map(([label, , value], i) => sortButton(view.rows.node.querySelectorAll("th")[i], label, value, () => (draw(view, state), again())));
  view.empty = emptyState();
  view.nothing = h("p", { class: "muted", hidden: true }, "No job matches the search and the filters. ", h("a", { href: "/" }, "Show all"));
  view.more = h("button", { type: "button", hidden: true, onclick: () => ((state.limit += PAGE_SIZE), again()) }, `Show ${PAGE_SIZE} more`);
  view.queueBox = h("section", { hidden: true }, h("h2", {}, "Queue"), view.queue);
  place.append(h("div", { class: "head" }, h("h1", {}, "Jobs"), view.count, h("a", { class: "button", href: "/submit" }, "New job")), view.filters.node,
    view.empty, view.nothing, view.rows.node, view.more, view.queueBox);
  for (const part of [view.empty, view.rows.node]) setVisible(part, false);
  return view;
}

/** Replaces the label of a header by a button that sorts by its column, and returns a function that shows the order. */
function sortButton(head, label, value, onChange) {
  if (!value) return () => {};
  const press = () => {
    const [chosen, descending] = sorting();
    setParam("sort", chosen === label && !descending ? `-${label}` : label);
    onChange();
  };
  const mark = h("span", { "aria-hidden": "true" });
  head.replaceChildren(h("button", { type: "button", class: "quiet sort", onclick: press }, label, mark));
  return () => {
    const [chosen, descending] = sorting();
    setAttr(head, "aria-sort", chosen !== label ? null : descending ? "descending" : "ascending");
    setText(mark, chosen !== label ? "" : descending ? " ↓" : " ↑");
  };
}

function emptyState() {
  const parts = exampleCommands().map((command) =>
    h("div", { class: "command" }, h("pre", { tabindex: "0" }, command), h("button", { type: "button", "aria-label": `Copy: ${command}`, onclick: () => copyText(command, "Command") }, "Copy")));
  return h("div", { class: "empty" }, h("h2", {}, "No job yet"), h("p", {}, "Start one with any of these commands, or with ", h("a", { href: "/submit" }, "the form"), ":"), parts);
}

function draw(view, state) {
  const jobs = state.jobs;
  setVisible(view.empty, !jobs.length && !isFiltered());
  setVisible(view.nothing, !jobs.length && isFiltered());
  setVisible(view.filters.node, jobs.length || isFiltered());
  setVisible(view.rows.node, jobs.length);
  setVisible(view.more, state.more);
  setText(view.count, `${count(jobs.length)}${state.more ? "+" : ""} ${jobs.length === 1 ? "job" : "jobs"}`);
  view.heads.forEach((show) => show());
  const held = (job) => state.devices.filter((device) => device.job_id === job.id).map((device) => device.id);
  updateList(view.rows.body, sortJobs(jobs, held), (job) => job.id, createJobRow, (part, job) => updateJobRow(part, job, held(job), state.sparks.get(job.id)?.values ?? []));
  setVisible(view.queueBox, state.queued.length);
  updateList(view.queue, state.queued, (job) => job.id, () => h("li", {}, h("a"), h("span", { class: "muted" })), (part, job) => {
    setAttr(part, "value", job.queue.position);
    setAttr(part.firstChild, "href", `/jobs/${job.id}`);
    setText(part.firstChild, job.name);
    const { priority } = job.spec.resources;
    setText(part.lastChild, ` waits for ${job.queue.waiting_for}${priority ? `, priority ${priority}` : ""}`);
  });
}
