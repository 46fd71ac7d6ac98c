// The machine: devices with who holds them, the queue in its order, health, disk and versions.
import { Refused, get } from "../api.js";
import { attr, h, list, show, table, text } from "../dom.js";
import { NONE, bytes, count } from "../format.js";
import { beat } from "../live.js";

const DEVICES = [["Device"], ["Model"], ["Memory", "num"], ["Held by"], ["Processes of nobody's"]];
const QUEUE = [["Position", "num"], ["Job"], ["Priority", "num"], ["Waits for"]];

export const system = { title: "System", open };

function open(place) {
  const view = build(place);
  return beat(async () => draw(view, await load()));
}

async function load() {
  const [devices, queued, live, version, ready] = await Promise.all([
    get("/devices"), get("/jobs?status=queued&limit=100"), liveJobs(), get("/version"), readiness()]);
  return { devices: devices.data, queued: queued.data, names: new Map(live.map((job) => [job.id, job.name])), version, ready };
}

async function liveJobs() {
  const found = await Promise.all(["starting", "running", "pausing", "cancelling"].map((status) => get(`/jobs?status=${status}&limit=100`)));
  return found.flatMap((page) => page.data);
}

/** `/ready` says no with a reason; that is an answer, too. */
async function readiness() {
  try {
    return { ok: true, ...(await get("/ready")) };
  } catch (error) {
    if (error instanceof Refused) return { ok: false, detail: error.message };
    throw error;
  }
}

function build(place) {
  const view = { health: h("p", { class: "sentence" }), devices: table(DEVICES, "Devices"), queue: table(QUEUE, "Queue"), version: h("p", { class: "muted" }) };
  view.free = h("p", { class: "muted" });
  view.none = h("p", { class: "muted", hidden: true }, "Nothing waits.");
  place.append(h("h1", {}, "System"), view.health,
    h("section", {}, h("h2", {}, "Devices"), view.free, view.devices.node),
    h("section", {}, h("h2", {}, "Queue"), view.none, view.queue.node),
    h("section", {}, h("h2", {}, "Service"), view.version));
  return view;
}

function draw(view, { devices, queued, names, version, ready }) {
  text(view.health, ready.ok ? "✓ The service is ready." : `✗ Not ready: ${ready.detail}`);
  attr(view.health, "class", ready.ok ? "sentence" : "sentence wrong");
  const free = devices.filter((device) => device.job_id === null && !device.processes.length).length;
  text(view.free, `${count(free)} of ${count(devices.length)} free`);
  list(view.devices.body, devices, (device) => device.id, deviceRow, (row, device) => updateDevice(row, device, names));
  const waiting = [...queued].sort((a, b) => a.queue.position - b.queue.position);
  show(view.none, !waiting.length);
  show(view.queue.node, waiting.length);
  list(view.queue.body, waiting, (job) => job.id, queueRow, updateQueued);
  text(view.version, Object.entries(version).filter(([name]) => name !== "object").map(([name, value]) => `${name} ${value}`).join(" · "));
}

function deviceRow() {
  const cells = { id: h("td", { class: "mono" }), model: h("td"), memory: h("span"), meter: h("progress", { class: "meter", max: "100" }), job: h("a"), nobody: h("td") };
  cells.free = h("span", { class: "muted" });
  const row = h("tr", {}, cells.id, cells.model, h("td", { class: "num" }, cells.memory, cells.meter), h("td", {}, cells.job, cells.free), cells.nobody);
  return Object.assign(row, { inside: cells });
}

function updateDevice(row, device, names) {
  const { inside: cells } = row;
  text(cells.id, device.id);
  text(cells.model, device.model ?? device.kind);
  const known = device.memory_bytes !== null && device.memory_used_bytes !== null;
  text(cells.memory, known ? `${bytes(device.memory_used_bytes)} of ${bytes(device.memory_bytes)}` : bytes(device.memory_bytes));
  show(cells.meter, known);
  attr(cells.meter, "value", known ? (100 * device.memory_used_bytes) / device.memory_bytes : 0);
  attr(cells.meter, "aria-label", `Memory in use on ${device.id}`);
  show(cells.job, device.job_id);
  attr(cells.job, "href", `/jobs/${device.job_id}`);
  text(cells.job, names.get(device.job_id) ?? device.job_id);
  text(cells.free, device.job_id ? "" : device.processes.length ? "not leased: in use" : "free");
  text(cells.nobody, device.processes.length ? device.processes.map((pid) => `pid ${pid}`).join(", ") : NONE);
}

function queueRow() {
  const cells = { place: h("td", { class: "num" }), job: h("a", { class: "name" }), priority: h("td", { class: "num" }), why: h("td") };
  return Object.assign(h("tr", {}, cells.place, h("td", {}, cells.job), cells.priority, cells.why), { inside: cells });
}

function updateQueued(row, job) {
  const { inside: cells } = row;
  text(cells.place, count(job.queue.position));
  attr(cells.job, "href", `/jobs/${job.id}`);
  text(cells.job, job.name);
  text(cells.priority, count(job.spec.resources.priority));
  text(cells.why, job.queue.waiting_for);
}
