// What the model wrote, side by side: a prompt a row, a step a column, the newest first.
import { get } from "../api.js";
import { attr, h, list, show, text } from "../dom.js";
import { count, exact } from "../format.js";
import { moved } from "./list-tab.js";

const AT_FIRST = 6;
const MOST = 5000;

export class Samples {
  constructor(place, address) {
    this.address = address;
    this.found = [];
    this.none = h("p", { class: "muted", hidden: true }, "No sample yet: name prompts in reporting.sample_prompts.");
    this.note = h("span", { class: "muted", role: "status" });
    this.all = h("button", { type: "button", "aria-pressed": "false", hidden: true, onclick: () => this.turn() });
    this.bar = h("div", { class: "bar" }, this.note, this.all);
    this.head = h("tr");
    this.body = h("tbody");
    const table = h("table", {}, h("caption", { class: "unseen" }, "Samples by prompt and step, newest first"), h("thead", {}, this.head), this.body);
    this.box = h("div", { class: "scroll samples", tabindex: "0", role: "region", "aria-label": "Samples" }, table);
    place.append(this.none, this.bar, this.box);
  }

  async update(job) {
    const mark = `${moved(job)} ${job.progress.step}`;
    if (mark === this.mark) return;
    this.mark = mark;
    try {
      await this.more();
      this.draw();
    } catch (error) {
      this.mark = null;
      if (error instanceof TypeError) throw error;
    }
  }

  /** What came since: samples never change. */
  async more() {
    for (let more = true; more && this.found.length < MOST; ) {
      const after = this.found.length ? `&after=${this.found.at(-1).id}` : "";
      const page = await get(`${this.address}/samples?limit=100${after}`);
      this.found.push(...page.data);
      more = page.has_more;
    }
  }

  turn() {
    attr(this.all, "aria-pressed", String(this.all.getAttribute("aria-pressed") !== "true"));
    this.draw();
  }

  draw() {
    const steps = [...new Set(this.found.map((one) => one.step))].sort((a, b) => b - a);
    const whole = this.all.getAttribute("aria-pressed") === "true";
    const shown = whole ? steps : spread(steps, AT_FIRST);
    show(this.none, !steps.length);
    show(this.box, steps.length);
    show(this.all, steps.length > AT_FIRST);
    text(this.all, `All ${count(steps.length)} steps`);
    text(this.note, steps.length > shown.length ? `${shown.length} of ${count(steps.length)} steps, spread over the run` : "");
    // Of a step that was done again, what the later attempt wrote.
    const known = new Map(this.found.map((one) => [`${one.step} ${one.prompt}`, one]));
    const cells = [null, ...shown];
    list(this.head, cells, String, (step) => h("th", { scope: "col" }, step === null ? "Prompt" : `step ${count(step)}`));
    list(this.body, [...new Set(this.found.map((one) => one.prompt))], String, () => h("tr"), (row, prompt) =>
      list(row, cells, String, (step) => (step === null ? h("th", { scope: "row" }, prompt) : h("td", { class: "sample" })), (cell, step) => fill(cell, step, known.get(`${step} ${prompt}`))));
  }
}

function fill(cell, step, sample) {
  if (step === null) return;
  text(cell, sample?.text ?? "–");
  attr(cell, "title", sample ? exact(sample.at) : null);
}

/** The newest, the oldest, and some between; newest first. */
function spread(steps, most) {
  if (steps.length <= most) return steps;
  return [...new Set(Array.from({ length: most }, (_, i) => steps[Math.round((i * (steps.length - 1)) / (most - 1))]))];
}
