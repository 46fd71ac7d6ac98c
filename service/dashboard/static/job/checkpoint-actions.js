// What can be started from a checkpoint, in its row and at a place of the loss curve.
import { sendJson } from "../api.js";
import { announce } from "../dom.js";
import { count } from "../format.js";
import { t } from "../i18n.js";
import { lazy } from "../lazy.js";
import { navigate } from "../router.js";
import { loadResumeDialog } from "./actions.js";

const loadDecayDialog = lazy(() => import("./decay-dialog.js"));

/**
 * Returns `[{label, press, why}]`: generate, fork, decay, resume and evaluate. `page`: the job's page; `run(work)` runs an action and shows its error.
 * `why`: the reason if it is not possible.
 */
export function startsFrom(checkpoint, page, run) {
  const { job } = page;
  const { step } = checkpoint;
  const weightsOnly = checkpoint.kind === "full" ? null : t("only its weights are stored");
  const item = (label, work, why = null) => ({ label, why: weightsOnly ?? why, press: () => run(work) });
  const resumable = job.resumable || job.status === "succeeded" ? null : (job.allowed_actions.find(({ action }) => action === "resume")?.why_not ?? t("the job cannot be resumed now"));
  const evaluate = async () => {
    await sendJson("POST", `${page.address}/checkpoints/${step}/evaluate`, {});
    announce(t("Step {step} will be evaluated", { step: count(step) }));
    page.selectTab("evaluations");
  };
  return [
    item(t("Generate"), () => page.selectCheckpoint("try", step)),
    item(t("Fork from here"), () => navigate(`/submit?fork=${encodeURIComponent(checkpoint.job_id)}&step=${step}`)),
    item(t("Decay from here…"), async () => (await loadDecayDialog()).openDecayDialog(page, checkpoint)),
    item(t("Resume with…"), async () => (await loadResumeDialog()).openResumeDialog(page.address, job, (changed) => (announce(t("resume requested")), page.draw(changed)), step), resumable),
    item(t("Evaluate"), evaluate, job.spec.evaluation?.tasks.length ? null : t("no tasks in evaluation.tasks")),
  ];
}
