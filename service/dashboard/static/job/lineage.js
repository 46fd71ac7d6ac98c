// Where a job comes from and what was forked from it, with a way to lay them over each other.
import { get, query } from "../api.js";
import { attr, h, list, show, text } from "../dom.js";
import { count } from "../format.js";

const AGAIN_MS = 10_000;
const SHOWN = 8;

export class Lineage {
  constructor(id) {
    this.id = id;
    this.parent = h("a");
    this.from = h("span", {}, "↳ Forked from ", this.parent, (this.step = h("span")));
    this.forks = h("span", { class: "forks" });
    this.many = h("span");
    this.compare = h("a", {}, "Compare them");
    this.node = h("p", { class: "lineage muted", hidden: true }, this.from, h("span", {}, this.many, this.forks), this.compare);
  }

  async update(job) {
    const now = performance.now();
    if (this.asked && now - this.asked < AGAIN_MS) return;
    this.asked = now;
    const children = (await get(query("/jobs", { parent: this.id, limit: 100 }))).data;
    if (job.parent && !this.name) this.name = await get(`/jobs/${encodeURIComponent(job.parent.job_id)}`).then((found) => found.name, () => null);
    this.draw(job.parent, children.reverse());
  }

  draw(parent, children) {
    show(this.node, parent || children.length);
    show(this.from, parent);
    if (parent) {
      attr(this.parent, "href", this.name ? `/jobs/${parent.job_id}` : null);
      text(this.parent, this.name ?? `${parent.job_id}, which is gone`);
      const words = parent.data === "restart" ? ", data and schedule anew" : "";
      text(this.step, parent.step === null ? "" : ` at step ${count(parent.step)}${words}`);
    }
    show(this.many, children.length);
    text(this.many, `${parent ? "" : "↳ "}${children.length === 1 ? "1 fork: " : `${children.length} forks: `}`);
    list(this.forks, children.slice(0, SHOWN), (one) => one.id, () => h("span", {}, h("a"), h("span")), (part, one) => {
      attr(part.firstChild, "href", `/jobs/${one.id}`);
      text(part.firstChild, one.name);
      text(part.lastChild, ` at ${count(one.parent.step)}, ${one.status}`);
    });
    const all = [...(parent && this.name ? [parent.job_id] : []), this.id, ...children.map((one) => one.id)].slice(0, 10);
    attr(this.compare, "href", `/compare?jobs=${all.join(",")}`);
    show(this.compare, all.length > 1);
  }
}
