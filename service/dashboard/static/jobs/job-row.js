// A job as a table row: created once, then updated in place.
import { h, setAttr, setText, setVisible, svg, updateList } from "../dom.js";
import { NONE, ago, compactNumber, count, dateTime, duration, loss, percent } from "../format.js";
import { showStatus, statusBadge } from "../status.js";

export const COLUMNS = [["Job"], ["Status"], ["Progress"], ["Loss", "num"], ["Curve", "num"], ["Tokens/s", "num"], ["ETA", "num"], ["Devices"]];

export function createJobRow() {
  const cells = {
    name: h("a", { class: "name" }), id: h("code"), made: h("span"), labels: h("span", { class: "labels" }), status: statusBadge(), why: h("span", { class: "status-detail" }),
    step: h("span"), share: h("span", { class: "muted" }), meter: h("progress", { class: "meter", max: "100" }), loss: h("span"), line: svg("polyline"),
    rate: h("td", { class: "num", "data-name": "tok/s" }), eta: h("td", { class: "num", "data-name": "ETA" }), devices: h("td", { class: "devices", "data-name": "on" }),
  };
  cells.spark = svg("svg", { class: "spark", viewBox: "0 0 84 22", "aria-hidden": "true" }, cells.line);
  const part = h("tr", {}, h("td", {}, cells.name, h("span", { class: "job-meta" }, cells.id, cells.made, cells.labels)), h("td", {}, cells.status, cells.why),
    h("td", { class: "progress" }, h("span", { class: "progress-text" }, cells.step, cells.share), cells.meter), h("td", { class: "num", "data-name": "loss" }, cells.loss), h("td", {}, cells.spark), cells.rate, cells.eta, cells.devices);
  return Object.assign(part, { inside: cells });
}

/** Updates a row. `devices`: ids that the job holds; `curve`: recent values of its loss. */
export function updateJobRow(part, job, devices, curve) {
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
  const running = job.status === "running";
  setCell(cells.rate, running ? compactNumber(progress.tokens_per_second) : NONE);
  setCell(cells.eta, running ? duration(progress.eta_seconds) : NONE);
  setCell(cells.devices, devices.join(", ") || NONE);
  drawSparkline(cells.line, curve);
}

/** Sets the text of a cell. In a narrow window, CSS hides cells without a value. */
function setCell(node, words) {
  setText(node, words);
  node.closest("td").classList.toggle("empty-cell", words === NONE);
}

/** Why the job is not simply running: what it waits for, its phase, or why it ended. */
function statusDetail(job) {
  if (job.status === "queued") return `position ${count(job.queue.position)}, waits for ${job.queue.waiting_for}`;
  const words = (name) => name?.replaceAll("_", " ");
  return [job.phase && job.phase !== "training" ? words(job.phase) : null, words(job.reason)].filter(Boolean).join(", ");
}

function drawSparkline(line, values) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const at = (value, i) => `${((i / Math.max(1, values.length - 1)) * 82 + 1).toFixed(1)},${(20 - ((value - low) / span) * 18).toFixed(1)}`;
  setAttr(line, "points", values.length > 1 ? values.map(at).join(" ") : "");
}
