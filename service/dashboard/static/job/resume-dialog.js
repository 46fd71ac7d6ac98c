// Dialog to resume a job with changes: more epochs or steps, another checkpoint, other resources.
import { get, sendJson } from "../api.js";
import { h } from "../dom.js";
import { Field } from "../form/field.js";
import { describeField, fetchSchemas, requestProperties } from "../form/schema.js";
import { SettingsForm } from "../form/settings-form.js";
import { getAt } from "../form/values.js";

const RESOURCES = ["nproc_per_node", "device", "max_restarts"];

/** Opens the dialog; `done(job)` is called after the job was resumed. */
export async function openResumeDialog(address, job, done) {
  const fields = await resumeFields(address, job);
  const words = job.status === "succeeded" ? "All steps are done. Set more steps or epochs to continue." : "Settings that you do not change stay as they are.";
  const sheet = new SettingsForm(fields, "Resume", {
    send: (changes) => sendJson("POST", `${address}/resume`, changes), done: (answer) => (box.close(), done(answer)), leave: () => box.close() });
  const box = h("dialog", { class: "wider", "aria-labelledby": "resume-title" }, h("h2", { id: "resume-title" }, `Resume ${job.name}`), h("p", { class: "muted" }, words), sheet.node);
  const before = document.activeElement;
  box.addEventListener("close", () => (box.remove(), before?.focus()));
  document.body.append(box);
  box.showModal();
  fields[0].focus();
}

async function resumeFields(address, job) {
  const [body, all, checkpoints] = await Promise.all([requestProperties("post", "/jobs/{job_id}/resume"), fetchSchemas(), get(`${address}/checkpoints?limit=100`)]);
  const steps = checkpoints.data.filter((one) => one.kind === "full").map((one) => one.step);
  const made = (described, path) => new Field(describeField(described, path, all), path[0] === "step" ? null : path[0] === "schedule" ? "extend" : getAt(job.spec, specPath(path)), "now", () => {});
  const step = { anyOf: [{ enum: steps }, { type: "null" }], description: "the checkpoint to resume from; newer ones are set aside", "x-none": "newest" };
  const resources = RESOURCES.filter((name) => name in all.ResourcesSpec.properties);
  return [
    ...["max_steps", "epochs"].map((name) => made(body[name], [name])), made(step, ["step"]), made(body.schedule, ["schedule"]),
    ...resources.map((name) => made(all.ResourcesSpec.properties[name], ["resources", name]))];
}

const specPath = (path) => (path.length > 1 ? path : ["training", path[0]]);
