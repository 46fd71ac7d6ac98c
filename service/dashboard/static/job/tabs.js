// The tabs of a job. A tab is created when it is opened, and updated with every poll of the job.
import { ApiError, get, getAll, request, sendJson, token } from "../api.js";
import { announce, copyText, createTable, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { NONE, ago, bytes, count, dateTime, loss, timeOrDateTime } from "../format.js";
import { t } from "../i18n.js";
import { lazy } from "../lazy.js";
import { Menu } from "../menu.js";
import { getParam } from "../router.js";
import { wordFor } from "../status.js";
import { startsFrom } from "./checkpoint-actions.js";
import { MetricsTab } from "./metrics-tab.js";

// Base class of tabs that show one of a job's lists as a table.

const WITHOUT_LABEL = new Set([t("Actions"), t("Message"), t("Outcome")]); // Clear without a label, and as wide as the window.

/** Fetches the list again when `mark(job)` changes. */
class ListTab {
  constructor(place, address, { path, columns, caption, none, key = (item) => item.id, row, mark }) {
    Object.assign(this, { address, path, key, row, mark });
    this.table = createTable(columns, caption);
    this.names = columns.map(([name]) => name);
    this.table.node.classList.add("stack");
    this.none = h("p", { class: "muted", hidden: true }, none);
    this.error = h("p", { class: "error", role: "alert" });
    place.append(this.error, this.none, this.table.node);
  }

  async update(job) {
    const mark = this.mark(job);
    if (mark === this.shownMark) return;
    this.shownMark = mark;
    try {
      const items = await this.fetchAll();
      setVisible(this.none, !items.length);
      setVisible(this.table.node, items.length);
      updateList(this.table.body, items, this.key, (item) => this.addLabels(this.row(item, this)));
    } catch {
      this.shownMark = null;
    }
  }

  /** In a narrow window a row is a block, so each cell has a label. */
  addLabels(row) {
    [...row.children].forEach((part, i) => !WITHOUT_LABEL.has(this.names[i]) && (part.dataset.name = this.names[i].toLowerCase()));
    return row;
  }

  fetchAll() {
    return getAll(`${this.address}${this.path}`);
  }
}

/** Creates a cell; a narrow window hides it if it has no value. */
function cell(value, kind = "", title = null) {
  const text = value ?? NONE;
  return h("td", { class: text === NONE ? `${kind} empty-cell` : kind, title }, text);
}

const changeMark = (job) => `${job.status} ${job.attempt} ${job.checkpoint?.step} ${job.alerts.length}`;

/** Runs the action of a button and shows an error above the table. */
async function runAction(listing, work) {
  setText(listing.error, "");
  try {
    await work();
  } catch (error) {
    setText(listing.error, error instanceof ApiError ? [error.message, ...error.errors.map((problem) => `${problem.pointer}: ${problem.message}`)].join(" ") : error.message);
  }
}

// Checkpoints of a job, with what can be started from each, and the list of exports.

const FORMATS = { hf: "Hugging Face", minimind: "MiniMind" };
const KINDS = { full: t("full"), weights: t("weights") };
const COLUMNS = [[t("Step"), "num"], [t("Kind")], [t("Loss"), "num"], [t("Size"), "num"], [t("Saved")], ["sha256"], [t("Actions")]];
const BUTTONS = 3; // of what starts from a checkpoint: to generate, fork and decay; the others are in a menu
const EXPORT_COLUMNS = [[t("Step"), "num"], [t("Format")], [t("Size"), "num"], [t("Path")], [t("Files")]];

class CheckpointsTab extends ListTab {
  constructor(place, address, page) {
    super(place, address, { path: "/checkpoints", caption: t("Checkpoints, newest first"), none: t("No checkpoint yet."), mark: changeMark, columns: COLUMNS, row: checkpointRow });
    this.exported = createTable(EXPORT_COLUMNS, t("Exports"));
    this.exported.node.classList.add("stack");
    this.exports = h("section", { hidden: true }, h("h2", {}, t("Exports")), this.exported.node);
    this.page = page;
    this.wanted = getParam("at");
    place.append(this.exports);
  }

  async update(job) {
    const mark = this.mark(job);
    this.job = job;
    await Promise.all([super.update(job), mark === this.exportsMark ? null : this.updateExports(mark)]);
    this.showWanted();
  }

  /** Marks the row of the step in the URL once, and moves the focus there. */
  showWanted() {
    const row = this.wanted && this.table.body.querySelector(`[data-step="${CSS.escape(this.wanted)}"]`);
    if (!row) return;
    this.wanted = null;
    row.classList.add("highlighted");
    row.querySelector("button")?.focus();
    row.scrollIntoView({ block: "center" });
  }

  async updateExports(mark = this.exportsMark) {
    this.exportsMark = mark;
    try {
      const { data } = await get(`${this.address}/exports`);
      setVisible(this.exports, data.length);
      updateList(this.exported.body, data, (exported) => exported.id, (exported) => exportRow(exported, this));
    } catch {
      this.exportsMark = null;
    }
  }
}

function checkpointRow(checkpoint, listing) {
  const at = `${listing.address}/checkpoints/${checkpoint.step}`;
  // Asked for at each press, because what is possible changes with the state of the job.
  const starts = () => startsFrom(checkpoint, listing.page, (work) => runAction(listing, work));
  const doing = checkpoint.kind === "full" ? starts().slice(0, BUTTONS).map(({ label }, i) => h("button", { type: "button", onclick: () => starts()[i].press() }, label)) : [];
  const menu = new Menu(t("More"), () => [...starts().slice(BUTTONS), ...filesOf(checkpoint, listing, at)], { name: t("More from step {step}", { step: count(checkpoint.step) }) });
  return h("tr", { "data-step": checkpoint.step }, cell(count(checkpoint.step), "num"), cell(KINDS[checkpoint.kind] ?? checkpoint.kind), cell(loss(checkpoint.loss), "num"), cell(bytes(checkpoint.bytes), "num"),
    cell(ago(checkpoint.created_at), "", dateTime(checkpoint.created_at)), h("td", {}, h("code", { title: checkpoint.sha256 }, checkpoint.sha256.slice(0, 12))),
    h("td", { class: "row-actions" }, doing, menu.node));
}

/** Items of a menu that download or export the checkpoint. */
function filesOf(checkpoint, listing, at) {
  const weightsOnly = checkpoint.kind === "full" ? null : t("only its weights are stored");
  const item = (label, work, why = null) => ({ label, why, press: () => runAction(listing, work) });
  return [item(t("Download"), () => download(at, "model.safetensors")), ...Object.entries(FORMATS).map(([format, label]) => item(t("Export {format}", { format: label }), () => exportCheckpoint(listing, at, format), weightsOnly))];
}

/** Creates a button that is disabled while its action runs. */
function busyButton(listing, name, work) {
  const press = async () => {
    if (button.hasAttribute("aria-disabled")) return;
    setAttr(button, "aria-disabled", "true");
    setText(button, `${name} …`);
    await runAction(listing, work);
    setAttr(button, "aria-disabled", null);
    setText(button, name);
  };
  const button = h("button", { type: "button", onclick: press }, name);
  return button;
}

async function exportCheckpoint(listing, at, format) {
  announce(t("The checkpoint is being exported for {format} …", { format: FORMATS[format] }));
  const { path } = await sendJson("POST", `${at}/export`, { format });
  announce(t("Exported to {path}", { path }));
  await listing.updateExports();
}

function exportRow(exported, listing) {
  const files = exported.files.map((file) =>
    busyButton(listing, file.name, () => download(`${listing.address}/exports/${exported.step}/${exported.format}`, file.name)));
  const path = h("td", { class: "whole" }, h("code", {}, exported.path), " ", h("button", { type: "button", class: "quiet", "aria-label": t("Copy the path of {id}", { id: exported.id }), onclick: () => copyText(exported.path, t("Path")) }, t("copy")));
  return h("tr", {}, cell(count(exported.step), "num"), cell(FORMATS[exported.format] ?? exported.format), cell(bytes(exported.bytes), "num"), path, h("td", { class: "row-actions" }, files));
}

/** Without a token the browser streams to disk. A token must be sent in a header, so the file is loaded into memory first. */
async function download(place, name) {
  const path = `${place}/files/${encodeURIComponent(name)}`;
  if (!token.get()) return h("a", { href: path, download: name }).click();
  const blob = await (await request(path, { headers: { Accept: "*/*" } })).blob();
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Generated samples as a table: one row per prompt, one column per step, newest first.

const INITIAL_STEPS = 6;
const MAX_SAMPLES = 5000; // the newest ones

class SamplesTab {
  constructor(place, address) {
    this.address = address;
    this.samples = [];
    this.none = h("p", { class: "muted", hidden: true }, t("No samples yet. Set prompts in reporting.sample_prompts."));
    this.note = h("span", { class: "muted", role: "status" });
    this.allButton = h("button", { type: "button", "aria-pressed": "false", hidden: true, onclick: () => this.toggleAll() });
    this.bar = h("div", { class: "bar" }, this.note, this.allButton);
    this.head = h("tr");
    this.body = h("tbody");
    const table = h("table", {}, h("caption", { class: "visually-hidden" }, t("Samples by prompt and step, newest first")), h("thead", {}, this.head), this.body);
    this.box = h("div", { class: "scroll samples", tabindex: "0", role: "region", "aria-label": t("Samples") }, table);
    place.append(this.none, this.bar, this.box);
  }

  async update(job) {
    const mark = `${changeMark(job)} ${job.progress.step}`;
    if (mark === this.mark) return;
    this.mark = mark;
    try {
      await this.fetchNew();
      this.draw();
    } catch (error) {
      this.mark = null;
      if (error instanceof TypeError) throw error;
    }
  }

  /** Fetches samples after the last one known; a sample never changes. */
  async fetchNew() {
    this.samples = await appendNewer(this.samples, `${this.address}/samples`, MAX_SAMPLES);
  }

  toggleAll() {
    setAttr(this.allButton, "aria-pressed", String(this.allButton.getAttribute("aria-pressed") !== "true"));
    this.draw();
  }

  draw() {
    const steps = [...new Set(this.samples.map((sample) => sample.step))].sort((a, b) => b - a);
    const whole = this.allButton.getAttribute("aria-pressed") === "true";
    const shown = whole ? steps : pickEvenly(steps, INITIAL_STEPS);
    setVisible(this.none, !steps.length);
    setVisible(this.box, steps.length);
    setVisible(this.allButton, steps.length > INITIAL_STEPS);
    setText(this.allButton, t("All {n} steps", { n: count(steps.length) }));
    setText(this.note, steps.length > shown.length ? t("{n} of {all} steps, spread over the run", { n: shown.length, all: count(steps.length) }) : "");
    // If a step was trained twice, the later attempt's sample wins.
    const known = new Map(this.samples.map((sample) => [`${sample.step} ${sample.prompt}`, sample]));
    const cells = [null, ...shown];
    updateList(this.head, cells, String, (step) => h("th", { scope: "col" }, step === null ? t("Prompt") : t("step {step}", { step: count(step) })));
    updateList(this.body, [...new Set(this.samples.map((sample) => sample.prompt))], String, () => h("tr"), (row, prompt) =>
      updateList(row, cells, String, (step) => (step === null ? h("th", { scope: "row" }, prompt) : h("td", { class: "sample" })), (cell, step) => fillCell(cell, step, known.get(`${step} ${prompt}`))));
  }
}

function fillCell(cell, step, sample) {
  if (step === null) return;
  setText(cell, sample?.note ? `${sample.text}\n[${sample.note}]` : (sample?.text ?? "–"));
  setAttr(cell, "title", sample ? dateTime(sample.at) : null);
}

/** Picks the newest, the oldest and some between; newest first. */
function pickEvenly(steps, max) {
  if (steps.length <= max) return steps;
  return [...new Set(Array.from({ length: max }, (_, i) => steps[Math.round((i * (steps.length - 1)) / (max - 1))]))];
}

class OverviewTab extends ListTab {
  constructor(place, address, page) {
    page.overview.insertBefore(page.jobCharts.bar, page.overview.querySelector(".main-chart"));
    place.append(page.overview, h("h2", { class: "attempts-title" }, t("Attempts")));
    super(place, address, {
      path: "/attempts", caption: t("Attempts"), none: t("Not launched yet."), mark: changeMark, key: (attempt) => `${attempt.id} ${attempt.ended_at} ${attempt.started_at}`,
      columns: [[t("Attempt")], [t("Trigger")], [t("From step"), "num"], [t("To step"), "num"], [t("Devices")], [t("Started")], [t("Ended")], [t("Outcome")]],
      row: (attempt) => h("tr", {}, cell(String(attempt.number)), cell(wordFor(attempt.trigger)), cell(count(attempt.start_step), "num"), cell(count(attempt.end_step), "num"), cell(attempt.devices.join(", ")),
        cell(timeOrDateTime(attempt.started_at), "", dateTime(attempt.started_at)), cell(timeOrDateTime(attempt.ended_at), "", dateTime(attempt.ended_at)), cell(attempt.message ?? wordFor(attempt.outcome), "whole")),
    });
  }
}

const MAX_EVENTS = 1000; // the newest ones

class EventsTab extends ListTab {
  constructor(place, address) {
    super(place, address, {
      path: "/events", caption: t("Events, newest first"), none: t("No events yet."), mark: (job) => `${changeMark(job)} ${job.progress.updated_at}`,
      columns: [[t("When")], [t("By")], [t("Event")], [t("Message")]],
      row: (event) => h("tr", {}, cell(timeOrDateTime(event.at), "num", dateTime(event.at)), cell(event.actor), cell(event.kind), cell(event.message, "whole")),
    });
    this.events = [];
  }

  /** Fetches only the events after the last known one, because an event never changes. A long run has thousands: two for each save. */
  async fetchAll() {
    this.events = await appendNewer(this.events, `${this.address}/events`, MAX_EVENTS);
    return [...this.events].reverse();
  }
}

/** Returns the newest `most` entries of a list in which the oldest entry is first. `known`: entries that were fetched before. */
async function appendNewer(known, path, most) {
  const newer = await getAll(path, { most: Infinity, after: known.at(-1)?.id });
  return [...known, ...newer].slice(-most);
}

/** Returns the class of a tab whose module is loaded when it is opened first. `load()` returns a promise of the tab's own class. */
function lazyTab(load) {
  return class {
    constructor(place, ...given) {
      const open = (Tab) => {
        if (this.isClosed) return;
        this.tab = new Tab(place, ...given);
        if (this.job) this.tab.update(this.job);
      };
      load().then(open, () => place.append(h("p", { class: "error", role: "alert" }, t("This tab could not be loaded. Load the page again."))));
    }

    update(job) {
      this.job = job;
      return this.tab?.update(job);
    }

    close() {
      this.isClosed = true;
      this.tab?.close?.();
    }
  };
}

const LogsTab = lazyTab(lazy(() => import("./logs-tab.js").then((module) => module.LogsTab)));
const EvaluationsTab = lazyTab(lazy(() => import("./evaluations-tab.js").then((module) => module.EvaluationsTab)));
const TryTab = lazyTab(lazy(() => import("./try-tab.js").then((module) => module.TryTab)));
const ConfigTab = lazyTab(lazy(() => import("./config-tab.js").then((module) => module.ConfigTab)));

export const TAB_NAMES = {
  overview: t("overview"), metrics: t("metrics"), logs: t("logs"), checkpoints: t("checkpoints"), samples: t("samples"), evaluations: t("evaluations"), try: t("try"), config: t("config"), events: t("events") };
export const TABS = { overview: OverviewTab, metrics: MetricsTab, logs: LogsTab, checkpoints: CheckpointsTab, samples: SamplesTab, evaluations: EvaluationsTab, try: TryTab, config: ConfigTab, events: EventsTab };
