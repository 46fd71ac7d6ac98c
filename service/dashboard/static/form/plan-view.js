// Shows a plan: size, time and queue position of a run, with warnings.
import { h, setAttr, setText, setVisible, svg, updateList } from "../dom.js";
import { NONE, bytes, compactNumber, count, duration, fewDigits, loss } from "../format.js";
import { t, tn } from "../i18n.js";

export class PlanView {
  /** `apply(changes)` is called to use settings with which the run fits. */
  constructor(none, apply) {
    this.apply = apply;
    this.fit = h("p", { hidden: true });
    this.none = h("p", { class: "muted" }, none);
    this.warnings = h("ul", { class: "alerts", "aria-label": t("Warnings") });
    this.facts = h("dl", { class: "facts", hidden: true });
    this.curve = new RateCurve();
    this.heading = h("h2", {}, t("Plan"));
    this.node = h("section", { class: "plan", tabindex: "-1", "aria-label": t("Plan") }, this.heading, this.none, this.warnings, this.fit, this.facts, this.curve.node);
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
    this.fit.replaceChildren(h("button", { type: "button", onclick: () => this.apply(changes) }, t("Use {settings}", { settings: settings.join(t(" and ")) })));
  }

  /** Marks the plan as older than the last change of the spec. */
  stale(is) {
    setText(this.heading, is && !this.facts.hidden ? t("Plan before the last changes") : t("Plan"));
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
    setText(this.caption, t("Learning rate: {first} at step {from}, at most {peak}, {last} at step {to}", {
      first: fewDigits(first[1]), from: count(first[0]), peak: fewDigits(peak[1]), last: fewDigits(last[1]), to: count(last[0]) }));
  }
}

/** For a fork: the remaining steps and their range. */
const stepsText = ({ steps, start_step: start }) => (start ? t("{n}, {first} to {last}", { n: count(Math.max(0, steps - start)), first: count(start + 1), last: count(steps) }) : count(steps));

/** Held-out sets that are listed. */
const MAX_SETS = 5;

/** Memory per rank with other settings. */
const memoryOptions = ({ memory_options: options }) => (options ?? []).map(({ parallelism, gradient_checkpointing: recomputes, memory_bytes: parts, fits }) =>
  `${recomputes ? t("{parallelism} with gradient_checkpointing", { parallelism }) : parallelism}: ${bytes(Object.values(parts).reduce((sum, value) => sum + (value ?? 0), 0))}${fits === false ? t(", does not fit") : ""}`).join("\n");

function planFacts(plan) {
  const memory = Object.values(plan.memory_bytes ?? {}).reduce((sum, value) => sum + (value ?? 0), 0);
  const parameters = compactNumber(plan.parameters);
  const inMemory = plan.memory_limit_bytes ? t("{part} of {whole}", { part: bytes(memory), whole: bytes(plan.memory_limit_bytes) }) : bytes(memory);
  const about = (value) => (plan.estimated ? t("about {value}", { value }) : value);
  return [
    [t("Parameters"), plan.active_parameters === plan.parameters ? parameters : t("{n}, {active} active", { n: parameters, active: compactNumber(plan.active_parameters) })],
    [t("Tokens in the corpus"), plan.tokens === null ? NONE : about(compactNumber(plan.tokens))],
    [t("Steps"), plan.steps === null ? NONE : about(stepsText(plan))], [t("Tokens per step"), compactNumber(plan.tokens_per_step)],
    [t("Ranks"), plan.world_size ? `${plan.world_size} × ${plan.device ?? ""}` : NONE, plan.device_name], [t("Memory per rank"), memory ? inMemory : NONE, memoryOptions(plan)],
    [t("Largest batch_size"), count(plan.suggested_batch_size), t("that fits into the free memory")], [t("Checkpoint size"), bytes(plan.checkpoint_bytes)], [t("Disk free"), bytes(plan.disk_free_bytes)],
    [t("Time"), plan.eta_seconds === null ? t("not known yet") : t("about {value}", { value: duration(plan.eta_seconds) }), plan.eta_basis], [t("Expected first loss"), loss(plan.expected_first_loss)],
    ...plan.eval_sets.slice(0, MAX_SETS).map((set) => [t("Held-out: {set}", { set: set.name }), set.tokens === null ? NONE : about(t("{n} tokens", { n: compactNumber(set.tokens) })), tn(set.files, "{n} file", "{n} files", { n: count(set.files) })]),
    [t("Queue"), plan.queue ? t("position {n}", { n: plan.queue.position }) : NONE], [t("Waiting for"), plan.queue?.waiting_for ?? NONE],
  ];
}
