// Card of a failed job: message, hint, log tail, and the next actions as buttons and commands. Rebuilt only if the error changes.
import { ApiError, sendJson } from "../api.js";
import { announce, copyText, h, setText, setVisible } from "../dom.js";
import { saveDraft } from "../form/drafts.js";
import { bytes } from "../format.js";
import { navigate } from "../router.js";

export class FailureCard {
  /** `done(job)` is called after an action changed the job. */
  constructor(done) {
    this.done = done;
    this.node = h("section", { class: "card", hidden: true, "aria-label": "What went wrong" });
    this.error = h("p", { class: "error", role: "alert" });
  }

  update(job) {
    const { error } = job;
    setVisible(this.node, error);
    const mark = JSON.stringify([error, job.summary.includes(error?.message)]);
    if (!error || this.mark === mark) return;
    this.mark = mark;
    const rank = error.rank === null ? "" : ` on rank ${error.rank}`;
    this.node.replaceChildren(h("h2", {}, `✗ ${error.code.replaceAll("_", " ")}${rank}`), ...this.evidence(job, error), this.nextActions(job, error.next), this.error);
    setText(this.error, "");
  }

  evidence(job, error) {
    // The summary above the card often contains the message already.
    const isInSummary = job.summary.toLowerCase().includes(error.message.toLowerCase());
    const tail = error.log_tail.join("\n");
    const lines = error.log_tail.length === 1 ? "Last line" : `Last ${error.log_tail.length} lines`;
    const own = error.traceback && error.traceback.trim() !== tail.trim() ? error.traceback : null;
    return [
      isInSummary ? "" : h("p", {}, error.message),
      error.hint ? h("p", { class: "hint" }, error.hint) : "",
      error.peak_memory_bytes ? h("p", {}, "Peak memory of a rank: ", h("strong", {}, bytes(error.peak_memory_bytes))) : "",
      tail ? h("details", { open: true }, h("summary", {}, `${lines} of rank ${error.rank ?? 0}`), h("pre", { tabindex: "0", class: "evidence" }, tail)) : "",
      own ? h("details", {}, h("summary", {}, "Traceback"), h("pre", { tabindex: "0", class: "evidence" }, own)) : "",
    ];
  }

  nextActions(job, next) {
    if (!next.length) return "";
    return h("div", { class: "next-actions" }, h("h3", {}, "What you can do now"), h("ul", {}, next.map((one) => h("li", {}, this.button(job, one),
      h("span", { class: "command-line" }, h("code", {}, one.command), h("button", { type: "button", class: "quiet", "aria-label": `Copy: ${one.command}`, onclick: () => copyText(one.command, "Command") }, "Copy"))))));
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
      announce("resume requested");
    } catch (error) {
      setText(this.error, error instanceof ApiError ? `resume: ${error.message}` : error.message);
    }
  }
}
