// The try tab: continues a text with a checkpoint of the job, and shows it while it is generated.
import { ApiError, getAll } from "../api.js";
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { count } from "../format.js";
import { t } from "../i18n.js";
import { getParam, setParam } from "../router.js";
import { streamOnce } from "../sse.js";

const OPTIONS = [
  { name: "max_new_tokens", label: t("New tokens"), value: "128", min: "0", step: "1" },
  { name: "temperature", label: t("Temperature"), value: "0.85", min: "0", max: "10", step: "any" },
  { name: "top_p", label: t("Top p"), value: "0.95", min: "0", max: "1", step: "any" },
  { name: "seed", label: t("Seed"), value: "", min: "0", step: "1", placeholder: t("random") },
];

export class TryTab {
  constructor(place, address) {
    this.address = address;
    this.none = h("p", { class: "muted", hidden: true }, t("No checkpoint yet."));
    this.prompt = h("textarea", { rows: "3", id: "try-prompt", name: "prompt", placeholder: t("Text to continue") });
    this.step = h("select", { id: "try-step", name: "step", onchange: () => setParam("at", this.step.value === "latest" ? null : this.step.value) });
    this.wanted = getParam("at");
    this.inputs = OPTIONS.map(({ label, name, ...rest }) => h("input", { type: "number", id: `try-${name}`, name, ...rest }));
    this.button = h("button", { type: "submit", class: "primary" }, t("Generate"));
    this.stopButton = h("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, t("Stop"));
    this.form = h("form", { class: "try", onsubmit: (event) => this.submit(event) },
      h("label", { for: "try-prompt" }, t("Prompt")), this.prompt,
      h("div", { class: "bar" }, h("label", { for: "try-step" }, t("Step")), this.step, this.inputs.flatMap((input, i) => [h("label", { for: input.id }, OPTIONS[i].label), input]), this.button, this.stopButton));
    this.error = h("p", { class: "error", role: "alert" });
    this.note = h("p", { class: "muted", role: "status" });
    this.given = h("span", { class: "muted" });
    this.text = h("span");
    this.output = h("pre", { class: "generated", hidden: true, tabindex: "0", "aria-label": t("Generated text") }, this.given, this.text);
    place.append(this.none, this.form, this.error, this.output, this.note);
  }

  async update(job) {
    const mark = `${job.checkpoint?.step} ${job.alerts.length} ${job.status}`;
    if (mark === this.mark) return;
    this.mark = mark;
    try {
      const checkpoints = await getAll(`${this.address}/checkpoints`);
      const steps = [...new Set(checkpoints.map((checkpoint) => checkpoint.step))];
      const options = steps.length ? ["latest", ...steps] : [];
      updateList(this.step, options, String, (step) => h("option", { value: step }, step === "latest" ? t("newest") : count(step)));
      if (this.wanted && options.map(String).includes(this.wanted)) {
        this.step.value = this.wanted;
        this.wanted = null;
        this.prompt.focus();
      }
      setVisible(this.none, !steps.length);
      setVisible(this.form, steps.length);
    } catch {
      this.mark = null;
    }
  }

  async submit(event) {
    event.preventDefault();
    if (this.abort) return;
    this.abort = new AbortController();
    this.showBusy(true);
    const body = { prompt: this.prompt.value, stream: true };
    for (const input of this.inputs) if (input.value !== "") body[input.name] = Number(input.value);
    setText(this.error, "");
    setText(this.given, body.prompt);
    this.text.replaceChildren();
    setVisible(this.output, true);
    setText(this.note, t("Waiting for the checkpoint to be loaded …"));
    try {
      await streamOnce(`${this.address}/checkpoints/${this.step.value}/generate`, body, (kind, data) => this.take(kind, data), this.abort.signal);
    } catch (error) {
      if (error.name === "AbortError") setText(this.note, t("Stopped."));
      else this.showError(error);
    } finally {
      this.abort = null;
      this.showBusy(false);
    }
  }

  take(kind, data) {
    if (kind === "start") setText(this.note, t("Step {step} on {device} …", { step: count(data.step), device: data.device }));
    if (kind === "text") this.text.append(data.text);
    const made = { n: count(data.tokens), step: count(data.step), device: data.device };
    if (kind === "end") setText(this.note, data.finish_reason === "stop" ? t("{n} tokens by step {step} on {device}, ended by itself", made) : t("{n} tokens by step {step} on {device}", made));
    if (kind === "error") throw new ApiError(data, data.status);
  }

  showError(error) {
    setText(this.note, "");
    setVisible(this.output, this.text.hasChildNodes());
    setText(this.error, [error.message, ...(error.errors ?? []).map((problem) => `${problem.pointer}: ${problem.message}`)].join(" "));
  }

  showBusy(busy) {
    setAttr(this.button, "aria-disabled", busy ? "true" : null);
    setVisible(this.stopButton, busy);
  }

  close() {
    this.abort?.abort();
  }
}
