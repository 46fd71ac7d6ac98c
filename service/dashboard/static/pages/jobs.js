// The jobs page: a live table with search and filters, and the queue.
import { get, token, withQuery } from "../api.js";
import { copyText, createTable, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { count } from "../format.js";
import { Filters, isFiltered, jobFilter } from "../jobs/filters.js";
import { COLUMNS, createJobRow, updateJobRow } from "../jobs/job-row.js";
import { poll } from "../polling.js";
import { FINAL_STATUSES } from "../status.js";

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
  const filter = { ...jobFilter(), limit: PAGE_SIZE };
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
    const found = await get(`/jobs/${job.id}/metrics?max_points=${SPARK_POINTS}`);
    const values = found.data.map((one) => one.loss_ema).filter((value) => value !== null);
    state.sparks.set(job.id, { at: performance.now(), step: job.progress.step, values });
  }));
}

function build(place, state, again) {
  const view = { filters: new Filters(again), rows: createTable(COLUMNS, "Jobs"), queue: h("ol", { class: "queue" }), count: h("span", { class: "muted", role: "status" }) };
  view.rows.node.classList.add("stack");
  view.empty = emptyState();
  view.nothing = h("p", { class: "muted", hidden: true }, "No job matches the search and the filters. ", h("a", { href: "/" }, "Show all"));
  view.more = h("button", { type: "button", hidden: true, onclick: () => ((state.limit += PAGE_SIZE), again()) }, `Show ${PAGE_SIZE} more`);
  view.queueBox = h("section", { hidden: true }, h("h2", {}, "Queue"), view.queue);
  place.append(h("div", { class: "head" }, h("h1", {}, "Jobs"), view.count, h("a", { class: "button", href: "/submit" }, "New job")), view.filters.node,
    view.empty, view.nothing, view.rows.node, view.more, view.queueBox);
  for (const part of [view.empty, view.rows.node]) setVisible(part, false);
  return view;
}

function emptyState() {
  const parts = exampleCommands().map((words) =>
    h("div", { class: "command" }, h("pre", { tabindex: "0" }, words), h("button", { type: "button", "aria-label": `Copy: ${words}`, onclick: () => copyText(words, "Command") }, "Copy")));
  return h("div", { class: "empty" }, h("h2", {}, "No job yet"), h("p", {}, "Start one with any of these commands, or with ", h("a", { href: "/submit" }, "the form"), ":"), parts);
}

function draw(view, state) {
  const found = state.jobs;
  setVisible(view.empty, !found.length && !isFiltered());
  setVisible(view.nothing, !found.length && isFiltered());
  setVisible(view.filters.node, found.length || isFiltered());
  setVisible(view.rows.node, found.length);
  setVisible(view.more, state.more);
  setText(view.count, `${count(found.length)}${state.more ? "+" : ""} ${found.length === 1 ? "job" : "jobs"}`);
  const held = (job) => state.devices.filter((device) => device.job_id === job.id).map((device) => device.id);
  updateList(view.rows.body, found, (job) => job.id, createJobRow, (part, job) => updateJobRow(part, job, held(job), state.sparks.get(job.id)?.values ?? []));
  setVisible(view.queueBox, state.queued.length);
  updateList(view.queue, state.queued, (job) => job.id, () => h("li", {}, h("a"), h("span", { class: "muted" })), (part, job) => {
    setAttr(part, "value", job.queue.position);
    setAttr(part.firstChild, "href", `/jobs/${job.id}`);
    setText(part.firstChild, job.name);
    const { priority } = job.spec.resources;
    setText(part.lastChild, ` waits for ${job.queue.waiting_for}${priority ? `, priority ${priority}` : ""}`);
  });
}
