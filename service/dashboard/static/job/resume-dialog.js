// Dialog to resume a job with changes: more epochs or steps, another checkpoint, other resources.
import { getAll, sendJson } from "../api.js";
import { h } from "../dom.js";
import { Field, SettingsForm } from "../form/field.js";
import { describeField, fetchSchemas, getAt, requestProperties } from "../form/schema.js";
import { t } from "../i18n.js";

const RESOURCES = ["nproc_per_node", "device", "max_restarts"];

/** Opens the dialog; `done(job)` is called after the job was resumed. `step`: the checkpoint to start with, or null for the newest. */
export async function openResumeDialog(address, job, done, step = null) {
  const fields = await resumeFields(address, job);
  if (step !== null) fields.find((field) => field.name === "step")?.show(step);
  const explanation = job.reason === "limit" ? t("The run has ended at its limit. Set another limit to continue, or none.")
    : job.status === "succeeded" ? t("All steps are done. Set more steps, tokens or epochs to continue.") : t("Settings that you do not change stay as they are.");
  const sheet = new SettingsForm(fields, t("Resume"), {
    send: (changes) => sendJson("POST", `${address}/resume`, changes), done: (answer) => (box.close(), done(answer)), leave: () => box.close() });
  const box = h("dialog", { class: "wider", "aria-labelledby": "resume-title" }, h("h2", { id: "resume-title" }, t("Resume {name}", { name: job.name })), h("p", { class: "muted" }, explanation), sheet.node);
  const before = document.activeElement;
  box.addEventListener("close", () => (box.remove(), before?.focus()));
  document.body.append(box);
  box.showModal();
  fields[0].focus();
}

async function resumeFields(address, job) {
  const [body, all, checkpoints] = await Promise.all([requestProperties("post", "/jobs/{job_id}/resume"), fetchSchemas(), getAll(`${address}/checkpoints`)]);
  const steps = checkpoints.filter((checkpoint) => checkpoint.kind === "full").map((checkpoint) => checkpoint.step);
  const made = (described, path) => new Field(describeField(described, path, all), path[0] === "step" ? null : path[0] === "schedule" ? "extend" : getAt(job.spec, specPath(path)), t("now"), () => {});
  const step = { anyOf: [{ enum: steps }, { type: "null" }], description: t("the checkpoint to resume from; newer ones are set aside"), "x-none": t("newest") };
  const resources = RESOURCES.filter((name) => name in all.ResourcesSpec.properties);
  return [
    ...["max_steps", "max_tokens", "epochs", "max_minutes", "target_loss"].map((name) => made(body[name], [name])), made(step, ["step"]), made(body.schedule, ["schedule"]),
    ...resources.map((name) => made(all.ResourcesSpec.properties[name], ["resources", name]))];
}

const LIMITS = ["max_minutes", "target_loss"];
const specPath = (path) => (path.length > 1 ? path : [LIMITS.includes(path[0]) ? "limits" : "training", path[0]]);
