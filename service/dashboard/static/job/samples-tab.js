// Generated samples as a table: one row per prompt, one column per step, newest first.
import { get } from "../api.js";
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { count, dateTime } from "../format.js";
import { changeMark } from "./list-tab.js";

const INITIAL_STEPS = 6;
const MAX_SAMPLES = 5000;

export class SamplesTab {
  constructor(place, address) {
    this.address = address;
    this.samples = [];
    this.none = h("p", { class: "muted", hidden: true }, "No samples yet. Set prompts in reporting.sample_prompts.");
    this.note = h("span", { class: "muted", role: "status" });
    this.allButton = h("button", { type: "button", "aria-pressed": "false", hidden: true, onclick: () => this.toggleAll() });
    this.bar = h("div", { class: "bar" }, this.note, this.allButton);
    this.head = h("tr");
    this.body = h("tbody");
    const table = h("table", {}, h("caption", { class: "visually-hidden" }, "Samples by prompt and step, newest first"), h("thead", {}, this.head), this.body);
    this.box = h("div", { class: "scroll samples", tabindex: "0", role: "region", "aria-label": "Samples" }, table);
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
    for (let more = true; more && this.samples.length < MAX_SAMPLES; ) {
      const after = this.samples.length ? `&after=${this.samples.at(-1).id}` : "";
      const page = await get(`${this.address}/samples?limit=100${after}`);
      this.samples.push(...page.data);
      more = page.has_more;
    }
  }

  toggleAll() {
    setAttr(this.allButton, "aria-pressed", String(this.allButton.getAttribute("aria-pressed") !== "true"));
    this.draw();
  }

  draw() {
    const steps = [...new Set(this.samples.map((one) => one.step))].sort((a, b) => b - a);
    const whole = this.allButton.getAttribute("aria-pressed") === "true";
    const shown = whole ? steps : pickEvenly(steps, INITIAL_STEPS);
    setVisible(this.none, !steps.length);
    setVisible(this.box, steps.length);
    setVisible(this.allButton, steps.length > INITIAL_STEPS);
    setText(this.allButton, `All ${count(steps.length)} steps`);
    setText(this.note, steps.length > shown.length ? `${shown.length} of ${count(steps.length)} steps, spread over the run` : "");
    // If a step was trained twice, the later attempt's sample wins.
    const known = new Map(this.samples.map((one) => [`${one.step} ${one.prompt}`, one]));
    const cells = [null, ...shown];
    updateList(this.head, cells, String, (step) => h("th", { scope: "col" }, step === null ? "Prompt" : `step ${count(step)}`));
    updateList(this.body, [...new Set(this.samples.map((one) => one.prompt))], String, () => h("tr"), (row, prompt) =>
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
