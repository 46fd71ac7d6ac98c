// Shows a plan: size, time and queue position of a run, with warnings.
import { h, setAttr, setText, setVisible, svg, updateList } from "../dom.js";
import { NONE, bytes, compactNumber, count, duration, fewDigits, loss } from "../format.js";

export class PlanView {
  /** `apply(changes)` is called to use settings with which the run fits. */
  constructor(none, apply) {
    this.apply = apply;
    this.fit = h("p", { hidden: true });
    this.none = h("p", { class: "muted" }, none);
    this.warnings = h("ul", { class: "alerts", "aria-label": "Warnings" });
    this.facts = h("dl", { class: "facts", hidden: true });
    this.curve = new RateCurve();
    this.heading = h("h2", {}, "Plan");
    this.node = h("section", { class: "plan", tabindex: "-1", "aria-label": "Plan" }, this.heading, this.none, this.warnings, this.fit, this.facts, this.curve.node);
  }

  /** Shows a plan, or none if null. */
  show(plan) {
    setVisible(this.none, !plan);
    setVisible(this.facts, plan);
    this.stale(false);
    this.curve.show(plan?.learning_rate ?? []);
    updateList(this.warnings, plan?.warnings ?? [], (warning) => warning, () => h("li"), (part, warning) => setText(part, warning));
    this.showFit(plan?.settings_that_fit);
    if (!plan) return;
    updateList(this.facts, planFacts(plan), ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value, more]) => {
      setText(part.lastChild, value);
      setAttr(part.lastChild, "title", more);
    });
  }

  /** `changes`: settings with which a run fits that does not, by group and field, or null. */
  showFit(changes) {
    setVisible(this.fit, changes);
    if (!changes) return;
    const settings = Object.values(changes).flatMap((fields) => Object.entries(fields)).map(([name, value]) => `${name} ${value}`);
    this.fit.replaceChildren(h("button", { type: "button", onclick: () => this.apply(changes) }, `Use ${settings.join(" and ")}`));
  }

  /** Marks the plan as older than the last change of the spec. */
  stale(is) {
    setText(this.heading, is && !this.facts.hidden ? "Plan before the last changes" : "Plan");
  }
}

/** Draws the learning rate over the steps, from 0 on. */
class RateCurve {
  constructor() {
    this.line = svg("polyline");
    this.caption = h("figcaption", { class: "muted" });
    this.node = h("figure", { class: "rates", hidden: true }, svg("svg", { viewBox: "0 0 300 80", preserveAspectRatio: "none", "aria-hidden": "true" }, this.line), this.caption);
  }

  /** `curve`: [step, rate] pairs. */
  show(curve) {
    setVisible(this.node, curve.length > 1);
    if (curve.length < 2) return;
    const [first, last] = [curve[0], curve.at(-1)];
    const peak = curve.reduce((best, point) => (point[1] > best[1] ? point : best));
    const at = ([step, rate]) => `${(((step - first[0]) / (last[0] - first[0])) * 300).toFixed(1)},${(78 - (rate / peak[1]) * 76).toFixed(1)}`;
    setAttr(this.line, "points", curve.map(at).join(" "));
    setText(this.caption, `Learning rate: ${fewDigits(first[1])} at step ${count(first[0])}, at most ${fewDigits(peak[1])}, ${fewDigits(last[1])} at step ${count(last[0])}`);
  }
}

/** For a fork: the remaining steps and their range. */
const stepsText = ({ steps, start_step: start }) => (start ? `${count(Math.max(0, steps - start))}, ${count(start + 1)} to ${count(steps)}` : count(steps));

/** Held-out sets that are listed. */
const MAX_SETS = 5;

/** Memory per rank with other settings. */
const memoryOptions = ({ memory_options: options }) => (options ?? []).map(({ parallelism, gradient_checkpointing: recomputes, memory_bytes: parts, fits }) =>
  `${parallelism}${recomputes ? " with gradient_checkpointing" : ""}: ${bytes(Object.values(parts).reduce((sum, value) => sum + (value ?? 0), 0))}${fits === false ? ", does not fit" : ""}`).join("\n");

function planFacts(plan) {
  const memory = Object.values(plan.memory_bytes ?? {}).reduce((sum, value) => sum + (value ?? 0), 0);
  const active = plan.active_parameters === plan.parameters ? "" : `, ${compactNumber(plan.active_parameters)} active`;
  const fits = plan.memory_limit_bytes ? ` of ${bytes(plan.memory_limit_bytes)}` : "";
  const about = plan.estimated ? "about " : "";
  return [
    ["Parameters", `${compactNumber(plan.parameters)}${active}`], ["Tokens in the corpus", plan.tokens === null ? NONE : `${about}${compactNumber(plan.tokens)}`],
    ["Steps", plan.steps === null ? NONE : `${about}${stepsText(plan)}`], ["Tokens per step", compactNumber(plan.tokens_per_step)],
    ["Ranks", plan.world_size ? `${plan.world_size} × ${plan.device ?? ""}` : NONE, plan.device_name], ["Memory per rank", memory ? `${bytes(memory)}${fits}` : NONE, memoryOptions(plan)],
    ["Largest batch_size", count(plan.suggested_batch_size), "that fits into the free memory"], ["Checkpoint size", bytes(plan.checkpoint_bytes)], ["Disk free", bytes(plan.disk_free_bytes)],
    ["Time", plan.eta_seconds === null ? "not known yet" : `about ${duration(plan.eta_seconds)}`, plan.eta_basis], ["Expected first loss", loss(plan.expected_first_loss)],
    ...plan.eval_sets.slice(0, MAX_SETS).map((set) => [`Held-out: ${set.name}`, set.tokens === null ? NONE : `${about}${compactNumber(set.tokens)} tokens`, `${count(set.files)} ${set.files === 1 ? "file" : "files"}`]),
    ["Queue", plan.queue ? `position ${plan.queue.position}` : NONE], ["Waiting for", plan.queue?.waiting_for ?? NONE],
  ];
}
