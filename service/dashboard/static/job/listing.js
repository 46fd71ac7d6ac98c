// One of a job's lists as a table, and how a refused press in it is told.
import { Refused, get } from "../api.js";
import { h, list, show, table, text } from "../dom.js";

/** A table of one of the job's lists, asked for again when `mark` of the job changes. */
export class Listing {
  constructor(place, address, { path, columns, caption, none, key = (one) => one.id, row, mark }) {
    Object.assign(this, { address, path, key, row, mark });
    this.table = table(columns, caption);
    this.none = h("p", { class: "muted", hidden: true }, none);
    this.wrong = h("p", { class: "wrong", role: "alert" });
    place.append(this.wrong, this.none, this.table.node);
  }

  async update(job) {
    const mark = this.mark(job);
    if (mark === this.seen) return;
    this.seen = mark;
    try {
      const found = await this.all();
      show(this.none, !found.length);
      show(this.table.node, found.length);
      list(this.table.body, found, this.key, (one) => this.row(one, this));
    } catch {
      this.seen = null;
    }
  }

  async all() {
    const found = [];
    for (let more = true, after = ""; more && found.length < 1000; after = `&after=${found.at(-1)?.id}`) {
      const page = await get(`${this.address}${this.path}?limit=100${after}`);
      found.push(...page.data);
      more = page.has_more;
    }
    return this.newestFirst ? found.reverse() : found;
  }
}

export const cell = (value, kind = "", title = null) => h("td", { class: kind, title }, value ?? "–");
export const moved = (job) => `${job.status} ${job.attempt} ${job.checkpoint?.step} ${job.alerts.length}`;

/** Does what a button asks for; a refusal stands above the table. */
export async function tried(listing, work) {
  text(listing.wrong, "");
  try {
    await work();
  } catch (error) {
    text(listing.wrong, error instanceof Refused ? [error.message, ...error.errors.map((one) => `${one.pointer}: ${one.message}`)].join(" ") : error.message);
  }
}
