// All jobs: live, searched and filtered in the address, with the queue and why each in it waits.
import { get, query } from "../api.js";
import { attr, copy, h, list, show, svg, table, text } from "../dom.js";
import { NONE, count, duration, loss, percent, short } from "../format.js";
import { beat } from "../live.js";
import { keep, kept } from "../router.js";
import { OVER, STATUSES, badge, showStatus } from "../status.js";

const SPARK_POINTS = 64;
const SPARK_MS = 10_000;
const COMMANDS = ["trainyard demo", "trainyard submit --data_path corpus.jsonl --watch",
  `curl --json '{"data": {"data_path": "/data/corpus.jsonl"}}' ${location.origin}/jobs`];
const COLUMNS = [["Job"], ["Status"], ["Progress"], ["Loss", "num"], ["Curve", "num"], ["Tokens/s", "num"], ["ETA", "num"], ["Devices"]];

export const jobs = { title: "Jobs", open };

function open(place) {
  const state = { jobs: [], devices: [], sparks: new Map(), more: false, limit: 100 };
  const view = build(place, state, () => look.now());
  const look = beat(async () => {
    await load(state);
    draw(view, state);
  });
  return look;
}

async function load(state) {
  const filter = { status: kept("status"), label: labelOf(kept("label")), limit: 100 };
  const pages = [await get(query("/jobs", filter))];
  while (pages.at(-1).has_more && pages.length * 100 < state.limit) {
    pages.push(await get(query("/jobs", { ...filter, after: pages.at(-1).data.at(-1).id })));
  }
  state.jobs = pages.flatMap((page) => page.data);
  state.more = pages.at(-1).has_more;
  state.queued = (await get("/jobs?status=queued&limit=100")).data;
  state.devices = (await get("/devices")).data;
  await sparks(state);
}

const labelOf = (given) => (given?.includes("=") ? given : null);

/** Curves of the newest jobs; one that is over is asked for once. */
async function sparks(state) {
  const wanted = state.jobs.slice(0, 30).filter((job) => {
    const known = state.sparks.get(job.id);
    const same = known?.step === job.progress.step;
    return job.progress.step > 0 && !same && !(known && !OVER.has(job.status) && performance.now() - known.at < SPARK_MS);
  });
  for (const job of wanted.slice(0, 6)) {
    const found = await get(`/jobs/${job.id}/metrics?max_points=${SPARK_POINTS}`);
    const values = found.data.map((row) => row.loss_ema).filter((value) => value !== null);
    state.sparks.set(job.id, { at: performance.now(), step: job.progress.step, values });
  }
}

function build(place, state, again) {
  const search = h("input", { type: "search", id: "search", placeholder: "Name or id", value: kept("search") ?? "" });
  const status = h("select", { id: "status" }, h("option", { value: "" }, "any status"), STATUSES.map((name) => h("option", { value: name }, name)));
  const label = h("input", { id: "label", placeholder: "key=value", value: kept("label") ?? "", size: "14" });
  status.value = kept("status") ?? "";
  const view = { search, rows: table(COLUMNS, "Jobs"), queue: h("ol", { class: "queue" }), count: h("p", { class: "muted" }) };
  view.rows.node.classList.add("jobs");
  search.addEventListener("input", () => (keep("search", search.value), draw(view, state)));
  status.addEventListener("change", () => (keep("status", status.value), again()));
  label.addEventListener("change", () => (keep("label", label.value), again()));
  view.empty = empty();
  view.nothing = h("p", { class: "muted", hidden: true }, "No job fits the search and the filters.");
  view.more = h("button", { type: "button", hidden: true, onclick: () => ((state.limit += 100), again()) }, "Show 100 more");
  view.queueBox = h("section", { hidden: true }, h("h2", {}, "Queue"), view.queue);
  view.bar = h("div", { class: "bar" }, h("label", { for: "search" }, "Search"), search, h("label", { for: "status" }, "Status"), status,
    h("label", { for: "label" }, "Label"), label, view.count);
  place.append(h("h1", {}, "Jobs"), view.bar, view.empty, view.nothing, view.rows.node, view.more, view.queueBox);
  show(view.empty, false);
  return view;
}

function empty() {
  const commands = COMMANDS.map((words) =>
    h("div", { class: "command" }, h("pre", { tabindex: "0" }, words), h("button", { type: "button", onclick: () => copy(words, "Command") }, "Copy")));
  return h("div", { class: "empty" }, h("h2", {}, "No job yet"), h("p", {}, "Any of these starts one:"), commands);
}

function draw(view, state) {
  const wanted = view.search.value.trim().toLowerCase();
  const found = state.jobs.filter((job) => `${job.name} ${job.id}`.toLowerCase().includes(wanted));
  const filtered = wanted || kept("status") || kept("label");
  show(view.empty, !state.jobs.length && !filtered);
  show(view.nothing, !found.length && filtered);
  show(view.rows.node, found.length);
  show(view.more, state.more);
  text(view.count, `${count(found.length)}${state.more ? "+" : ""} ${found.length === 1 ? "job" : "jobs"}`);
  list(view.rows.body, found, (job) => job.id, row, (part, job) => update(part, job, state));
  const queued = [...(state.queued ?? [])].sort((a, b) => a.queue.position - b.queue.position);
  show(view.queueBox, queued.length);
  list(view.queue, queued, (job) => job.id, () => h("li", {}, h("a"), h("span", { class: "muted" })), (part, job) => {
    attr(part, "value", job.queue.position);
    attr(part.firstChild, "href", `/jobs/${job.id}`);
    text(part.firstChild, job.name);
    text(part.lastChild, ` waits for ${job.queue.waiting_for}`);
  });
}

function row() {
  const cells = {
    name: h("a", { class: "name" }), id: h("small", { class: "mono" }), labels: h("div", { class: "labels" }), status: badge(), why: h("span", { class: "why" }),
    step: h("span"), meter: h("progress", { class: "meter", max: "100" }), loss: h("span"), line: svg("polyline"),
    rate: h("td", { class: "num", "data-name": "tok/s" }), eta: h("td", { class: "num", "data-name": "ETA" }), devices: h("td", {}),
  };
  cells.spark = svg("svg", { class: "spark", viewBox: "0 0 84 22", "aria-hidden": "true" }, cells.line);
  const part = h("tr", {}, h("td", {}, cells.name, h("br"), cells.id, cells.labels), h("td", {}, cells.status, cells.why),
    h("td", {}, cells.step, cells.meter), h("td", { class: "num", "data-name": "loss" }, cells.loss), h("td", {}, cells.spark), cells.rate, cells.eta, cells.devices);
  return Object.assign(part, { inside: cells });
}

function update(part, job, state) {
  const { inside: cells } = part;
  const { progress } = job;
  attr(cells.name, "href", `/jobs/${job.id}`);
  text(cells.name, job.name);
  text(cells.id, job.id);
  list(cells.labels, Object.entries(job.labels), ([key]) => key, () => h("span", { class: "label" }), (tag, [key, value]) => text(tag, `${key}=${value}`));
  showStatus(cells.status, job.status);
  text(cells.why, why(job));
  text(cells.step, progress.steps ? `${count(progress.step)} / ${count(progress.steps)}  ${percent(progress.percent)}` : progress.step ? count(progress.step) : NONE);
  show(cells.meter, progress.percent !== null);
  attr(cells.meter, "value", progress.percent ?? 0);
  attr(cells.meter, "aria-label", `Progress of ${job.name}`);
  text(cells.loss, progress.nonfinite ? "not finite" : loss(progress.loss));
  const running = job.status === "running";
  text(cells.rate, running ? short(progress.tokens_per_second) : NONE);
  text(cells.eta, running ? duration(progress.eta_seconds) : NONE);
  text(cells.devices, state.devices.filter((device) => device.job_id === job.id).map((device) => device.id).join(", ") || NONE);
  spark(cells.line, state.sparks.get(job.id)?.values ?? []);
}

function why(job) {
  if (job.status === "queued") return `waits for ${job.queue.waiting_for}`;
  return [job.phase && job.phase !== "training" ? job.phase.replaceAll("_", " ") : null, job.reason?.replaceAll("_", " ")].filter(Boolean).join(", ");
}

function spark(line, values) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const at = (value, i) => `${((i / Math.max(1, values.length - 1)) * 82 + 1).toFixed(1)},${(20 - ((value - low) / span) * 18).toFixed(1)}`;
  attr(line, "points", values.length > 1 ? values.map(at).join(" ") : "");
}
