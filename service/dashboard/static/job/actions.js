// Action buttons of a job, with the reason if an action is not allowed. Kill, cancel and delete ask for confirmation.
import { ApiError, sendJson } from "../api.js";
import { announce, h, setAttr, setText, setVisible } from "../dom.js";
import { navigate } from "../router.js";
import { openResumeDialog } from "./resume-dialog.js";

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

  showError(words) {
    setVisible(this.error, words);
    setText(this.error, words);
  }
}

/** Asks for confirmation in a dialog; the button that changes nothing has the focus. */
export function confirmAction(question, verb) {
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
