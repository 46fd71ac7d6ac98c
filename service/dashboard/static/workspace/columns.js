// The columns of the table of jobs. A row is of one job, or of several that are folded.
import { h, setAttr, setText, setVisible, svg, updateList } from "../dom.js";
import { formatValue, getAt } from "../form/schema.js";
import { NONE, ago, compactNumber, count, dateTime, duration, fewDigits, loss, percent, secondsSince } from "../format.js";
import { t } from "../i18n.js";
import { flatten } from "../spec-diff.js";
import { showStatus, statusBadge, wordFor } from "../status.js";

const SCORES = {
  bpb: (step) => t("best held-out bits per byte, at step {step}", { step }), eval_loss: (step) => t("best held-out loss, at step {step}", { step }), loss: (step) => t("smoothed loss at step {step}", { step }),
};
const NOT_OFFERED = new Set(["name", "description", "group", "version"]);

const isRunning = (job) => job.status === "running";
const inSpec = (...path) => (job) => getAt(job.spec, path) ?? null;

/** Sequences of a step: of all ranks if they are known. */
function batch(job) {
  const own = inSpec("training", "batch_size")(job);
  return job.plan?.global_batch ?? (own === null ? null : own * (inSpec("training", "accumulation_steps")(job) ?? 1));
}

/** Seconds of training, or since the start if they are not reported. */
const trainedSeconds = (job) => job.progress.train_seconds ?? (job.started_at ? secondsSince(job.started_at, job.finished_at ? Date.parse(job.finished_at) : Date.now()) : null);

/** A numeric column: folded jobs show the mean, and the range as a tooltip. */
const number = (key, label, width, value, format, title = null) => ({ key, label, width, value, format, title, numeric: true, create: textCell, update: updateNumber });
const text = (key, label, width, value, title = null) => ({ key, label, width, value, format: String, title, create: textCell, update: updateText });

/** `key` is the name in the address, `width` in px; `value(job)` is sorted by, and null if there is none. */
export const COLUMNS = [
  { ...text("status", t("Status"), 138, (job) => job.status), create: () => h("td", {}, statusBadge(), h("span", { class: "detail" })), update: updateStatus },
  { ...number("progress", t("Progress"), 165, (job) => job.progress.percent, percent), numeric: false, create: createProgress, update: updateProgress },
  { ...text("group", t("Group"), 90, (job) => job.group), create: () => h("td", {}, h("a")), update: updateGroup },
  { ...number("score", t("Score"), 70, (job) => job.score?.value ?? null, loss), hint: t("The best held-out bits per byte, else the best held-out loss, else the smoothed loss"),
    title: (job) => job.score && SCORES[job.score.metric](count(job.score.step)) },
  number("eval_loss", t("Held-out loss"), 105, (job) => job.progress.eval_loss, loss),
  number("bpb", t("Held-out bpb"), 105, (job) => job.progress.eval_bpb, loss),
  { ...number("loss", t("Loss"), 70, (job) => job.progress.loss, loss), missing: (job) => (job.progress.nonfinite ? t("not finite") : NONE) },
  number("train_bpb", t("Train bpb"), 85, (job) => job.progress.bpb, loss),
  { key: "curve", label: t("Curve"), width: 94, numeric: true, value: null, create: createCurve, update: updateCurve },
  number("tokens", t("Tokens"), 85, (job) => job.progress.tokens, compactNumber),
  number("speed", t("Tokens/s"), 92, (job) => job.progress.tokens_per_second, compactNumber),
  number("eta", t("ETA"), 98, (job) => (isRunning(job) ? job.progress.eta_seconds : null), duration),
  number("rate", t("Learning rate"), 100, inSpec("training", "learning_rate"), formatValue),
  number("batch", t("Batch"), 70, batch, count),
  number("parameters", t("Parameters"), 95, (job) => job.plan?.parameters ?? null, compactNumber),
  { ...text("labels", t("Labels"), 117, (job) => Object.entries(job.labels).map((pair) => pair.join("=")).join(" ") || null), create: () => h("td", {}, h("span", { class: "labels" })), update: updateLabels },
  text("owner", t("Owner"), 100, (job) => job.owner),
  number("duration", t("Duration"), 100, trainedSeconds, duration),
  { ...number("created", t("Created"), 110, (job) => Date.parse(job.created_at), (at) => ago(new Date(at).toISOString())), title: (job) => dateTime(job.created_at) },
  number("mfu", t("MFU"), 70, (job) => (job.progress.mfu === null ? null : 100 * job.progress.mfu), percent),
  text("devices", t("Devices"), 130, null),
];
export const DEFAULT_COLUMNS = ["status", "progress", "group", "labels", "score", "loss", "curve", "speed", "eta"];
/** Left out by default if no job has one. */
export const OPTIONAL_COLUMNS = new Set(["group", "labels"]);
export const NAME_COLUMN = { key: "name", label: t("Job"), value: (job) => job.name.toLowerCase() };

const known = new Map(COLUMNS.map((column) => [column.key, column]));
const settings = new Map();

/** Returns the column for a name in the address: one of COLUMNS or a setting such as `training.optimizer`; undefined for any other text. */
export function findColumn(key) {
  if (known.has(key)) return known.get(key);
  if (!/^[a-z_]+(\.[^.]+)?(\.[^.]+)?$/.test(key)) return undefined;
  if (!settings.has(key)) settings.set(key, settingColumn(key));
  return settings.get(key);
}

function settingColumn(key) {
  const path = key.split(".");
  const raw = (job) => getAt(job.spec, path);
  const value = (job) => (job.spec === undefined || raw(job) === undefined ? null : typeof raw(job) === "number" ? raw(job) : formatValue(raw(job)));
  const label = path.at(-1).replaceAll("_", " ");
  return { ...text(key, label, Math.max(90, Math.min(180, 30 + 7 * label.length)), value), hint: key, isSetting: true, format: formatValue };
}

/** Returns the names of the settings in which the jobs differ. */
export function differingNames(jobs) {
  const first = new Map();
  const differing = new Set();
  for (const { spec } of jobs) {
    if (spec === undefined) continue;
    for (const [name, value] of flatten(spec)) {
      const shown = formatValue(value);
      if (!first.has(name)) first.set(name, shown);
      else if (first.get(name) !== shown) differing.add(name);
    }
  }
  return [...differing].filter((name) => !NOT_OFFERED.has(name) && !name.startsWith("labels.")).sort();
}

/** Returns what a row is sorted by: the mean of folded jobs, or the value that all of them share. */
export function rowValue(column, { jobs }) {
  if (!column.value) return null;
  const values = jobs.map((job) => column.value(job)).filter((value) => value !== null && value !== undefined);
  if (!values.length) return null;
  if (values.every((value) => typeof value === "number")) return values.reduce((sum, value) => sum + value, 0) / values.length;
  return new Set(values).size === 1 ? values[0] : null;
}

/** Returns a function that sorts rows by a column; rows without a value are last. */
export function sortRows(rows, column, descending) {
  const sign = descending ? -1 : 1;
  const compare = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1 : (typeof a === typeof b ? a < b : typeof a === "number") ? -sign : sign);
  return rows.map((row) => [rowValue(column, row), row]).sort(([a], [b]) => compare(a, b)).map(([, row]) => row);
}

// Cells. `update(cell, row, column, context)`; in the context: devices and sparklines.

function textCell({ numeric }) {
  return h("td", { class: numeric ? "num" : "cut" });
}

function updateNumber(cell, { jobs }, column) {
  const values = jobs.map((job) => column.value(job)).filter((value) => Number.isFinite(value));
  const [first] = jobs;
  if (!values.length) {
    setText(cell, column.missing?.(first) ?? NONE);
    return setAttr(cell, "title", null);
  }
  const [low, high] = [Math.min(...values), Math.max(...values)];
  // The mean of equal values would not be written like them: 3e-3 three times over is 3.0000000000000005e-3.
  setText(cell, column.format(low === high ? low : values.reduce((sum, value) => sum + value, 0) / values.length));
  const range = t("mean of {n}: {low} to {high}", { n: count(values.length), low: column.format(low), high: column.format(high) });
  return setAttr(cell, "title", jobs.length > 1 ? range : column.title?.(first));
}

function updateText(cell, { jobs }, column, context) {
  const value = column.value ?? ((job) => context.devices(job).join(", ") || null);
  const values = [...new Set(jobs.map(value).filter((each) => each !== null && each !== undefined))];
  const shown = values.length === 1 ? column.format(values[0]) : values.length ? t("{n} values", { n: count(values.length) }) : NONE;
  setText(cell, shown);
  const all = values.slice(0, 12).map(column.format).join(", ");
  setAttr(cell, "title", values.length > 1 || shown.length > 12 ? all : null);
}

/** Why the job is not simply running: its place in the queue, its phase, or why it ended. */
function statusDetail(job) {
  if (job.queue?.position) return t("position {n}", { n: count(job.queue.position) });
  if (job.preparation) return t("corpus {percent}, {duration} left", { percent: percent(job.preparation.percent), duration: duration(job.preparation.eta_seconds) });
  return [job.phase && job.phase !== "training" ? wordFor(job.phase) : null, wordFor(job.reason)].filter(Boolean).join(", ");
}

function updateStatus(cell, { jobs }) {
  const counts = new Map();
  for (const job of jobs) counts.set(job.status, (counts.get(job.status) ?? 0) + 1);
  const [[most]] = [...counts].sort(([, a], [, b]) => b - a);
  showStatus(cell.firstChild, most);
  const rest = [...counts].filter(([status]) => status !== most).map(([status, number]) => `${number} ${wordFor(status)}`);
  const detail = jobs.length === 1 ? statusDetail(jobs[0]) : counts.size === 1 ? "" : [t("{n} of {all}", { n: counts.get(most), all: jobs.length }), ...rest].join(", ");
  setText(cell.lastChild, detail);
  setAttr(cell.lastChild, "title", detail.length > 20 ? detail : null);
}

function createProgress() {
  const parts = { step: h("span"), share: h("span", { class: "muted" }), meter: h("progress", { class: "meter", max: "100" }) };
  return Object.assign(h("td", { class: "progress" }, h("span", { class: "progress-text" }, parts.step, parts.share), parts.meter), { parts });
}

function updateProgress({ parts }, { jobs, name }) {
  const known = jobs.map(({ progress }) => progress.percent).filter((value) => value !== null);
  const share = known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  const [{ progress }] = jobs;
  const steps = progress.steps ? `${count(progress.step)} / ${count(progress.steps)}` : progress.step ? count(progress.step) : NONE;
  setText(parts.step, jobs.length === 1 ? steps : t("{n} of {all} done", { n: known.filter((value) => value >= 100).length, all: jobs.length }));
  setText(parts.share, share === null ? "" : percent(share));
  setVisible(parts.meter, share !== null);
  setAttr(parts.meter, "value", share ?? 0);
  setAttr(parts.meter, "aria-label", t("Progress of {name}", { name }));
}

function updateGroup(cell, { jobs }, column) {
  const values = [...new Set(jobs.map((job) => job.group))];
  const group = values.length === 1 ? values[0] : null;
  setText(cell.firstChild, group ?? NONE);
  setAttr(cell.firstChild, "href", group === null ? null : `/?group=${encodeURIComponent(group)}`);
  setAttr(cell.firstChild, "title", group);
  cell.className = "cut";
  return column;
}

function updateLabels(cell, { jobs }) {
  const [first, ...others] = jobs;
  const shared = Object.entries(first.labels).filter(([key, value]) => others.every((job) => job.labels[key] === value));
  updateList(cell.firstChild, shared, (pair) => pair.join("="), ([key, value]) => h("a", { class: "label", href: `/?label=${encodeURIComponent(`${key}=${value}`)}`, title: `${key}=${value}` }, `${key}=${value}`));
  setAttr(cell, "title", shared.map((pair) => pair.join("=")).join(", ") || null);
}

function createCurve() {
  const line = svg("polyline");
  return Object.assign(h("td", {}, svg("svg", { class: "spark", viewBox: "0 0 84 22", "aria-hidden": "true" }, line)), { line });
}

function updateCurve({ line }, { jobs }, column, context) {
  const values = jobs.length === 1 ? context.spark(jobs[0]) : [];
  const low = Math.min(...values);
  // Nearly constant values are a flat line, not magnified noise.
  const span = Math.max(Math.max(...values) - low, Math.abs(low) / 100) || 1;
  const at = (value, i) => `${((i / Math.max(1, values.length - 1)) * 82 + 1).toFixed(1)},${(20 - ((value - low) / span) * 18).toFixed(1)}`;
  setAttr(line, "points", values.length > 1 ? values.map(at).join(" ") : "");
}
