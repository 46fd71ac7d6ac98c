// What may be done with a job, and why not where it may not. Killing and deleting ask first.
import { Refused, send } from "../api.js";
import { attr, h, say, show, text } from "../dom.js";
import { go } from "../router.js";
import { resumeWith } from "./resume-dialog.js";

const ASKED = {
  kill: "Kill this job now? Nothing is saved: it goes back to its newest checkpoint.",
  cancel: "Stop this job for good? It saves first.",
  delete: "Delete this job's record and files? This cannot be undone.",
};
const VERBS = ["pause", "resume", "save", "cancel", "kill", "delete"];
const WORDS = { save: "save now" };

export class Actions {
  constructor(address, done) {
    this.address = address;
    this.done = done;
    this.wrong = h("p", { class: "wrong", role: "alert", hidden: true });
    this.buttons = new Map(VERBS.map((verb) => [verb, h("button", { type: "button", class: verb in ASKED ? "danger" : "", onclick: () => this.press(verb) }, WORDS[verb] ?? verb)]));
    this.changed = h("button", { type: "button", hidden: true, onclick: () => this.resume() }, "resume with…");
    this.node = h("div", { class: "actions" }, h("div", { class: "bar", role: "group", "aria-label": "Actions" }, ...this.buttons.values()), this.wrong);
    this.buttons.get("resume").after(this.changed);
    this.whyNot = new Map();
  }

  update(job) {
    this.job = job;
    // A finished job goes on only with more to do, so there it is the only way.
    show(this.changed, job.resumable || job.status === "succeeded");
    for (const { action, allowed, why_not: why } of job.allowed_actions) {
      const button = this.buttons.get(action);
      if (!button) continue;
      this.whyNot.set(action, allowed ? null : why);
      attr(button, "aria-disabled", allowed ? null : "true");
      attr(button, "title", allowed ? null : why);
    }
  }

  async press(verb) {
    const why = this.whyNot.get(verb);
    if (why) return this.tell(`${verb}: ${why}`);
    if (verb in ASKED && !(await asked(ASKED[verb], verb))) return;
    this.tell("");
    try {
      const job = await (verb === "delete" ? send("DELETE", this.address) : send("POST", `${this.address}/${verb}`));
      say(`${verb}: asked for`);
      if (job) this.done(job);
      else go("/");
    } catch (error) {
      this.tell(error instanceof Refused ? `${verb}: ${error.message}` : error.message);
    }
  }

  async resume() {
    try {
      await resumeWith(this.address, this.job, (job) => (say("resume: asked for"), this.done(job)));
    } catch (error) {
      this.tell(error.message);
    }
  }

  tell(words) {
    show(this.wrong, words);
    text(this.wrong, words);
  }
}

/** Asks in a dialog; the answer that changes nothing has the focus. */
export function asked(question, verb) {
  return new Promise((done) => {
    const no = h("button", { type: "button", onclick: () => box.close() }, "Leave it");
    const yes = h("button", { type: "button", class: "danger", onclick: () => box.close("yes") }, verb);
    const box = h("dialog", { "aria-label": verb }, h("p", {}, question), h("div", { class: "bar" }, no, yes));
    box.addEventListener("close", () => (box.remove(), done(box.returnValue === "yes")));
    document.body.append(box);
    box.showModal();
    no.focus();
  });
}
