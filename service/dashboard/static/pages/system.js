// The system page: health, devices, queue, disks and versions.
import { get, sendJson } from "../api.js";
import { createTable, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { NONE, bytes, count } from "../format.js";
import { t, tNodes } from "../i18n.js";
import { poll } from "../polling.js";
import { FINAL_STATUSES, STATUSES } from "../status.js";

const DEVICES = [[t("Device")], [t("Model")], [t("Memory in use"), "num"], [t("Temperature"), "num"], [t("Held by")], [t("Unknown processes")]];
const QUEUE = [[t("Position"), "narrow"], [t("Job")], [t("Priority"), "num narrow"], [t("Waits for")]];
const DISKS = [[t("Contents")], [t("In use"), "num"], [t("Free"), "num"], [t("State")]];
const HOLDING_STATUSES = STATUSES.filter((status) => !FINAL_STATUSES.has(status) && !["queued", "preparing", "paused", "interrupted"].includes(status));

const CONTENTS = { home: t("home"), save_root: t("save root"), corpus_cache: t("corpus cache") };
const FACTS = { version: t("version"), api: t("api"), python: t("python"), database: t("database"), caller: t("caller"), scope: t("scope"), schedules: t("schedules") };

export const systemPage = { title: t("System"), open };

function open(place) {
  const view = build(place);
  return poll(async () => draw(view, await load()));
}

async function load() {
  const [devices, queued, live, version, status] = await Promise.all([get("/devices"), get("/jobs?status=queued&limit=100"), liveJobs(), get("/version"), get("/status")]);
  const waiting = queued.data.sort((a, b) => a.queue.position - b.queue.position);
  return { devices: devices.data, waiting, more: queued.has_more, names: new Map(live.map((job) => [job.id, job.name])), version, status };
}

async function liveJobs() {
  const { data } = await get(`/jobs?limit=100&${HOLDING_STATUSES.map((status) => `status=${status}`).join("&")}`);
  return data;
}

function build(place) {
  const view = { health: h("p", { class: "sentence" }), devices: createTable(DEVICES, t("Devices")), queue: createTable(QUEUE, t("Queue")), disks: createTable(DISKS, t("Disks")), version: h("dl", { class: "facts short" }) };
  for (const table of [view.devices, view.disks]) table.node.classList.add("stack");
  view.free = h("span", { class: "muted" });
  view.none = h("p", { class: "muted", hidden: true }, t("The queue is empty."));
  view.parts = h("ul", { class: "health-parts" });
  const more = h("p", { class: "muted" }, tNodes("All of this is also in {api}.", { api: h("a", { href: "/docs" }, t("the API")) }));
  view.rest = h("p", { class: "muted", hidden: true }, t("More jobs are queued after these."));
  place.append(h("h1", {}, t("System")), view.health, view.parts,
    h("section", {}, h("div", { class: "title-row" }, h("h2", {}, t("Devices")), view.free), view.devices.node),
    h("section", {}, h("h2", {}, t("Queue")), view.none, view.queue.node, view.rest),
    h("section", {}, h("h2", {}, t("Disks")), view.disks.node),
    h("section", {}, h("h2", {}, t("Service")), view.version, more));
  return view;
}

function draw(view, { devices, waiting, more, names, version, status }) {
  setText(view.health, status.ready ? t("✓ The service is ready.") : t("✗ The service is not ready."));
  setAttr(view.health, "class", status.ready ? "sentence" : "sentence error");
  updateList(view.parts, status.parts, (component) => component.name, () => h("li", {}, h("strong"), h("span")), (part, component) => {
    setAttr(part, "class", component.ok ? null : "error");
    setText(part.firstChild, `${component.ok ? "✓" : "✗"} ${component.name}`);
    setText(part.lastChild, ` ${component.detail}`);
  });
  const free = devices.filter((device) => device.job_id === null && !device.processes.length && !device.xid_errors.length && !device.fault).length;
  setText(view.free, t("{n} of {all} free", { n: count(free), all: count(devices.length) }));
  const known = (name) => devices.some((device) => device[name] !== null && device[name] !== undefined);
  view.devices.node.classList.toggle("no-memory", !known("memory_bytes"));
  view.devices.node.classList.toggle("no-temperature", !known("temperature_celsius"));
  updateList(view.devices.body, devices, (device) => device.id, deviceRow, (row, device) => updateDevice(row, device, names));
  setVisible(view.none, !waiting.length);
  setVisible(view.queue.node, waiting.length);
  setVisible(view.rest, more);
  updateList(view.queue.body, waiting, (job) => job.id, queueRow, updateQueued);
  updateList(view.disks.body, status.disks, (disk) => disk.id, diskRow, updateDisk);
  const facts = [...Object.entries(version).filter(([name]) => !["object", "name"].includes(name)), ["schedules", status.schedules ? t("yes") : t("no, another server does")]];
  updateList(view.version, facts, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, FACTS[name] ?? name), h("dd")), (part, [, value]) => setText(part.lastChild, value));
}

function deviceRow() {
  const cells = { id: h("td", { class: "mono" }), model: h("span"), place: h("div", { class: "muted" }), memory: h("span"), meter: h("progress", { class: "meter", max: "100" }), heat: h("td", { class: "num heat", "data-name": t("at") }), job: h("a"), unknown: h("td", { "data-name": t("unknown") }) };
  cells.free = h("span", { class: "muted" });
  cells.fault = h("span", { class: "error" });
  cells.clear = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => clearErrors(cells) }, t("Clear"));
  const row = h("tr", {}, cells.id, h("td", {}, cells.model, cells.place), h("td", { class: "num memory", "data-name": t("memory") }, cells.memory, cells.meter), cells.heat, h("td", {}, cells.job, cells.free, cells.fault, cells.clear), cells.unknown);
  return Object.assign(row, { inside: cells });
}

/** Clears the errors of a GPU; the next poll shows it as free. */
async function clearErrors(cells) {
  cells.clear.disabled = true;
  try {
    await sendJson("POST", `/devices/${encodeURIComponent(cells.device.id)}/clear`);
    setText(cells.fault, ` ${t("cleared")}`);
    setVisible(cells.clear, false);
  } catch (error) {
    setText(cells.fault, ` ${error.message}`);
  } finally {
    cells.clear.disabled = false;
  }
}

/** Returns where a GPU is: its link, NUMA node and PCI address, as far as they are known. */
function placeText(device) {
  const link = device.nvlink_peers.length ? t("NVLink to {devices}", { devices: device.nvlink_peers.join(", ") }) : device.link === "pcie" ? t("PCIe only") : null;
  return [link, device.numa_node === null ? null : t("NUMA node {n}", { n: device.numa_node }), device.pci_bus_id].filter(Boolean).join(" · ");
}

function updateDevice(row, device, names) {
  const { inside: cells } = row;
  setText(cells.id, device.id);
  setText(cells.model, device.model ?? device.kind);
  setText(cells.place, placeText(device));
  const known = device.memory_bytes !== null && device.memory_used_bytes !== null;
  setText(cells.memory, known ? t("{part} of {whole}", { part: bytes(device.memory_used_bytes), whole: bytes(device.memory_bytes) }) : bytes(device.memory_bytes));
  setVisible(cells.meter, known);
  setAttr(cells.meter, "value", known ? (100 * device.memory_used_bytes) / device.memory_bytes : 0);
  setAttr(cells.meter, "aria-label", t("Memory in use on {device}", { device: device.id }));
  setText(cells.heat, Number.isFinite(device.temperature_celsius) ? `${device.temperature_celsius} °C` : NONE);
  setVisible(cells.job, device.job_id);
  setAttr(cells.job, "href", `/jobs/${device.job_id}`);
  setText(cells.job, names.get(device.job_id) ?? device.job_id);
  const unknown = device.processes.length;
  const faults = device.xid_errors.map((error) => error.xid);
  cells.device = device;
  setText(cells.free, device.job_id || faults.length || device.fault ? "" : unknown ? t("not leased: in use") : t("free"));
  const xids = faults.length ? ` ${t("XID {errors}: not leased until it is cleared", { errors: faults.join(", ") })}` : "";
  const lost = device.fault ? ` ${t("not leased: {reason}", { reason: device.fault })}` : "";
  setText(cells.fault, xids + lost);
  setVisible(cells.clear, faults.length);
  setText(cells.unknown, unknown ? device.processes.map((pid) => t("pid {pid}", { pid })).join(", ") : NONE);
  setAttr(cells.unknown, "class", unknown ? "error" : null);
}

function queueRow() {
  const cells = { place: h("td"), job: h("a", { class: "name" }), priority: h("td", { class: "num" }), why: h("td") };
  return Object.assign(h("tr", {}, cells.place, h("td", {}, cells.job), cells.priority, cells.why), { inside: cells });
}

function updateQueued(row, job) {
  const { inside: cells } = row;
  setText(cells.place, count(job.queue.position));
  setAttr(cells.job, "href", `/jobs/${job.id}`);
  setText(cells.job, job.name);
  setText(cells.priority, count(job.spec.resources.priority));
  setText(cells.why, job.queue.waiting_for);
}

function diskState({ state, low_below_bytes: limit }) {
  if (state === "ok") return t("✓ ok");
  if (state === "full") return t("✗ full");
  if (state === "unreadable") return t("✗ unreadable");
  return state === "low" ? t("✗ low: below {limit}", { limit: bytes(limit) }) : `✗ ${state}`;
}

function diskRow() {
  const cells = { what: h("span"), where: h("span"), used: h("span"), meter: h("progress", { class: "meter", max: "100" }), free: h("td", { class: "num", "data-name": t("Free").toLowerCase() }), state: h("td") };
  return Object.assign(h("tr", {}, h("td", {}, cells.what, cells.where), h("td", { class: "num memory", "data-name": t("In use").toLowerCase() }, cells.used, cells.meter), cells.free, cells.state), { inside: cells });
}

function updateDisk(row, disk) {
  const { inside: cells } = row;
  const known = disk.total_bytes !== null && disk.free_bytes !== null;
  setText(cells.what, disk.id.split("+").map((part) => CONTENTS[part] ?? part.replaceAll("_", " ")).join(t(", ")));
  updateList(cells.where, disk.paths, (path) => path, (path) => h("code", { class: "path" }, path));
  setText(cells.used, known ? t("{part} of {whole}", { part: bytes(disk.total_bytes - disk.free_bytes), whole: bytes(disk.total_bytes) }) : NONE);
  setVisible(cells.meter, known);
  setAttr(cells.meter, "value", known ? 100 - (100 * disk.free_bytes) / disk.total_bytes : 0);
  setAttr(cells.meter, "aria-label", t("Disk in use: {disk}", { disk: disk.id }));
  setText(cells.free, bytes(disk.free_bytes));
  setText(cells.state, diskState(disk));
  setAttr(cells.state, "class", disk.state === "ok" ? null : "error");
}
