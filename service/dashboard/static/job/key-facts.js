// Table of key facts beside the loss chart.
import { h, setAttr, setText } from "../dom.js";
import { ago, compactNumber, count, dateTime, duration, fewDigits, loss, percent, timeOrDateTime } from "../format.js";

const NAMES = ["Step", "Loss", "Learning rate", "Gradient norm", "Tokens", "Tokens/s", "MFU", "ETA", "Checkpoint", "Attempt", "Parameters", "Device", "Started"];

export class KeyFacts {
  constructor() {
    this.values = new Map(NAMES.map((name) => [name, h("dd")]));
    this.node = h("dl", { class: "facts" }, NAMES.map((name) => h("div", {}, h("dt", {}, name), this.values.get(name))));
  }

  put(name, value, title = null) {
    const node = this.values.get(name);
    setText(node, value);
    setAttr(node, "title", title);
  }

  update(job) {
    const { progress, plan, checkpoint } = job;
    this.updatePoint({ ...progress });
    const running = job.status === "running";
    this.steps = progress.steps;
    this.put("Step", this.stepText(progress.step));
    // `plan.tokens` is one epoch of the corpus, so the total comes from the number of steps.
    const tokens = plan.tokens_per_step && progress.steps ? plan.tokens_per_step * progress.steps : null;
    this.put("Tokens", tokens ? `${compactNumber(progress.tokens)} of ${compactNumber(tokens)}` : compactNumber(progress.tokens));
    this.put("Tokens/s", running ? compactNumber(progress.tokens_per_second) : "–");
    this.put("MFU", running && progress.mfu !== null ? percent(progress.mfu * 100) : "–");
    this.put("ETA", running ? duration(progress.eta_seconds) : "–");
    this.put("Checkpoint", checkpoint ? `${count(checkpoint.step)}, ${ago(checkpoint.created_at)}` : "none yet", checkpoint ? dateTime(checkpoint.created_at) : null);
    this.put("Attempt", job.attempt ?? "–");
    this.put("Parameters", compactNumber(plan.parameters));
    this.put("Device", plan.device ? `${plan.world_size ?? 1} × ${plan.device}` : "–", plan.device_name);
    this.put("Started", timeOrDateTime(job.started_at), dateTime(job.started_at));
  }

  /** Shows a point of the metric stream before the next poll. */
  updatePoint(row) {
    if (row.step) this.put("Step", this.stepText(row.step));
    this.put("Loss", row.nonfinite ? "not finite" : loss(row.loss));
    this.put("Learning rate", fewDigits(row.learning_rate));
    this.put("Gradient norm", fewDigits(row.grad_norm));
  }

  stepText(step) {
    return this.steps ? `${count(step)} of ${count(this.steps)}` : count(step);
  }
}
