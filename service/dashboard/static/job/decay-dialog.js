// Dialog to decay the learning rate from a checkpoint.
import { ApiError, sendJson } from "../api.js";
import { h, setText, setVisible } from "../dom.js";
import { RateCurve } from "../form/plan-view.js";
import { count, duration } from "../format.js";
import { t } from "../i18n.js";
import { navigate } from "../router.js";

const PLAN_DELAY_MS = 300;
/** The proposed length of a decay, as a part of the steps before it. */
const DECAY_PART = 0.1;

/** Asks over how many steps the learning rate falls, shows the rate while one types, and forks the job. */
export function openDecayDialog({ address, job }, checkpoint) {
  const at = count(checkpoint.step);
  const steps = h("input", { type: "number", min: "1", step: "1", id: "decay-steps", value: Math.max(1, Math.round(checkpoint.step * DECAY_PART)) });
  const curve = new RateCurve();
  const time = h("p", { class: "muted", role: "status" });
  const error = h("p", { class: "error", role: "alert" });
  const start = h("button", { type: "submit", class: "primary" }, t("Start the decay"));
  const form = h("form", { novalidate: true, onsubmit: (event) => (event.preventDefault(), send()) },
    h("div", { class: "bar" }, h("label", { for: "decay-steps" }, t("Steps of the decay")), steps), curve.node, time, error,
    h("div", { class: "bar" }, start, h("button", { type: "button", onclick: () => box.close() }, t("Back"))));
  const box = h("dialog", { class: "wide", "aria-labelledby": "decay-title" }, h("h2", { id: "decay-title" }, t("Decay from step {step}", { step: at })),
    h("p", { class: "muted" }, t("A fork of {name} continues from step {step} with the same data. Its learning rate falls over these steps, and then it ends.", { name: job.name, step: at })), form);

  /** Returns the body of the fork; null after showing an error if the number is not valid. */
  const body = () => {
    const length = Number(steps.value);
    const valid = Number.isInteger(length) && length >= 1;
    setText(error, valid ? "" : t("Type a whole number of steps, at least 1."));
    const training = { lr_scheduler: "wsd", decay_steps: length, max_steps: checkpoint.step - job.plan.base_step + length };
    return valid ? { step: checkpoint.step, data: "keep", overrides: { training } } : null;
  };
  let [timer, latest] = [null, 0];
  const plan = async () => {
    const number = (latest += 1);
    const wanted = body();
    setVisible(curve.node, wanted);
    setText(time, "");
    if (!wanted) return;
    try {
      const found = await sendJson("POST", `${address}/fork/plan`, wanted);
      if (number !== latest) return;
      curve.show(found.learning_rate ?? []);
      setText(time, found.eta_seconds === null ? "" : t("about {value}", { value: duration(found.eta_seconds) }));
    } catch (problem) {
      if (number === latest) show(problem);
    }
  };
  const show = (problem) => setText(error, problem instanceof ApiError ? [problem.message, ...problem.errors.map((each) => `${each.pointer}: ${each.message}`)].join(" ") : problem.message);
  const send = async () => {
    const wanted = body();
    if (!wanted) return steps.focus();
    try {
      const { id } = await sendJson("POST", `${address}/fork`, wanted);
      box.close();
      navigate(`/jobs/${id}`);
    } catch (problem) {
      show(problem);
    }
  };
  steps.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(plan, PLAN_DELAY_MS);
  });
  const before = document.activeElement;
  box.addEventListener("close", () => (clearTimeout(timer), box.remove(), before?.focus()));
  document.body.append(box);
  box.showModal();
  steps.select();
  plan();
}
