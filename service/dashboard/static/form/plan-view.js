// What a run would be: its size, time and queue place, and what to know before it is launched.
import { attr, h, list, show, text } from "../dom.js";
import { NONE, bytes, count, duration, loss, short } from "../format.js";

export class PlanView {
  constructor(none) {
    this.none = h("p", { class: "muted" }, none);
    this.warnings = h("ul", { class: "alerts", "aria-label": "Warnings" });
    this.facts = h("dl", { class: "facts", hidden: true });
    this.heading = h("h2", {}, "What it would be");
    this.node = h("section", { class: "plan", tabindex: "-1", "aria-label": "Plan" }, this.heading, this.none, this.warnings, this.facts);
  }

  /** A plan; null for none. */
  show(plan) {
    show(this.none, !plan);
    show(this.facts, plan);
    this.stale(false);
    list(this.warnings, plan?.warnings ?? [], (words) => words, () => h("li"), (part, words) => text(part, words));
    if (!plan) return;
    list(this.facts, factsOf(plan), ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value, more]) => {
      text(part.lastChild, value);
      attr(part.lastChild, "title", more);
    });
  }

  /** Whether the spec has changed since. */
  stale(is) {
    text(this.heading, is && !this.facts.hidden ? "What it would be, before the last changes" : "What it would be");
  }
}

/** A fork's are those that are left, and where they lie. */
const stepsOf = ({ steps, start_step: start }) => (start ? `${count(Math.max(0, steps - start))}, ${count(start + 1)} to ${count(steps)}` : count(steps));

function factsOf(plan) {
  const memory = Object.values(plan.memory_bytes ?? {}).reduce((sum, value) => sum + (value ?? 0), 0);
  const active = plan.active_parameters === plan.parameters ? "" : `, ${short(plan.active_parameters)} active`;
  const fits = plan.memory_limit_bytes ? ` of ${bytes(plan.memory_limit_bytes)}` : "";
  const about = plan.estimated ? "about " : "";
  return [
    ["Parameters", `${short(plan.parameters)}${active}`], ["Tokens in the corpus", plan.tokens === null ? NONE : `${about}${short(plan.tokens)}`],
    ["Steps", plan.steps === null ? NONE : `${about}${stepsOf(plan)}`], ["Tokens a step", short(plan.tokens_per_step)],
    ["Ranks", plan.world_size ? `${plan.world_size} × ${plan.device ?? ""}` : NONE, plan.device_name], ["Memory a rank", memory ? `${bytes(memory)}${fits}` : NONE],
    ["A checkpoint", bytes(plan.checkpoint_bytes)], ["Disk free", bytes(plan.disk_free_bytes)],
    ["Time", plan.eta_seconds === null ? "not known yet" : `about ${duration(plan.eta_seconds)}`, plan.eta_basis], ["First loss", loss(plan.expected_first_loss)],
    ["Queue", plan.queue ? `position ${plan.queue.position}` : NONE], ["It waits for", plan.queue?.waiting_for ?? NONE],
  ];
}
