// What the page of a job shows besides charts and lists: description, group, labels, key facts, parent and forks, the jobs ahead, and a failure.
import { ApiError, get, sendJson, withQuery } from "../api.js";
import { announce, copyText, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { saveDraft } from "../form/draft.js";
import { ago, bytes, compactNumber, count, dateTime, duration, fewDigits, loss, percent, timeOrDateTime } from "../format.js";
import { t, tNodes, tn } from "../i18n.js";
import { lazy } from "../lazy.js";
import { navigate } from "../router.js";
import { wordFor } from "../status.js";

const loadEditForm = lazy(() => import("./edit-form.js"));

// One text of a job that is edited where it is shown: Enter saves (in a long text with Ctrl), Escape leaves it as it was.

class EditableText {
  /** `name`, `add` and `change`: the names of the field and of the buttons; `shown`: the element with the text; `send(value)` saves it, null if it is empty. `suggestions`: texts that are offered. */
  constructor({ name, add, change }, shown, send, { long = false, suggestions = [] } = {}) {
    Object.assign(this, { name, add, change, shown, send, long, suggestions });
    this.button = h("button", { type: "button", class: "quiet", onclick: () => this.start() });
    this.error = h("span", { class: "error", role: "alert", hidden: true });
    this.node = h("span", { class: long ? "editable long" : "editable" }, shown, this.button, this.error);
    this.node.addEventListener("keydown", (event) => this.onKey(event));
  }

  update(value) {
    this.value = value;
    setVisible(this.shown, value && !this.input);
    setText(this.button, value ? "✎" : this.add);
    setAttr(this.button, "aria-label", value ? this.change : null);
  }

  start() {
    this.input = h(this.long ? "textarea" : "input", { "aria-label": this.name, rows: this.long ? "3" : null });
    this.input.value = this.value ?? "";
    const list = this.suggestions.length ? h("datalist", { id: "suggestions" }, this.suggestions.map((text) => h("option", { value: text }))) : null;
    setAttr(this.input, "list", list?.id);
    this.editor = h("span", { class: "editor-row" }, this.input, list, h("button", { type: "button", class: "primary", onclick: () => this.save() }, t("Save")), h("button", { type: "button", onclick: () => this.stop() }, t("Discard")));
    setVisible(this.shown, false);
    setVisible(this.button, false);
    this.node.insertBefore(this.editor, this.error);
    this.input.focus();
  }

  onKey(event) {
    if (!this.input || event.isComposing) return;
    if (event.key === "Escape") this.stop();
    if (event.key === "Enter" && event.target === this.input && (!this.long || event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.save();
    }
  }

  async save() {
    try {
      const value = this.input.value.trim() || null;
      if (value !== (this.value ?? null)) await this.send(value);
      this.stop();
    } catch (error) {
      setText(this.error, error instanceof ApiError && error.errors.length ? error.errors.map((problem) => problem.message).join("; ") : error.message);
      setVisible(this.error, true);
      this.input?.focus();
    }
  }

  stop() {
    this.editor.remove();
    this.input = null;
    setVisible(this.error, false);
    setVisible(this.button, true);
    this.update(this.value);
    this.button.focus();
  }
}

// Description, group, owner, labels and priority of a job, with a form to edit all that PATCH accepts.

export class Details {
  constructor(address, done) {
    Object.assign(this, { address, done });
    const send = (name) => async (value) => this.done(await sendJson("PATCH", this.address, { [name]: value }));
    this.description = new EditableText({ name: t("description"), add: t("Add a description"), change: t("Change the description") }, h("span", { class: "description" }), send("description"), { long: true });
    this.group = new EditableText({ name: t("group"), add: t("Add a group"), change: t("Change the group") }, h("a"), send("group"));
    // A job always has an owner, so the first text is never shown.
    this.owner = new EditableText({ name: t("owner"), add: "", change: t("Change the owner") }, h("span", { class: "muted" }), send("owner"));
    setVisible(this.owner.button, false);
    this.offerOwners();
    this.labels = h("span", { class: "labels" });
    this.priority = h("span", { class: "muted" });
    this.edit = h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => (this.form ? this.cancel() : this.startEditing()) }, t("✎ Edit"));
    setVisible(this.edit, false); // There is nothing to edit until the job is known.
    this.place = h("div", { class: "editing" });
    this.node = h("div", { class: "details" }, this.description.node, h("div", { class: "line" }, this.group.node, this.labels, this.owner.node, this.priority, this.edit), this.place);
  }

  update(job) {
    this.job = job;
    setVisible(this.edit, true);
    setText(this.description.shown, job.description);
    this.description.update(job.description);
    setText(this.group.shown, t("group {group}", { group: job.group }));
    setAttr(this.group.shown, "href", `/?group=${encodeURIComponent(job.group ?? "")}`);
    this.group.update(job.group);
    setText(this.owner.shown, t("owner {owner}", { owner: job.owner }));
    this.owner.update(job.owner);
    setVisible(this.labels, Object.keys(job.labels).length);
    updateList(this.labels, Object.entries(job.labels), ([key]) => key, () => h("a", { class: "label" }), (tag, [key, value]) => {
      setText(tag, `${key}=${value}`);
      setAttr(tag, "href", `/?label=${encodeURIComponent(`${key}=${value}`)}`);
    });
    setText(this.priority, t("priority {priority}", { priority: job.spec.resources.priority }));
    this.form?.update(job);
  }

  /** Only an admin may give a job to another owner, and only to a token: without tokens there is no other owner. */
  async offerOwners() {
    try {
      if ((await get("/version")).scope !== "admin") return;
      const tokens = (await get("/tokens?limit=100")).data.filter((known) => known.revoked_at === null);
      if (!tokens.length) return;
      this.owner.suggestions = [...tokens.map((known) => known.name), "local"];
      setVisible(this.owner.button, true);
    } catch {
      // The page works without it.
    }
  }

  async startEditing() {
    const { openEditForm } = await loadEditForm();
    const saved = (job) => {
      announce(t("Changed"));
      this.cancel();
      this.done(job);
    };
    const form = await openEditForm(this.address, this.job, saved, () => this.cancel());
    if (this.form) return;
    this.form = form;
    this.place.replaceChildren(form.node);
    setAttr(this.edit, "aria-expanded", "true");
    form.focus();
  }

  cancel() {
    this.form = null;
    this.place.replaceChildren();
    setAttr(this.edit, "aria-expanded", "false");
    this.edit.focus();
  }
}

// Table of key facts beside the loss chart.

const NAMES = {
  step: t("Step"), loss: t("Loss"), bpb: t("Bits per byte"), heldOut: t("Held-out"), rate: t("Learning rate"), norm: t("Gradient norm"), tokens: t("Tokens"), speed: t("Tokens/s"), mfu: t("MFU"),
  eta: t("ETA"), limits: t("Limits left"), checkpoint: t("Checkpoint"), attempt: t("Attempt"), parameters: t("Parameters"), device: t("Device"), slowest: t("Slowest rank"), started: t("Started"),
};

export class KeyFacts {
  constructor() {
    this.values = new Map(Object.keys(NAMES).map((name) => [name, h("dd", {}, "–")]));
    this.node = h("dl", { class: "facts" }, Object.entries(NAMES).map(([name, label]) => h("div", {}, h("dt", {}, label), this.values.get(name))));
  }

  put(name, value, title = null) {
    const node = this.values.get(name);
    setText(node, value);
    setAttr(node, "title", title);
  }

  update(job) {
    const { progress, plan, checkpoint } = job;
    this.ranks = plan.ranks ?? [];
    this.updatePoint({ ...progress });
    const running = job.status === "running";
    this.steps = progress.steps;
    this.put("step", this.stepText(progress.step));
    // `plan.tokens` is one epoch of the corpus, so the total comes from the number of steps.
    const tokens = plan.tokens_per_step && progress.steps ? plan.tokens_per_step * progress.steps : null;
    this.put("tokens", tokens ? t("{part} of {whole}", { part: compactNumber(progress.tokens), whole: compactNumber(tokens) }) : compactNumber(progress.tokens));
    this.put("speed", running ? compactNumber(progress.tokens_per_second) : "–");
    this.put("mfu", running && progress.mfu !== null ? percent(progress.mfu * 100) : "–");
    this.put("eta", running ? duration(progress.eta_seconds) : "–");
    this.put("limits", limitsLeft(job.limits_left), t("training time and tokens until limits.max_minutes and training.max_tokens"));
    this.put("checkpoint", checkpoint ? t("{step}, {ago}", { step: count(checkpoint.step), ago: ago(checkpoint.created_at) }) : t("none yet"), checkpoint ? dateTime(checkpoint.created_at) : null);
    this.put("attempt", job.attempt ?? "–");
    this.put("parameters", compactNumber(plan.parameters));
    this.put("device", plan.device ? `${plan.world_size ?? 1} × ${plan.device}` : "–", plan.device_name);
    this.put("started", timeOrDateTime(job.started_at), dateTime(job.started_at));
  }

  /** Shows a point of the metric stream before the next poll. */
  updatePoint(row) {
    if (row.step) this.put("step", this.stepText(row.step));
    this.put("loss", row.nonfinite ? t("not finite") : loss(row.loss));
    this.put("bpb", loss(row.bpb));
    // A point without an evaluation leaves the last one there.
    const isEvaluated = typeof row.eval_loss === "number";
    if (isEvaluated) this.put("heldOut", heldOutText(row), t("step {step}, all held-out sets together", { step: count(row.eval_step ?? row.step) }));
    this.put("rate", fewDigits(row.learning_rate));
    this.put("norm", fewDigits(row.grad_norm));
    this.put("slowest", ...this.slowestText(row.step_seconds_max_rank, row.step_seconds_spread));
  }

  /** Returns the text and the title for the rank that computed longest; a run with one rank has none. */
  slowestText(rank, spread) {
    if (rank === null || rank === undefined) return ["–"];
    const place = this.ranks.find((known) => known.rank === rank);
    const where = place ? `${rank}, ${place.host} ${place.device}` : rank;
    return [t("{rank}: {ratio} × median", { rank: where, ratio: fewDigits(spread) }), place ? t("{device}; time to compute a step, without waiting for other ranks", { device: place.name }) : null];
  }

  stepText(step) {
    return this.steps ? t("{n} of {all}", { n: count(step), all: count(this.steps) }) : count(step);
  }
}

const heldOutText = (row) => (typeof row.eval_bpb === "number" ? t("{loss}, {bpb} bits/byte", { loss: loss(row.eval_loss), bpb: loss(row.eval_bpb) }) : loss(row.eval_loss));

function limitsLeft(left) {
  if (!left) return "–";
  const parts = [left.seconds === null ? null : duration(left.seconds), left.tokens === null ? null : t("{n} tokens", { n: compactNumber(left.tokens) })];
  return parts.filter((part) => part !== null).join(t(", "));
}

// Parent and forks of a job, with a link that compares them.

const LINEAGE_REFRESH_MS = 10_000;
const MAX_FORKS = 8;

export class Lineage {
  constructor(id) {
    this.id = id;
    this.parent = h("a");
    this.from = h("span", {}, tNodes("↳ Forked from {parent}{step}", { parent: this.parent, step: (this.step = h("span")) }));
    this.forks = h("span", { class: "forks" });
    this.forkCount = h("span");
    this.compare = h("a", {}, t("Compare"));
    this.node = h("p", { class: "lineage muted", hidden: true }, this.from, h("span", {}, this.forkCount, this.forks), this.compare);
  }

  async update(job) {
    const now = performance.now();
    if (this.askedAt && now - this.askedAt < LINEAGE_REFRESH_MS) return;
    this.askedAt = now;
    const children = (await get(withQuery("/jobs", { parent: this.id, limit: 100 }))).data;
    if (job.parent && !this.name) this.name = await get(`/jobs/${encodeURIComponent(job.parent.job_id)}`).then((other) => other.name, () => null);
    this.draw(job.parent, children.reverse());
  }

  draw(parent, children) {
    setVisible(this.node, parent || children.length);
    setVisible(this.from, parent);
    if (parent) {
      setAttr(this.parent, "href", this.name ? `/jobs/${parent.job_id}` : null);
      setText(this.parent, this.name ?? t("{id} (deleted)", { id: parent.job_id }));
      const at = { step: count(parent.step) };
      setText(this.step, parent.step === null ? "" : parent.data === "restart" ? t(" at step {step}, data and schedule restarted", at) : t(" at step {step}", at));
    }
    setVisible(this.forkCount, children.length);
    setText(this.forkCount, `${parent ? "" : "↳ "}${tn(children.length, "1 fork: ", "{n} forks: ")}`);
    updateList(this.forks, children.slice(0, MAX_FORKS), (child) => child.id, () => h("span", {}, h("a"), h("span")), (part, child) => {
      setAttr(part.firstChild, "href", `/jobs/${child.id}`);
      setText(part.firstChild, child.name);
      setText(part.lastChild, t(" at {step}, {status}", { step: count(child.parent.step), status: wordFor(child.status) }));
    });
    const all = [...(parent && this.name ? [parent.job_id] : []), this.id, ...children.map((child) => child.id)].slice(0, 10);
    setAttr(this.compare, "href", `/compare?jobs=${all.join(",")}`);
    setVisible(this.compare, all.length > 1);
  }
}

// The jobs ahead of a queued job: those that hold devices, with their remaining time, and those earlier in the queue.

const QUEUE_REFRESH_MS = 5000;
const MAX_NAMED = 2; // of each kind

export class JobsAhead {
  constructor() {
    this.names = h("span", { class: "job-names" });
    this.rest = h("span");
    this.node = h("p", { class: "jobs-ahead muted", hidden: true }, t("Jobs ahead: "), this.names, this.rest);
  }

  async update(job) {
    const waits = job.status === "queued";
    if (!waits) return setVisible(this.node, false);
    const now = performance.now();
    if (this.askedAt && now - this.askedAt < QUEUE_REFRESH_MS) return;
    this.askedAt = now;
    const [running, queued] = await Promise.all([get(withQuery("/jobs", { status: ["starting", "running"], limit: 100 })), get("/jobs?status=queued&limit=100")]);
    const left = (other) => other.progress.eta_seconds ?? Infinity;
    const holding = running.data.sort((a, b) => left(a) - left(b));
    const earlier = queued.data.filter((other) => other.queue.position < job.queue.position).sort((a, b) => a.queue.position - b.queue.position);
    this.draw(holding, earlier);
  }

  draw(holding, earlier) {
    const shown = [...holding.slice(0, MAX_NAMED), ...earlier.slice(0, MAX_NAMED)];
    const more = holding.length + earlier.length - shown.length;
    setVisible(this.node, shown.length);
    updateList(this.names, shown, (other) => other.id, () => h("span", {}, h("a"), h("span")), (part, { id, name, progress }) => {
      setAttr(part.firstChild, "href", `/jobs/${id}`);
      setText(part.firstChild, name);
      setText(part.lastChild, progress.eta_seconds ? t(" (about {duration} left)", { duration: duration(progress.eta_seconds) }) : "");
    });
    setText(this.rest, more ? t(", and {n} more.", { n: more }) : t("."));
  }
}

// Card of a failed job: message, hint, log tail, and the next actions as buttons and commands. Rebuilt only if the error changes.

export class FailureCard {
  /** `done(job)` is called after an action changed the job. */
  constructor(done) {
    this.done = done;
    this.node = h("section", { class: "card", hidden: true, "aria-label": t("What went wrong") });
    this.error = h("p", { class: "error", role: "alert" });
  }

  update(job) {
    const { error } = job;
    setVisible(this.node, error);
    const mark = JSON.stringify([error, job.summary.includes(error?.message)]);
    if (!error || this.mark === mark) return;
    this.mark = mark;
    const code = wordFor(error.code);
    this.node.replaceChildren(h("h2", {}, `✗ ${error.rank === null ? code : t("{error} on rank {rank}", { error: code, rank: error.rank })}`), ...this.evidence(job, error), this.nextActions(job, error.next), this.error);
    setText(this.error, "");
  }

  evidence(job, error) {
    // The summary above the card often contains the message already.
    const isInSummary = job.summary.toLowerCase().includes(error.message.toLowerCase());
    const tail = error.log_tail.join("\n");
    const lines = tn(error.log_tail.length, "Last line of rank {rank}", "Last {n} lines of rank {rank}", { rank: error.rank ?? 0 });
    const own = error.traceback && error.traceback.trim() !== tail.trim() ? error.traceback : null;
    return [
      isInSummary ? "" : h("p", {}, error.message),
      error.hint ? h("p", { class: "hint" }, error.hint) : "",
      error.peak_memory_bytes ? h("p", {}, t("Peak memory of a rank: "), h("strong", {}, bytes(error.peak_memory_bytes))) : "",
      tail ? h("details", { open: true }, h("summary", {}, lines), h("pre", { tabindex: "0", class: "evidence" }, tail)) : "",
      own ? h("details", {}, h("summary", {}, t("Traceback")), h("pre", { tabindex: "0", class: "evidence" }, own)) : "",
    ];
  }

  nextActions(job, next) {
    if (!next.length) return "";
    return h("div", { class: "next-actions" }, h("h3", {}, t("What you can do now")), h("ul", {}, next.map((action) => h("li", {}, this.button(job, action),
      h("span", { class: "command-line" }, h("code", {}, action.command), h("button", { type: "button", class: "quiet", "aria-label": t("Copy: {command}", { command: action.command }), onclick: () => copyText(action.command, t("Command")) }, t("Copy")))))));
  }

  /** A fork or a new job opens in the form, to be reviewed before it is launched. */
  button(job, { action, words, path, body }) {
    if (action === "logs") return h("a", { class: "button", href: `/jobs/${job.id}?tab=logs&${path.split("?")[1]}` }, words);
    const press = {
      resume: () => this.post(path, body),
      fork: () => (saveDraft({ fork: job.id }, body.overrides), navigate(`/submit?fork=${job.id}&step=${body.step}`)),
      submit: () => (saveDraft({ like: job.id }, body), navigate(`/submit?like=${job.id}`)),
    }[action];
    return h("button", { type: "button", onclick: press }, words);
  }

  async post(path, body) {
    try {
      this.done(await sendJson("POST", path, body));
      announce(t("resume requested"));
    } catch (error) {
      setText(this.error, error instanceof ApiError ? `${t("resume")}: ${error.message}` : error.message);
    }
  }
}
