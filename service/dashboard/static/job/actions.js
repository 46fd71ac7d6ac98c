// Action buttons of a job, with the reason if an action is not allowed, and the dialog to resume with changes.
import { ApiError, get, sendJson } from "../api.js";
import { announce, h, setAttr, setText, setVisible } from "../dom.js";
import { Field, SettingsForm } from "../form/field.js";
import { describeField, fetchSchemas, getAt, requestProperties } from "../form/schema.js";
import { navigate } from "../router.js";

// Action buttons of a job, with the reason if an action is not allowed. Kill, cancel and delete ask for confirmation.

const CONFIRM_QUESTIONS = {
  kill: "Kill this job now? It saves nothing: progress since its newest checkpoint is lost.",
  cancel: "Cancel this job? It saves a checkpoint first and then stops.",
  delete: "Delete this job's record and files? This cannot be undone.",
};
const ACTIONS = ["pause", "resume", "save", "cancel", "kill", "delete"];
const BUTTON_LABELS = { save: "save now" };

export class Actions {
  constructor(address, done) {
    this.address = address;
    this.done = done;
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.buttons = new Map(ACTIONS.map((verb) => [verb, h("button", { type: "button", class: verb in CONFIRM_QUESTIONS ? "danger" : "", onclick: () => this.press(verb) }, BUTTON_LABELS[verb] ?? verb)]));
    this.resumeWithButton = h("button", { type: "button", hidden: true, onclick: () => this.resume() }, "resume with…");
    this.node = h("div", { class: "actions" }, h("div", { class: "bar", role: "group", "aria-label": "Actions" }, ...this.buttons.values()), this.error);
    this.buttons.get("resume").after(this.resumeWithButton);
    this.whyNot = new Map();
  }

  update(job) {
    this.job = job;
    // A succeeded job can only be resumed with more steps or epochs.
    setVisible(this.resumeWithButton, job.resumable || job.status === "succeeded");
    for (const { action, allowed, why_not: why } of job.allowed_actions) {
      const button = this.buttons.get(action);
      if (!button) continue;
      this.whyNot.set(action, allowed ? null : why);
      setAttr(button, "aria-disabled", allowed ? null : "true");
      setAttr(button, "title", allowed ? null : why);
    }
  }

  async press(verb) {
    const why = this.whyNot.get(verb);
    if (why) return this.showError(`${verb}: ${why}`);
    if (verb in CONFIRM_QUESTIONS && !(await confirmAction(CONFIRM_QUESTIONS[verb], verb))) return;
    this.showError("");
    try {
      const job = await (verb === "delete" ? sendJson("DELETE", this.address) : sendJson("POST", `${this.address}/${verb}`));
      announce(`${verb} requested`);
      if (job) this.done(job);
      else navigate("/");
    } catch (error) {
      this.showError(error instanceof ApiError ? `${verb}: ${error.message}` : error.message);
    }
  }

  async resume() {
    try {
      await openResumeDialog(this.address, this.job, (job) => (announce("resume requested"), this.done(job)));
    } catch (error) {
      this.showError(error.message);
    }
  }

  showError(message) {
    setVisible(this.error, message);
    setText(this.error, message);
  }
}

/** Asks for confirmation in a dialog; the button that changes nothing has the focus. */
function confirmAction(question, verb) {
  return new Promise((done) => {
    const no = h("button", { type: "button", onclick: () => box.close() }, "Back");
    const yes = h("button", { type: "button", class: "danger", onclick: () => box.close("yes") }, verb);
    const box = h("dialog", { "aria-label": verb }, h("p", {}, question), h("div", { class: "bar" }, no, yes));
    box.addEventListener("close", () => (box.remove(), done(box.returnValue === "yes")));
    document.body.append(box);
    box.showModal();
    no.focus();
  });
}

// Dialog to resume a job with changes: more epochs or steps, another checkpoint, other resources.

const RESOURCES = ["nproc_per_node", "device", "max_restarts"];

/** Opens the dialog; `done(job)` is called after the job was resumed. */
async function openResumeDialog(address, job, done) {
  const fields = await resumeFields(address, job);
  const explanation = job.reason === "limit" ? "The run has ended at its limit. Set another limit to continue, or none."
    : job.status === "succeeded" ? "All steps are done. Set more steps, tokens or epochs to continue." : "Settings that you do not change stay as they are.";
  const sheet = new SettingsForm(fields, "Resume", {
    send: (changes) => sendJson("POST", `${address}/resume`, changes), done: (answer) => (box.close(), done(answer)), leave: () => box.close() });
  const box = h("dialog", { class: "wider", "aria-labelledby": "resume-title" }, h("h2", { id: "resume-title" }, `Resume ${job.name}`), h("p", { class: "muted" }, explanation), sheet.node);
  const before = document.activeElement;
  box.addEventListener("close", () => (box.remove(), before?.focus()));
  document.body.append(box);
  box.showModal();
  fields[0].focus();
}

async function resumeFields(address, job) {
  const [body, all, checkpoints] = await Promise.all([requestProperties("post", "/jobs/{job_id}/resume"), fetchSchemas(), get(`${address}/checkpoints?limit=100`)]);
  const steps = checkpoints.data.filter((checkpoint) => checkpoint.kind === "full").map((checkpoint) => checkpoint.step);
  const made = (described, path) => new Field(describeField(described, path, all), path[0] === "step" ? null : path[0] === "schedule" ? "extend" : getAt(job.spec, specPath(path)), "now", () => {});
  const step = { anyOf: [{ enum: steps }, { type: "null" }], description: "the checkpoint to resume from; newer ones are set aside", "x-none": "newest" };
  const resources = RESOURCES.filter((name) => name in all.ResourcesSpec.properties);
  return [
    ...["max_steps", "max_tokens", "epochs", "max_minutes", "target_loss"].map((name) => made(body[name], [name])), made(step, ["step"]), made(body.schedule, ["schedule"]),
    ...resources.map((name) => made(all.ResourcesSpec.properties[name], ["resources", name]))];
}

const LIMITS = ["max_minutes", "target_loss"];
const specPath = (path) => (path.length > 1 ? path : [LIMITS.includes(path[0]) ? "limits" : "training", path[0]]);
