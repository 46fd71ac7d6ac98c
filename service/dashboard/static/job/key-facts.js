// The key facts beside the loss.
import { attr, h, text } from "../dom.js";
import { ago, clock, count, duration, exact, figure, loss, percent, short } from "../format.js";

const NAMES = ["Step", "Loss", "Learning rate", "Gradient norm", "Tokens", "Tokens/s", "MFU", "ETA", "Checkpoint", "Attempt", "Parameters", "Device", "Started"];

export class Facts {
  constructor() {
    this.values = new Map(NAMES.map((name) => [name, h("dd")]));
    this.node = h("dl", { class: "facts" }, NAMES.map((name) => h("div", {}, h("dt", {}, name), this.values.get(name))));
  }

  put(name, value, title = null) {
    const node = this.values.get(name);
    text(node, value);
    attr(node, "title", title);
  }

  update(job) {
    const { progress, plan, checkpoint } = job;
    this.point({ ...progress });
    const running = job.status === "running";
    this.steps = progress.steps;
    this.put("Step", this.ofAll(progress.step));
    // What the corpus has is one epoch: a run is as long as its steps.
    const tokens = plan.tokens_per_step && progress.steps ? plan.tokens_per_step * progress.steps : null;
    this.put("Tokens", tokens ? `${short(progress.tokens)} of ${short(tokens)}` : short(progress.tokens));
    this.put("Tokens/s", running ? short(progress.tokens_per_second) : "–");
    this.put("MFU", running && progress.mfu !== null ? percent(progress.mfu * 100) : "–");
    this.put("ETA", running ? duration(progress.eta_seconds) : "–");
    this.put("Checkpoint", checkpoint ? `${count(checkpoint.step)}, ${ago(checkpoint.created_at)}` : "none yet", checkpoint ? exact(checkpoint.created_at) : null);
    this.put("Attempt", job.attempt ?? "–");
    this.put("Parameters", short(plan.parameters));
    this.put("Device", plan.device ? `${plan.world_size ?? 1} × ${plan.device}` : "–", plan.device_name);
    this.put("Started", clock(job.started_at), exact(job.started_at));
  }

  /** A point of the stream: at once, without waiting for a look. */
  point(row) {
    if (row.step) this.put("Step", this.ofAll(row.step));
    this.put("Loss", row.nonfinite ? "not finite" : loss(row.loss));
    this.put("Learning rate", figure(row.learning_rate));
    this.put("Gradient norm", figure(row.grad_norm));
  }

  ofAll(step) {
    return this.steps ? `${count(step)} of ${count(this.steps)}` : count(step);
  }
}
