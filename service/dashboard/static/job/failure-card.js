// What went wrong, as a card: evidence, hint, and what helps now, each as a button and as a command. Made once for each error.
import { Refused, send } from "../api.js";
import { copy, h, say, show, text } from "../dom.js";
import { keepDraft } from "../form/drafts.js";
import { bytes } from "../format.js";
import { go } from "../router.js";

export class FailureCard {
  /** `done(job)` is told what became of a press. */
  constructor(done) {
    this.done = done;
    this.node = h("section", { class: "card", hidden: true, "aria-label": "What went wrong" });
    this.wrong = h("p", { class: "wrong", role: "alert" });
  }

  update(job) {
    const { error } = job;
    show(this.node, error);
    const mark = JSON.stringify([error, job.summary.includes(error?.message)]);
    if (!error || this.mark === mark) return;
    this.mark = mark;
    const rank = error.rank === null ? "" : ` on rank ${error.rank}`;
    this.node.replaceChildren(h("h2", {}, `✗ ${error.code.replaceAll("_", " ")}${rank}`), ...this.parts(job, error), this.helps(job, error.next), this.wrong);
    text(this.wrong, "");
  }

  parts(job, error) {
    // The sentence above says it already, with what became of the job.
    const said = job.summary.toLowerCase().includes(error.message.toLowerCase());
    const tail = error.log_tail.join("\n");
    const lines = error.log_tail.length === 1 ? "Last line" : `Last ${error.log_tail.length} lines`;
    const own = error.traceback && error.traceback.trim() !== tail.trim() ? error.traceback : null;
    return [
      said ? "" : h("p", {}, error.message),
      error.hint ? h("p", { class: "hint" }, error.hint) : "",
      error.peak_memory_bytes ? h("p", {}, "Peak memory of a rank: ", h("strong", {}, bytes(error.peak_memory_bytes))) : "",
      tail ? h("details", { open: true }, h("summary", {}, `${lines} of rank ${error.rank ?? 0}`), h("pre", { tabindex: "0", class: "evidence" }, tail)) : "",
      own ? h("details", {}, h("summary", {}, "Traceback"), h("pre", { tabindex: "0", class: "evidence" }, own)) : "",
    ];
  }

  helps(job, next) {
    if (!next.length) return "";
    return h("div", { class: "helps" }, h("h3", {}, "What you can do now"), h("ul", {}, next.map((one) => h("li", {}, this.button(job, one),
      h("span", { class: "typed" }, h("code", {}, one.command), h("button", { type: "button", class: "quiet", "aria-label": `Copy: ${one.command}`, onclick: () => copy(one.command, "Command") }, "Copy"))))));
  }

  /** What is to be looked at before it is launched opens in the form. */
  button(job, { action, words, path, body }) {
    if (action === "logs") return h("a", { class: "button", href: `/jobs/${job.id}?tab=logs&${path.split("?")[1]}` }, words);
    const press = {
      resume: () => this.post(path, body),
      fork: () => (keepDraft({ fork: job.id }, body.overrides), go(`/submit?fork=${job.id}&step=${body.step}`)),
      submit: () => (keepDraft({ like: job.id }, body), go(`/submit?like=${job.id}`)),
    }[action];
    return h("button", { type: "button", onclick: press }, words);
  }

  async post(path, body) {
    try {
      this.done(await send("POST", path, body));
      say("resume: asked for");
    } catch (error) {
      text(this.wrong, error instanceof Refused ? `resume: ${error.message}` : error.message);
    }
  }
}
