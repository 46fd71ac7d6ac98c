// Shows a plan: size, time and queue position of a run, with warnings.
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { NONE, bytes, compactNumber, count, duration, loss } from "../format.js";

export class PlanView {
  constructor(none) {
    this.none = h("p", { class: "muted" }, none);
    this.warnings = h("ul", { class: "alerts", "aria-label": "Warnings" });
    this.facts = h("dl", { class: "facts", hidden: true });
    this.heading = h("h2", {}, "Plan");
    this.node = h("section", { class: "plan", tabindex: "-1", "aria-label": "Plan" }, this.heading, this.none, this.warnings, this.facts);
  }

  /** Shows a plan, or none if null. */
  show(plan) {
    setVisible(this.none, !plan);
    setVisible(this.facts, plan);
    this.stale(false);
    updateList(this.warnings, plan?.warnings ?? [], (warning) => warning, () => h("li"), (part, warning) => setText(part, warning));
    if (!plan) return;
    updateList(this.facts, planFacts(plan), ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value, more]) => {
      setText(part.lastChild, value);
      setAttr(part.lastChild, "title", more);
    });
  }

  /** Marks the plan as older than the last change of the spec. */
  stale(is) {
    setText(this.heading, is && !this.facts.hidden ? "Plan before the last changes" : "Plan");
  }
}

/** For a fork: the remaining steps and their range. */
const stepsText = ({ steps, start_step: start }) => (start ? `${count(Math.max(0, steps - start))}, ${count(start + 1)} to ${count(steps)}` : count(steps));

function planFacts(plan) {
  const memory = Object.values(plan.memory_bytes ?? {}).reduce((sum, value) => sum + (value ?? 0), 0);
  const active = plan.active_parameters === plan.parameters ? "" : `, ${compactNumber(plan.active_parameters)} active`;
  const fits = plan.memory_limit_bytes ? ` of ${bytes(plan.memory_limit_bytes)}` : "";
  const about = plan.estimated ? "about " : "";
  return [
    ["Parameters", `${compactNumber(plan.parameters)}${active}`], ["Tokens in the corpus", plan.tokens === null ? NONE : `${about}${compactNumber(plan.tokens)}`],
    ["Steps", plan.steps === null ? NONE : `${about}${stepsText(plan)}`], ["Tokens per step", compactNumber(plan.tokens_per_step)],
    ["Ranks", plan.world_size ? `${plan.world_size} × ${plan.device ?? ""}` : NONE, plan.device_name], ["Memory per rank", memory ? `${bytes(memory)}${fits}` : NONE],
    ["Checkpoint size", bytes(plan.checkpoint_bytes)], ["Disk free", bytes(plan.disk_free_bytes)],
    ["Time", plan.eta_seconds === null ? "not known yet" : `about ${duration(plan.eta_seconds)}`, plan.eta_basis], ["Expected first loss", loss(plan.expected_first_loss)],
    ["Queue", plan.queue ? `position ${plan.queue.position}` : NONE], ["Waiting for", plan.queue?.waiting_for ?? NONE],
  ];
}
