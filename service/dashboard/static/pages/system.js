// The machine: whether the service can work, devices with who holds them, the queue in its order, disks and versions.
import { get } from "../api.js";
import { attr, h, list, show, table, text } from "../dom.js";
import { NONE, bytes, count } from "../format.js";
import { beat } from "../polling.js";
import { OVER, STATUSES } from "../status.js";

const DEVICES = [["Device"], ["Model"], ["Memory in use", "num"], ["Temperature", "num"], ["Held by"], ["Processes of nobody's"]];
const QUEUE = [["Position", "slim"], ["Job"], ["Priority", "num slim"], ["Waits for"]];
const DISKS = [["Holds"], ["In use", "num"], ["Free", "num"], ["State"]];
const LEASING = STATUSES.filter((status) => !OVER.has(status) && !["queued", "paused", "interrupted"].includes(status));

export const system = { title: "System", open };

function open(place) {
  const view = build(place);
  return beat(async () => draw(view, await load()));
}

async function load() {
  const [devices, queued, live, version, status] = await Promise.all([get("/devices"), get("/jobs?status=queued&limit=100"), liveJobs(), get("/version"), get("/status")]);
  const waiting = queued.data.sort((a, b) => a.queue.position - b.queue.position);
  return { devices: devices.data, waiting, more: queued.has_more, names: new Map(live.map((job) => [job.id, job.name])), version, status };
}

async function liveJobs() {
  const { data } = await get(`/jobs?limit=100&${LEASING.map((status) => `status=${status}`).join("&")}`);
  return data;
}

function build(place) {
  const view = { health: h("p", { class: "sentence" }), devices: table(DEVICES, "Devices"), queue: table(QUEUE, "Queue"), disks: table(DISKS, "Disks"), version: h("dl", { class: "facts short" }) };
  for (const one of [view.devices, view.disks]) one.node.classList.add("stack");
  view.free = h("span", { class: "muted" });
  view.none = h("p", { class: "muted", hidden: true }, "Nothing waits.");
  view.parts = h("ul", { class: "parts" });
  const more = h("p", { class: "muted" }, "Everything here is in ", h("a", { href: "/docs" }, "the API"), ".");
  view.rest = h("p", { class: "muted", hidden: true }, "More wait behind these.");
  place.append(h("h1", {}, "System"), view.health, view.parts,
    h("section", {}, h("div", { class: "titled" }, h("h2", {}, "Devices"), view.free), view.devices.node),
    h("section", {}, h("h2", {}, "Queue"), view.none, view.queue.node, view.rest),
    h("section", {}, h("h2", {}, "Disks"), view.disks.node),
    h("section", {}, h("h2", {}, "Service"), view.version, more));
  return view;
}

function draw(view, { devices, waiting, more, names, version, status }) {
  text(view.health, status.ready ? "✓ The service is ready." : "✗ The service is not ready.");
  attr(view.health, "class", status.ready ? "sentence" : "sentence wrong");
  list(view.parts, status.parts, (one) => one.name, () => h("li", {}, h("strong"), h("span")), (part, one) => {
    attr(part, "class", one.ok ? null : "wrong");
    text(part.firstChild, `${one.ok ? "✓" : "✗"} ${one.name}`);
    text(part.lastChild, ` ${one.detail}`);
  });
  const free = devices.filter((device) => device.job_id === null && !device.processes.length).length;
  text(view.free, `${count(free)} of ${count(devices.length)} free`);
  const known = (name) => devices.some((device) => device[name] !== null && device[name] !== undefined);
  view.devices.node.classList.toggle("no-memory", !known("memory_bytes"));
  view.devices.node.classList.toggle("no-temperature", !known("temperature_celsius"));
  list(view.devices.body, devices, (device) => device.id, deviceRow, (row, device) => updateDevice(row, device, names));
  show(view.none, !waiting.length);
  show(view.queue.node, waiting.length);
  show(view.rest, more);
  list(view.queue.body, waiting, (job) => job.id, queueRow, updateQueued);
  list(view.disks.body, status.disks, (disk) => disk.id, diskRow, updateDisk);
  const facts = [...Object.entries(version).filter(([name]) => !["object", "name"].includes(name)), ["schedules", status.schedules ? "yes" : "no: another server does"]];
  list(view.version, facts, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value]) => text(part.lastChild, value));
}

function deviceRow() {
  const cells = { id: h("td", { class: "mono" }), model: h("td"), memory: h("span"), meter: h("progress", { class: "meter", max: "100" }), heat: h("td", { class: "num heat", "data-name": "at" }), job: h("a"), nobody: h("td", { "data-name": "nobody's" }) };
  cells.free = h("span", { class: "muted" });
  const row = h("tr", {}, cells.id, cells.model, h("td", { class: "num memory", "data-name": "memory" }, cells.memory, cells.meter), cells.heat, h("td", {}, cells.job, cells.free), cells.nobody);
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
  text(cells.heat, Number.isFinite(device.temperature_celsius) ? `${device.temperature_celsius} °C` : NONE);
  show(cells.job, device.job_id);
  attr(cells.job, "href", `/jobs/${device.job_id}`);
  text(cells.job, names.get(device.job_id) ?? device.job_id);
  const strangers = device.processes.length;
  text(cells.free, device.job_id ? "" : strangers ? "not leased: in use" : "free");
  text(cells.nobody, strangers ? device.processes.map((pid) => `pid ${pid}`).join(", ") : NONE);
  attr(cells.nobody, "class", strangers ? "wrong" : null);
}

function queueRow() {
  const cells = { place: h("td"), job: h("a", { class: "name" }), priority: h("td", { class: "num" }), why: h("td") };
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

function diskRow() {
  const cells = { what: h("span"), where: h("span"), used: h("span"), meter: h("progress", { class: "meter", max: "100" }), free: h("td", { class: "num", "data-name": "free" }), state: h("td") };
  return Object.assign(h("tr", {}, h("td", {}, cells.what, cells.where), h("td", { class: "num memory", "data-name": "in use" }, cells.used, cells.meter), cells.free, cells.state), { inside: cells });
}

function updateDisk(row, disk) {
  const { inside: cells } = row;
  const known = disk.total_bytes !== null && disk.free_bytes !== null;
  text(cells.what, disk.id.replaceAll("_", " ").replaceAll("+", ", "));
  list(cells.where, disk.paths, (path) => path, (path) => h("code", { class: "where" }, path));
  text(cells.used, known ? `${bytes(disk.total_bytes - disk.free_bytes)} of ${bytes(disk.total_bytes)}` : NONE);
  show(cells.meter, known);
  attr(cells.meter, "value", known ? 100 - (100 * disk.free_bytes) / disk.total_bytes : 0);
  attr(cells.meter, "aria-label", `Disk in use: ${disk.id}`);
  text(cells.free, bytes(disk.free_bytes));
  text(cells.state, disk.state === "ok" ? "✓ has room" : `✗ ${disk.state}${disk.state === "low" ? `: below ${bytes(disk.low_below_bytes)}` : ""}`);
  attr(cells.state, "class", disk.state === "ok" ? null : "wrong");
}
