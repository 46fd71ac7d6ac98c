// A job as a row of the table: made once, changed in place.
import { attr, h, list, show, svg, text } from "../dom.js";
import { NONE, ago, count, duration, exact, loss, percent, short } from "../format.js";
import { badge, showStatus } from "../status.js";

export const COLUMNS = [["Job"], ["Status"], ["Progress"], ["Loss", "num"], ["Curve", "num"], ["Tokens/s", "num"], ["ETA", "num"], ["Devices"]];

export function row() {
  const cells = {
    name: h("a", { class: "name" }), id: h("code"), made: h("span"), labels: h("span", { class: "labels" }), status: badge(), why: h("span", { class: "why" }),
    step: h("span"), share: h("span", { class: "muted" }), meter: h("progress", { class: "meter", max: "100" }), loss: h("span"), line: svg("polyline"),
    rate: h("td", { class: "num", "data-name": "tok/s" }), eta: h("td", { class: "num", "data-name": "ETA" }), devices: h("td", { class: "devices", "data-name": "on" }),
  };
  cells.spark = svg("svg", { class: "spark", viewBox: "0 0 84 22", "aria-hidden": "true" }, cells.line);
  const part = h("tr", {}, h("td", {}, cells.name, h("span", { class: "under" }, cells.id, cells.made, cells.labels)), h("td", {}, cells.status, cells.why),
    h("td", { class: "progress" }, h("span", { class: "ends" }, cells.step, cells.share), cells.meter), h("td", { class: "num", "data-name": "loss" }, cells.loss), h("td", {}, cells.spark), cells.rate, cells.eta, cells.devices);
  return Object.assign(part, { inside: cells });
}

/** `devices` are the ids it holds, `curve` the last values of its loss. */
export function update(part, job, devices, curve) {
  const { inside: cells } = part;
  const { progress } = job;
  attr(cells.name, "href", `/jobs/${job.id}`);
  text(cells.name, job.name);
  text(cells.id, job.id);
  text(cells.made, ago(job.created_at));
  attr(cells.made, "title", exact(job.created_at));
  list(cells.labels, Object.entries(job.labels), ([key]) => key, () => h("a", { class: "label" }), (tag, [key, value]) => {
    text(tag, `${key}=${value}`);
    attr(tag, "href", `/?label=${encodeURIComponent(`${key}=${value}`)}`);
  });
  showStatus(cells.status, job.status);
  text(cells.why, why(job));
  put(cells.step, progress.steps ? `${count(progress.step)} / ${count(progress.steps)}` : progress.step ? count(progress.step) : NONE);
  text(cells.share, progress.steps ? percent(progress.percent) : "");
  show(cells.meter, progress.percent !== null);
  attr(cells.meter, "value", progress.percent ?? 0);
  attr(cells.meter, "aria-label", `Progress of ${job.name}`);
  put(cells.loss, progress.nonfinite ? "not finite" : loss(progress.loss));
  const running = job.status === "running";
  put(cells.rate, running ? short(progress.tokens_per_second) : NONE);
  put(cells.eta, running ? duration(progress.eta_seconds) : NONE);
  put(cells.devices, devices.join(", ") || NONE);
  spark(cells.line, curve);
}

/** A cell that a narrow window leaves out where it says nothing. */
function put(node, words) {
  text(node, words);
  node.closest("td").classList.toggle("nothing", words === NONE);
}

/** Why it is not simply running: what it waits for, what it does, what ended it. */
function why(job) {
  if (job.status === "queued") return `position ${count(job.queue.position)}, waits for ${job.queue.waiting_for}`;
  const words = (name) => name?.replaceAll("_", " ");
  return [job.phase && job.phase !== "training" ? words(job.phase) : null, words(job.reason)].filter(Boolean).join(", ");
}

function spark(line, values) {
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const at = (value, i) => `${((i / Math.max(1, values.length - 1)) * 82 + 1).toFixed(1)},${(20 - ((value - low) / span) * 18).toFixed(1)}`;
  attr(line, "points", values.length > 1 ? values.map(at).join(" ") : "");
}
