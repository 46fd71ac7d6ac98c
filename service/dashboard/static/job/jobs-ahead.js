// The jobs ahead of a queued job: those that hold devices, with their remaining time, and those earlier in the queue.
import { get, withQuery } from "../api.js";
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { duration } from "../format.js";

const REFRESH_MS = 5000;
const MAX_NAMED = 2; // of each kind

export class JobsAhead {
  constructor() {
    this.names = h("span", { class: "job-names" });
    this.rest = h("span");
    this.node = h("p", { class: "jobs-ahead muted", hidden: true }, "Jobs ahead: ", this.names, this.rest);
  }

  async update(job) {
    const waits = job.status === "queued";
    if (!waits) return setVisible(this.node, false);
    const now = performance.now();
    if (this.askedAt && now - this.askedAt < REFRESH_MS) return;
    this.askedAt = now;
    const [running, queued] = await Promise.all([get(withQuery("/jobs", { status: ["starting", "running"], limit: 100 })), get("/jobs?status=queued&limit=100")]);
    const left = (one) => one.progress.eta_seconds ?? Infinity;
    const holding = running.data.sort((a, b) => left(a) - left(b));
    const earlier = queued.data.filter((one) => one.queue.position < job.queue.position).sort((a, b) => a.queue.position - b.queue.position);
    this.draw(holding, earlier);
  }

  draw(holding, earlier) {
    const shown = [...holding.slice(0, MAX_NAMED), ...earlier.slice(0, MAX_NAMED)];
    const more = holding.length + earlier.length - shown.length;
    setVisible(this.node, shown.length);
    updateList(this.names, shown, (one) => one.id, () => h("span", {}, h("a"), h("span")), (part, { id, name, progress }) => {
      setAttr(part.firstChild, "href", `/jobs/${id}`);
      setText(part.firstChild, name);
      setText(part.lastChild, progress.eta_seconds ? ` (about ${duration(progress.eta_seconds)} left)` : "");
    });
    setText(this.rest, more ? `, and ${more} more.` : ".");
  }
}
