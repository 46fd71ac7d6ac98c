// The system page: health, devices, queue, disks and versions.
import { get, sendJson } from "../api.js";
import { createTable, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { NONE, bytes, count } from "../format.js";
import { poll } from "../polling.js";
import { FINAL_STATUSES, STATUSES } from "../status.js";

const DEVICES = [["Device"], ["Model"], ["Memory in use", "num"], ["Temperature", "num"], ["Held by"], ["Unknown processes"]];
const QUEUE = [["Position", "narrow"], ["Job"], ["Priority", "num narrow"], ["Waits for"]];
const DISKS = [["Contents"], ["In use", "num"], ["Free", "num"], ["State"]];
const HOLDING_STATUSES = STATUSES.filter((status) => !FINAL_STATUSES.has(status) && !["queued", "preparing", "paused", "interrupted"].includes(status));

export const systemPage = { title: "System", open };

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
  const view = { health: h("p", { class: "sentence" }), devices: createTable(DEVICES, "Devices"), queue: createTable(QUEUE, "Queue"), disks: createTable(DISKS, "Disks"), version: h("dl", { class: "facts short" }) };
  for (const table of [view.devices, view.disks]) table.node.classList.add("stack");
  view.free = h("span", { class: "muted" });
  view.none = h("p", { class: "muted", hidden: true }, "The queue is empty.");
  view.parts = h("ul", { class: "health-parts" });
  const more = h("p", { class: "muted" }, "All of this is also in ", h("a", { href: "/docs" }, "the API"), ".");
  view.rest = h("p", { class: "muted", hidden: true }, "More jobs are queued after these.");
  place.append(h("h1", {}, "System"), view.health, view.parts,
    h("section", {}, h("div", { class: "title-row" }, h("h2", {}, "Devices"), view.free), view.devices.node),
    h("section", {}, h("h2", {}, "Queue"), view.none, view.queue.node, view.rest),
    h("section", {}, h("h2", {}, "Disks"), view.disks.node),
    h("section", {}, h("h2", {}, "Service"), view.version, more));
  return view;
}

function draw(view, { devices, waiting, more, names, version, status }) {
  setText(view.health, status.ready ? "✓ The service is ready." : "✗ The service is not ready.");
  setAttr(view.health, "class", status.ready ? "sentence" : "sentence error");
  updateList(view.parts, status.parts, (component) => component.name, () => h("li", {}, h("strong"), h("span")), (part, component) => {
    setAttr(part, "class", component.ok ? null : "error");
    setText(part.firstChild, `${component.ok ? "✓" : "✗"} ${component.name}`);
    setText(part.lastChild, ` ${component.detail}`);
  });
  const free = devices.filter((device) => device.job_id === null && !device.processes.length && !device.xid_errors.length).length;
  setText(view.free, `${count(free)} of ${count(devices.length)} free`);
  const known = (name) => devices.some((device) => device[name] !== null && device[name] !== undefined);
  view.devices.node.classList.toggle("no-memory", !known("memory_bytes"));
  view.devices.node.classList.toggle("no-temperature", !known("temperature_celsius"));
  updateList(view.devices.body, devices, (device) => device.id, deviceRow, (row, device) => updateDevice(row, device, names));
  setVisible(view.none, !waiting.length);
  setVisible(view.queue.node, waiting.length);
  setVisible(view.rest, more);
  updateList(view.queue.body, waiting, (job) => job.id, queueRow, updateQueued);
  updateList(view.disks.body, status.disks, (disk) => disk.id, diskRow, updateDisk);
  const facts = [...Object.entries(version).filter(([name]) => !["object", "name"].includes(name)), ["schedules", status.schedules ? "yes" : "no, another server does"]];
  updateList(view.version, facts, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value]) => setText(part.lastChild, value));
}

function deviceRow() {
  const cells = { id: h("td", { class: "mono" }), model: h("span"), place: h("div", { class: "muted" }), memory: h("span"), meter: h("progress", { class: "meter", max: "100" }), heat: h("td", { class: "num heat", "data-name": "at" }), job: h("a"), unknown: h("td", { "data-name": "unknown" }) };
  cells.free = h("span", { class: "muted" });
  cells.fault = h("span", { class: "error" });
  cells.clear = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => clearErrors(cells) }, "Clear");
  const row = h("tr", {}, cells.id, h("td", {}, cells.model, cells.place), h("td", { class: "num memory", "data-name": "memory" }, cells.memory, cells.meter), cells.heat, h("td", {}, cells.job, cells.free, cells.fault, cells.clear), cells.unknown);
  return Object.assign(row, { inside: cells });
}

/** Clears the errors of a GPU; the next poll shows it as free. */
async function clearErrors(cells) {
  cells.clear.disabled = true;
  try {
    await sendJson("POST", `/devices/${encodeURIComponent(cells.device.id)}/clear`);
    setText(cells.fault, " cleared");
    setVisible(cells.clear, false);
  } catch (error) {
    setText(cells.fault, ` ${error.message}`);
  } finally {
    cells.clear.disabled = false;
  }
}

/** Returns where a GPU is: its link, NUMA node and PCI address, as far as they are known. */
function placeText(device) {
  const link = device.nvlink_peers.length ? `NVLink to ${device.nvlink_peers.join(", ")}` : device.link === "pcie" ? "PCIe only" : null;
  return [link, device.numa_node === null ? null : `NUMA node ${device.numa_node}`, device.pci_bus_id].filter(Boolean).join(" · ");
}

function updateDevice(row, device, names) {
  const { inside: cells } = row;
  setText(cells.id, device.id);
  setText(cells.model, device.model ?? device.kind);
  setText(cells.place, placeText(device));
  const known = device.memory_bytes !== null && device.memory_used_bytes !== null;
  setText(cells.memory, known ? `${bytes(device.memory_used_bytes)} of ${bytes(device.memory_bytes)}` : bytes(device.memory_bytes));
  setVisible(cells.meter, known);
  setAttr(cells.meter, "value", known ? (100 * device.memory_used_bytes) / device.memory_bytes : 0);
  setAttr(cells.meter, "aria-label", `Memory in use on ${device.id}`);
  setText(cells.heat, Number.isFinite(device.temperature_celsius) ? `${device.temperature_celsius} °C` : NONE);
  setVisible(cells.job, device.job_id);
  setAttr(cells.job, "href", `/jobs/${device.job_id}`);
  setText(cells.job, names.get(device.job_id) ?? device.job_id);
  const unknown = device.processes.length;
  const faults = device.xid_errors.map((error) => error.xid);
  cells.device = device;
  setText(cells.free, device.job_id || faults.length ? "" : unknown ? "not leased: in use" : "free");
  setText(cells.fault, faults.length ? ` XID ${faults.join(", ")}: not leased until it is cleared` : "");
  setVisible(cells.clear, faults.length);
  setText(cells.unknown, unknown ? device.processes.map((pid) => `pid ${pid}`).join(", ") : NONE);
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

function diskRow() {
  const cells = { what: h("span"), where: h("span"), used: h("span"), meter: h("progress", { class: "meter", max: "100" }), free: h("td", { class: "num", "data-name": "free" }), state: h("td") };
  return Object.assign(h("tr", {}, h("td", {}, cells.what, cells.where), h("td", { class: "num memory", "data-name": "in use" }, cells.used, cells.meter), cells.free, cells.state), { inside: cells });
}

function updateDisk(row, disk) {
  const { inside: cells } = row;
  const known = disk.total_bytes !== null && disk.free_bytes !== null;
  setText(cells.what, disk.id.replaceAll("_", " ").replaceAll("+", ", "));
  updateList(cells.where, disk.paths, (path) => path, (path) => h("code", { class: "path" }, path));
  setText(cells.used, known ? `${bytes(disk.total_bytes - disk.free_bytes)} of ${bytes(disk.total_bytes)}` : NONE);
  setVisible(cells.meter, known);
  setAttr(cells.meter, "value", known ? 100 - (100 * disk.free_bytes) / disk.total_bytes : 0);
  setAttr(cells.meter, "aria-label", `Disk in use: ${disk.id}`);
  setText(cells.free, bytes(disk.free_bytes));
  setText(cells.state, disk.state === "ok" ? "✓ ok" : `✗ ${disk.state}${disk.state === "low" ? `: below ${bytes(disk.low_below_bytes)}` : ""}`);
  setAttr(cells.state, "class", disk.state === "ok" ? null : "error");
}
