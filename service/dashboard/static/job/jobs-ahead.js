// Who is before a job that waits: those that hold devices, with what they have left, and those that are earlier in the queue.
import { get, query } from "../api.js";
import { attr, h, list, show, text } from "../dom.js";
import { duration } from "../format.js";

const AGAIN_MS = 5000;
const NAMED = 2; // of each kind

export class Ahead {
  constructor() {
    this.names = h("span", { class: "named" });
    this.rest = h("span");
    this.node = h("p", { class: "ahead muted", hidden: true }, "Behind ", this.names, this.rest);
  }

  async update(job) {
    const waits = job.status === "queued";
    if (!waits) return show(this.node, false);
    const now = performance.now();
    if (this.asked && now - this.asked < AGAIN_MS) return;
    this.asked = now;
    const [running, queued] = await Promise.all([get(query("/jobs", { status: ["starting", "running"], limit: 100 })), get("/jobs?status=queued&limit=100")]);
    const left = (one) => one.progress.eta_seconds ?? Infinity;
    const holding = running.data.sort((a, b) => left(a) - left(b));
    const earlier = queued.data.filter((one) => one.queue.position < job.queue.position).sort((a, b) => a.queue.position - b.queue.position);
    this.draw(holding, earlier);
  }

  draw(holding, earlier) {
    const shown = [...holding.slice(0, NAMED), ...earlier.slice(0, NAMED)];
    const more = holding.length + earlier.length - shown.length;
    show(this.node, shown.length);
    list(this.names, shown, (one) => one.id, () => h("span", {}, h("a"), h("span")), (part, { id, name, progress }) => {
      attr(part.firstChild, "href", `/jobs/${id}`);
      text(part.firstChild, name);
      text(part.lastChild, progress.eta_seconds ? ` (about ${duration(progress.eta_seconds)} left)` : "");
    });
    text(this.rest, more ? `, and ${more} more.` : ".");
  }
}
