// Actions of a job: the one that is likely next as a button, all others in a menu, with the reason if one is not possible.
import { ApiError, sendJson } from "../api.js";
import { confirmAction } from "../confirm.js";
import { announce, h, setText, setVisible } from "../dom.js";
import { t } from "../i18n.js";
import { lazy } from "../lazy.js";
import { Menu } from "../menu.js";
import { navigate } from "../router.js";
import { FINAL_STATUSES } from "../status.js";

export const loadResumeDialog = lazy(() => import("./resume-dialog.js"));

const CONFIRM_QUESTIONS = {
  kill: t("Kill this job now? It saves nothing: progress since its newest checkpoint is lost."),
  cancel: t("Cancel this job? It saves a checkpoint first and then stops."),
  delete: t("Delete this job's record and files? This cannot be undone."),
};
const RESUME_WITH = "resume with";
const DISCARD = "discard";
const ACTIONS = ["pause", "resume", RESUME_WITH, "save", "fork", DISCARD, "cancel", "kill", "delete"];
const LABELS = {
  pause: t("pause"), resume: t("resume"), [RESUME_WITH]: t("resume with…"), save: t("save now"), fork: t("fork…"), [DISCARD]: t("discard: hide from lists"), cancel: t("cancel"), kill: t("kill"), delete: t("delete") };
const REQUESTED = {
  pause: t("pause requested"), resume: t("resume requested"), save: t("save requested"), cancel: t("cancel requested"), kill: t("kill requested"), delete: t("delete requested") };

/** The action that is likely next, or null: to pause what runs, to resume what does not, to fork what is done. */
function primaryAction({ status }, whyNot) {
  const candidates = FINAL_STATUSES.has(status) || status === "paused" || status === "interrupted" ? ["resume", "fork", "pause"] : ["pause"];
  return candidates.find((verb) => whyNot.has(verb) && !whyNot.get(verb)) ?? null;
}

export class Actions {
  constructor(address, done) {
    this.address = address;
    this.done = done;
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.primary = h("button", { type: "button", class: "primary", hidden: true, onclick: () => this.press(this.verb) });
    this.menu = new Menu(t("More actions"), () => this.others());
    setVisible(this.menu.node, false); // It would be empty until the job is known.
    this.node = h("div", { class: "actions" }, h("div", { class: "bar", role: "group", "aria-label": t("Actions") }, this.primary, this.menu.node), this.error);
    this.whyNot = new Map();
  }

  update(job) {
    this.job = job;
    this.whyNot = new Map(job.allowed_actions.map(({ action, allowed, why_not: why }) => [action, allowed ? null : why]));
    // A succeeded job can be resumed only with more steps or epochs.
    this.whyNot.set(RESUME_WITH, job.resumable || job.status === "succeeded" ? null : (this.whyNot.get("resume") ?? t("it cannot be resumed")));
    this.whyNot.set(DISCARD, null);
    this.verb = primaryAction(job, this.whyNot);
    setVisible(this.primary, this.verb);
    setVisible(this.menu.node, true);
    setText(this.primary, this.verb ? LABELS[this.verb] : "");
  }

  others() {
    return ACTIONS.filter((verb) => verb !== this.verb && this.whyNot.has(verb)).map((verb) => ({
      label: verb === DISCARD && this.job.discarded ? t("show in lists again") : LABELS[verb], why: this.whyNot.get(verb), danger: verb in CONFIRM_QUESTIONS, press: () => this.press(verb) }));
  }

  async press(verb) {
    if (verb in CONFIRM_QUESTIONS && !(await confirmAction(CONFIRM_QUESTIONS[verb], LABELS[verb]))) return;
    this.showError("");
    try {
      if (verb === RESUME_WITH) return await this.resumeWith();
      if (verb === DISCARD) return await this.discard(!this.job.discarded);
      if (verb === "fork") return navigate(`/submit?fork=${encodeURIComponent(this.job.id)}${this.job.checkpoint ? `&step=${this.job.checkpoint.step}` : ""}`);
      const job = await (verb === "delete" ? sendJson("DELETE", this.address) : sendJson("POST", `${this.address}/${verb}`));
      announce(REQUESTED[verb]);
      if (job) this.done(job);
      else navigate("/");
    } catch (error) {
      this.showError(error instanceof ApiError ? `${LABELS[verb].replace("…", "")}: ${error.message}` : error.message);
    }
  }

  async resumeWith() {
    await (await loadResumeDialog()).openResumeDialog(this.address, this.job, (job) => (announce(REQUESTED.resume), this.done(job)));
  }

  /** A mark that can be taken back: nothing is stopped or deleted. */
  async discard(wanted) {
    this.done(await sendJson("PATCH", this.address, { discarded: wanted }));
    announce(wanted ? t("Hidden from lists. The filter Discarded shows it") : t("Shown in lists again"));
  }

  showError(message) {
    setVisible(this.error, message);
    setText(this.error, message);
  }
}
