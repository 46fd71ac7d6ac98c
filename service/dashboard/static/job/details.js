// A job's labels and priority, and its edit in place: what PATCH takes, held against what others change meanwhile.
import { send } from "../api.js";
import { attr, h, list, say, show, text } from "../dom.js";
import { Field } from "../form/field.js";
import { bodyOf, fieldOf } from "../form/schema.js";
import { Sheet } from "../form/settings-form.js";
import { same, written } from "../form/values.js";

export class Details {
  constructor(address, done) {
    Object.assign(this, { address, done });
    this.labels = h("span", { class: "labels" });
    this.priority = h("span", { class: "muted" });
    this.edit = h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => (this.sheet ? this.leave() : this.begin()) }, "✎ Edit");
    this.place = h("div", { class: "editing" });
    this.node = h("div", { class: "details" }, h("div", { class: "line" }, this.labels, this.priority, this.edit), this.place);
  }

  update(job) {
    this.job = job;
    show(this.labels, Object.keys(job.labels).length);
    list(this.labels, Object.entries(job.labels), ([key]) => key, () => h("a", { class: "label" }), (tag, [key, value]) => {
      text(tag, `${key}=${value}`);
      attr(tag, "href", `/?label=${encodeURIComponent(`${key}=${value}`)}`);
    });
    text(this.priority, `priority ${job.spec.resources.priority}`);
    for (const field of this.sheet?.fields ?? []) this.keepUp(field, valueOf(job, field.name));
  }

  /** Somebody else changed it: an untouched field follows, a touched one says so. */
  keepUp(field, now) {
    if (same(field.base, now)) return;
    const touched = field.changed;
    field.base = now;
    if (!touched) return field.show(now);
    field.mark();
    field.complain(`changed to ${written(now)} meanwhile; saving puts yours in its place`);
  }

  async begin() {
    const body = await bodyOf("patch", "/jobs/{job_id}");
    if (this.sheet) return;
    const known = Object.entries(body).filter(([name]) => valueOf(this.job, name) !== undefined);
    const fields = known.map(([name, described]) => new Field(fieldOf(described, [name], {}), valueOf(this.job, name), "now", () => {}));
    const saved = (job) => {
      say("Changed");
      this.leave();
      this.done(job);
    };
    this.sheet = new Sheet(fields, "Save", { send: (changes) => send("PATCH", this.address, changes), done: saved, leave: () => this.leave() });
    this.place.replaceChildren(this.sheet.node);
    attr(this.edit, "aria-expanded", "true");
    fields[0].focus();
  }

  leave() {
    this.sheet = null;
    this.place.replaceChildren();
    attr(this.edit, "aria-expanded", "false");
    this.edit.focus();
  }
}

/** What a member of PATCH's body is now: at the top of the job, or in one of its spec's groups. */
function valueOf(job, name) {
  if (name === "name" || name === "labels") return job[name];
  const group = Object.values(job.spec).find((one) => one !== null && typeof one === "object" && Object.hasOwn(one, name));
  return group?.[name];
}
