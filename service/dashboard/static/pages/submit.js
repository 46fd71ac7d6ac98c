// A job spec as JSON: planned first, then launched. Every mistake stands at its place in a list.
import { Refused, send } from "../api.js";
import { attr, h, list, say, show, text } from "../dom.js";
import { NONE, bytes, count, duration, loss, short } from "../format.js";
import { go } from "../router.js";

const EXAMPLE = { name: "pretrain", data: { data_path: "/data/corpus.jsonl" }, training: { batch_size: 32, epochs: 1 } };
const KEY = "trainyard-draft";

export const submit = { title: "Submit", open };

function open(place) {
  const page = new Page(place);
  return () => page.close();
}

class Page {
  constructor(place) {
    this.spec = h("textarea", { id: "spec", rows: "18", spellcheck: "false", class: "mono", "aria-describedby": "wrong" });
    this.spec.value = sessionStorage.getItem(KEY) ?? JSON.stringify(EXAMPLE, null, 2);
    this.wrong = h("p", { class: "wrong", id: "wrong", role: "alert", hidden: true });
    this.errors = h("ul", { class: "errors", hidden: true });
    this.facts = h("dl", { class: "facts" });
    this.warnings = h("ul", { class: "alerts" });
    this.plan = h("section", { hidden: true }, h("h2", {}, "What it would be"), this.facts, this.warnings);
    this.launch = h("button", { type: "button", class: "primary", onclick: () => this.press("/jobs") }, "Submit");
    const look = h("button", { type: "submit" }, "Plan");
    const form = h("form", { class: "submit", onsubmit: (event) => (event.preventDefault(), this.press("/jobs/plan")) },
      h("label", { for: "spec" }, "Job spec, JSON; what is left out is as by default"), this.spec, this.wrong, this.errors, h("div", { class: "bar" }, look, this.launch));
    const words = h("p", { class: "muted" }, "Every setting is in ", h("a", { href: "/docs", target: "_blank", rel: "noreferrer" }, "the API's page"), ". Nothing is stored before you submit.");
    // One key a draft: a second press of the button after a lost answer is the same job.
    this.key = crypto.randomUUID();
    this.spec.addEventListener("input", () => {
      sessionStorage.setItem(KEY, this.spec.value);
      this.key = crypto.randomUUID();
    });
    place.append(h("h1", {}, "Submit"), words, form, this.plan);
  }

  async press(address) {
    const spec = this.read();
    if (!spec) return;
    attr(this.launch, "aria-disabled", "true");
    try {
      const answer = await send("POST", address, spec, address === "/jobs" ? { "Idempotency-Key": this.key } : {});
      if (this.gone) return;
      this.refused("", []);
      if (address === "/jobs") {
        sessionStorage.removeItem(KEY);
        say(`${answer.name}: ${answer.status}`);
        go(`/jobs/${answer.id}`);
      } else this.show(answer);
    } catch (error) {
      show(this.plan, false);
      this.refused(error.message, error instanceof Refused ? error.errors : []);
    } finally {
      attr(this.launch, "aria-disabled", null);
    }
  }

  read() {
    try {
      return JSON.parse(this.spec.value);
    } catch (error) {
      this.refused(`This is not JSON: ${error.message}`, []);
      return null;
    }
  }

  refused(words, errors) {
    show(this.wrong, words);
    text(this.wrong, words);
    attr(this.spec, "aria-invalid", words ? "true" : null);
    show(this.errors, errors.length);
    list(this.errors, errors, (one) => `${one.pointer} ${one.message}`, () => h("li", {}, h("button", { type: "button", class: "quiet mono" }), h("span")), (part, one) => {
      text(part.firstChild, one.pointer || "/");
      part.firstChild.onclick = () => this.point(one.pointer);
      text(part.lastChild, ` ${one.message}`);
    });
  }

  /** Selects the key that a pointer names, where it is written. */
  point(pointer) {
    let at = 0;
    for (const name of pointer.split("/").slice(1)) {
      const found = this.spec.value.indexOf(JSON.stringify(name), at);
      if (found < 0) break;
      at = found + 1;
      this.spec.setSelectionRange(found, found + name.length + 2);
    }
    this.spec.focus();
  }

  show(plan) {
    const memory = Object.values(plan.memory_bytes ?? {}).reduce((sum, value) => sum + (value ?? 0), 0);
    const facts = [
      ["Parameters", plan.active_parameters === plan.parameters ? short(plan.parameters) : `${short(plan.parameters)}, ${short(plan.active_parameters)} of them for a token`],
      ["Tokens", short(plan.tokens)], ["Steps", count(plan.steps)], ["Tokens a step", short(plan.tokens_per_step)],
      ["Ranks", plan.world_size ? `${plan.world_size} × ${plan.device ?? ""}` : NONE], ["Memory a rank", bytes(memory || null)],
      ["A checkpoint", `${bytes(plan.checkpoint_bytes)}, ${bytes(plan.disk_free_bytes)} free`], ["Time", plan.eta_seconds === null ? "not known yet" : `about ${duration(plan.eta_seconds)}`],
      ["First loss", loss(plan.expected_first_loss)], ["Queue", plan.queue ? `position ${plan.queue.position}, ${plan.queue.waiting_for}` : NONE],
    ];
    list(this.facts, facts, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value]) => text(part.lastChild, value));
    list(this.warnings, plan.warnings ?? [], (words) => words, () => h("li"), (part, words) => text(part, words));
    show(this.plan, true);
  }

  close() {
    this.gone = true;
  }
}
