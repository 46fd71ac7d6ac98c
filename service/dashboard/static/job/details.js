// Labels and priority of a job, with a form to edit what PATCH accepts.
import { sendJson } from "../api.js";
import { announce, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { Field } from "../form/field.js";
import { describeField, requestProperties } from "../form/schema.js";
import { SettingsForm } from "../form/settings-form.js";
import { formatValue, isEqual } from "../form/values.js";

export class Details {
  constructor(address, done) {
    Object.assign(this, { address, done });
    this.labels = h("span", { class: "labels" });
    this.priority = h("span", { class: "muted" });
    this.edit = h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => (this.form ? this.cancel() : this.startEditing()) }, "✎ Edit");
    this.place = h("div", { class: "editing" });
    this.node = h("div", { class: "details" }, h("div", { class: "line" }, this.labels, this.priority, this.edit), this.place);
  }

  update(job) {
    this.job = job;
    setVisible(this.labels, Object.keys(job.labels).length);
    updateList(this.labels, Object.entries(job.labels), ([key]) => key, () => h("a", { class: "label" }), (tag, [key, value]) => {
      setText(tag, `${key}=${value}`);
      setAttr(tag, "href", `/?label=${encodeURIComponent(`${key}=${value}`)}`);
    });
    setText(this.priority, `priority ${job.spec.resources.priority}`);
    for (const field of this.form?.fields ?? []) this.mergeRemoteChange(field, currentValue(job, field.name));
  }

  /** Another client changed the value: an unedited field takes it, an edited one shows a message. */
  mergeRemoteChange(field, now) {
    if (isEqual(field.base, now)) return;
    const touched = field.changed;
    field.base = now;
    if (!touched) return field.show(now);
    field.refresh();
    field.setError(`changed to ${formatValue(now)} meanwhile; saving overwrites it`);
  }

  async startEditing() {
    const body = await requestProperties("patch", "/jobs/{job_id}");
    if (this.form) return;
    const known = Object.entries(body).filter(([name]) => currentValue(this.job, name) !== undefined);
    const fields = known.map(([name, described]) => new Field(describeField(described, [name], {}), currentValue(this.job, name), "now", () => {}));
    const saved = (job) => {
      announce("Changed");
      this.cancel();
      this.done(job);
    };
    this.form = new SettingsForm(fields, "Save", { send: (changes) => sendJson("PATCH", this.address, changes), done: saved, leave: () => this.cancel() });
    this.place.replaceChildren(this.form.node);
    setAttr(this.edit, "aria-expanded", "true");
    fields[0].focus();
  }

  cancel() {
    this.form = null;
    this.place.replaceChildren();
    setAttr(this.edit, "aria-expanded", "false");
    this.edit.focus();
  }
}

/** Returns the current value of a PATCH field, which is on the job or in a group of its spec. */
function currentValue(job, name) {
  if (name === "name" || name === "labels") return job[name];
  const group = Object.values(job.spec).find((one) => one !== null && typeof one === "object" && Object.hasOwn(one, name));
  return group?.[name];
}
