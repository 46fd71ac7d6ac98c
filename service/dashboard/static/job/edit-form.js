// Form to edit all of a job that PATCH accepts.
import { sendJson } from "../api.js";
import { Field, SettingsForm } from "../form/field.js";
import { describeField, formatValue, isEqual, requestProperties } from "../form/schema.js";
import { t } from "../i18n.js";

/** Returns the form. `saved(job)` is called after a change, `leave()` if it is closed without one. */
export async function openEditForm(address, job, saved, leave) {
  const body = await requestProperties("patch", "/jobs/{job_id}");
  const known = Object.entries(body).filter(([name]) => currentValue(job, name) !== undefined);
  const fields = known.map(([name, described]) => new Field(describeField(described, [name], {}), currentValue(job, name), t("now"), () => {}));
  const form = new SettingsForm(fields, t("Save"), { send: (changes) => sendJson("PATCH", address, changes), done: saved, leave });
  return {
    node: form.node,
    focus: () => fields[0].focus(),
    update: (newer) => fields.forEach((field) => mergeRemoteChange(field, currentValue(newer, field.name))),
  };
}

/** Another client changed the value: an unedited field takes it, an edited one shows a message. */
function mergeRemoteChange(field, now) {
  if (isEqual(field.base, now)) return;
  const touched = field.changed;
  field.base = now;
  if (!touched) return field.show(now);
  field.refresh();
  field.setError(t("changed to {value} meanwhile; saving overwrites it", { value: formatValue(now) }));
}

/** Returns the current value of a PATCH field, which is on the job or in a group of its spec. */
function currentValue(job, name) {
  if (["name", "labels", "description", "group", "discarded"].includes(name)) return job[name];
  const group = Object.values(job.spec).find((section) => section !== null && typeof section === "object" && Object.hasOwn(section, name));
  return group?.[name];
}
