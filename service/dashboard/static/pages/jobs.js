// All jobs: live, searched and filtered in the address, with the queue and why each in it waits.
import { get, query, token } from "../api.js";
import { attr, copy, h, list, show, table, text } from "../dom.js";
import { count } from "../format.js";
import { Filters, isFiltered, wanted } from "../jobs/filters.js";
import { COLUMNS, row, update } from "../jobs/job-row.js";
import { beat } from "../polling.js";
import { OVER } from "../status.js";

const PAGE = 100;
const SPARK_POINTS = 64;
const SPARK_MS = 10_000;
const AT_ONCE = 6; // curves in one look
const KEY = '-H "Authorization: Bearer $TRAINYARD_TOKEN" ';
const commands = () => ["trainyard demo", "trainyard submit --data_path corpus.jsonl --watch",
  `curl ${token.get() ? KEY : ""}--json '{"data": {"data_path": "/data/corpus.jsonl"}}' ${location.origin}/jobs`];

export const jobs = { title: "Jobs", open };

function open(place) {
  const state = { jobs: [], devices: [], queued: [], sparks: new Map(), more: false, limit: PAGE };
  const view = build(place, state, () => look.now());
  const look = beat(async () => {
    await load(state);
    draw(view, state);
    await sparks(state);
    draw(view, state);
  });
  return () => (look(), view.filters.close());
}

async function load(state) {
  const filter = { ...wanted(), limit: PAGE };
  const pages = [await get(query("/jobs", filter))];
  while (pages.at(-1).has_more && pages.length * PAGE < state.limit) {
    pages.push(await get(query("/jobs", { ...filter, after: pages.at(-1).data.at(-1).id })));
  }
  state.jobs = pages.flatMap((page) => page.data);
  state.more = pages.at(-1).has_more;
  const [queued, devices] = await Promise.all([get("/jobs?status=queued&limit=100"), get("/devices")]);
  state.queued = queued.data.sort((a, b) => a.queue.position - b.queue.position);
  state.devices = devices.data;
}

/** Curves of the newest jobs; one that is over is asked for once. */
async function sparks(state) {
  const due = state.jobs.slice(0, 30).filter((job) => {
    const known = state.sparks.get(job.id);
    const same = known?.step === job.progress.step;
    return job.progress.step > 0 && !same && !(known && !OVER.has(job.status) && performance.now() - known.at < SPARK_MS);
  });
  await Promise.all(due.slice(0, AT_ONCE).map(async (job) => {
    const found = await get(`/jobs/${job.id}/metrics?max_points=${SPARK_POINTS}`);
    const values = found.data.map((one) => one.loss_ema).filter((value) => value !== null);
    state.sparks.set(job.id, { at: performance.now(), step: job.progress.step, values });
  }));
}

function build(place, state, again) {
  const view = { filters: new Filters(again), rows: table(COLUMNS, "Jobs"), queue: h("ol", { class: "queue" }), count: h("span", { class: "muted", role: "status" }) };
  view.rows.node.classList.add("stack");
  view.empty = empty();
  view.nothing = h("p", { class: "muted", hidden: true }, "No job fits the search and the filters. ", h("a", { href: "/" }, "Show all"));
  view.more = h("button", { type: "button", hidden: true, onclick: () => ((state.limit += PAGE), again()) }, `Show ${PAGE} more`);
  view.queueBox = h("section", { hidden: true }, h("h2", {}, "Queue"), view.queue);
  place.append(h("div", { class: "head" }, h("h1", {}, "Jobs"), view.count, h("a", { class: "button", href: "/submit" }, "New job")), view.filters.node,
    view.empty, view.nothing, view.rows.node, view.more, view.queueBox);
  for (const part of [view.empty, view.rows.node]) show(part, false);
  return view;
}

function empty() {
  const parts = commands().map((words) =>
    h("div", { class: "command" }, h("pre", { tabindex: "0" }, words), h("button", { type: "button", "aria-label": `Copy: ${words}`, onclick: () => copy(words, "Command") }, "Copy")));
  return h("div", { class: "empty" }, h("h2", {}, "No job yet"), h("p", {}, "Any of these starts one, and so does ", h("a", { href: "/submit" }, "the form"), ":"), parts);
}

function draw(view, state) {
  const found = state.jobs;
  show(view.empty, !found.length && !isFiltered());
  show(view.nothing, !found.length && isFiltered());
  show(view.filters.node, found.length || isFiltered());
  show(view.rows.node, found.length);
  show(view.more, state.more);
  text(view.count, `${count(found.length)}${state.more ? "+" : ""} ${found.length === 1 ? "job" : "jobs"}`);
  const held = (job) => state.devices.filter((device) => device.job_id === job.id).map((device) => device.id);
  list(view.rows.body, found, (job) => job.id, row, (part, job) => update(part, job, held(job), state.sparks.get(job.id)?.values ?? []));
  show(view.queueBox, state.queued.length);
  list(view.queue, state.queued, (job) => job.id, () => h("li", {}, h("a"), h("span", { class: "muted" })), (part, job) => {
    attr(part, "value", job.queue.position);
    attr(part.firstChild, "href", `/jobs/${job.id}`);
    text(part.firstChild, job.name);
    const { priority } = job.spec.resources;
    text(part.lastChild, ` waits for ${job.queue.waiting_for}${priority ? `, priority ${priority}` : ""}`);
  });
}
