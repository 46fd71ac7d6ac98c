// Resume with changes: more epochs or steps, another checkpoint to begin at, other resources. A dialog.
import { get, send } from "../api.js";
import { h } from "../dom.js";
import { Field } from "../form/field.js";
import { bodyOf, fieldOf, schemas } from "../form/schema.js";
import { Sheet } from "../form/settings-form.js";
import { at } from "../form/values.js";

const RESOURCES = ["nproc_per_node", "device", "max_restarts"];

/** Asks; `done(job)` is told what became of it. */
export async function resumeWith(address, job, done) {
  const fields = await fieldsOf(address, job);
  const words = job.status === "succeeded" ? "It has finished all of its steps: give more of them to go on." : "What is left as it is stays as it was.";
  const sheet = new Sheet(fields, "Resume", {
    send: (changes) => send("POST", `${address}/resume`, changes), done: (answer) => (box.close(), done(answer)), leave: () => box.close() });
  const box = h("dialog", { class: "wider", "aria-labelledby": "resume-title" }, h("h2", { id: "resume-title" }, `Resume ${job.name}`), h("p", { class: "muted" }, words), sheet.node);
  const before = document.activeElement;
  box.addEventListener("close", () => (box.remove(), before?.focus()));
  document.body.append(box);
  box.showModal();
  fields[0].focus();
}

async function fieldsOf(address, job) {
  const [body, all, checkpoints] = await Promise.all([bodyOf("post", "/jobs/{job_id}/resume"), schemas(), get(`${address}/checkpoints?limit=100`)]);
  const steps = checkpoints.data.filter((one) => one.kind === "full").map((one) => one.step);
  const made = (described, path) => new Field(fieldOf(described, path, all), path[0] === "step" ? null : at(job.spec, placeOf(path)), "now", () => {});
  const step = { anyOf: [{ enum: steps }, { type: "null" }], description: "the checkpoint to begin at; newer ones are set aside", "x-none": "newest" };
  const resources = RESOURCES.filter((name) => name in all.ResourcesSpec.properties);
  return [
    ...["max_steps", "epochs"].map((name) => made(body[name], [name])), made(step, ["step"]),
    ...resources.map((name) => made(all.ResourcesSpec.properties[name], ["resources", name]))];
}

const placeOf = (path) => (path.length > 1 ? path : ["training", path[0]]);
