// Parent and forks of a job, with a link that compares them.
import { get, withQuery } from "../api.js";
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { count } from "../format.js";

const REFRESH_MS = 10_000;
const MAX_FORKS = 8;

export class Lineage {
  constructor(id) {
    this.id = id;
    this.parent = h("a");
    this.from = h("span", {}, "↳ Forked from ", this.parent, (this.step = h("span")));
    this.forks = h("span", { class: "forks" });
    this.forkCount = h("span");
    this.compare = h("a", {}, "Compare");
    this.node = h("p", { class: "lineage muted", hidden: true }, this.from, h("span", {}, this.forkCount, this.forks), this.compare);
  }

  async update(job) {
    const now = performance.now();
    if (this.askedAt && now - this.askedAt < REFRESH_MS) return;
    this.askedAt = now;
    const children = (await get(withQuery("/jobs", { parent: this.id, limit: 100 }))).data;
    if (job.parent && !this.name) this.name = await get(`/jobs/${encodeURIComponent(job.parent.job_id)}`).then((found) => found.name, () => null);
    this.draw(job.parent, children.reverse());
  }

  draw(parent, children) {
    setVisible(this.node, parent || children.length);
    setVisible(this.from, parent);
    if (parent) {
      setAttr(this.parent, "href", this.name ? `/jobs/${parent.job_id}` : null);
      setText(this.parent, this.name ?? `${parent.job_id} (deleted)`);
      const words = parent.data === "restart" ? ", data and schedule restarted" : "";
      setText(this.step, parent.step === null ? "" : ` at step ${count(parent.step)}${words}`);
    }
    setVisible(this.forkCount, children.length);
    setText(this.forkCount, `${parent ? "" : "↳ "}${children.length === 1 ? "1 fork: " : `${children.length} forks: `}`);
    updateList(this.forks, children.slice(0, MAX_FORKS), (one) => one.id, () => h("span", {}, h("a"), h("span")), (part, one) => {
      setAttr(part.firstChild, "href", `/jobs/${one.id}`);
      setText(part.firstChild, one.name);
      setText(part.lastChild, ` at ${count(one.parent.step)}, ${one.status}`);
    });
    const all = [...(parent && this.name ? [parent.job_id] : []), this.id, ...children.map((one) => one.id)].slice(0, 10);
    setAttr(this.compare, "href", `/compare?jobs=${all.join(",")}`);
    setVisible(this.compare, all.length > 1);
  }
}
