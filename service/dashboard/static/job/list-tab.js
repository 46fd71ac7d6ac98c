// One of a job's lists as a table, and how a refused press in it is told.
import { Refused, get } from "../api.js";
import { h, list, show, table, text } from "../dom.js";
import { NONE } from "../format.js";

const UNNAMED = new Set(["Do", "Message", "How it ended"]); // These say it themselves, and take all of the width.

/** A table of one of the job's lists, asked for again when `mark` of the job changes. */
export class Listing {
  constructor(place, address, { path, columns, caption, none, key = (one) => one.id, row, mark }) {
    Object.assign(this, { address, path, key, row, mark });
    this.table = table(columns, caption);
    this.names = columns.map(([name]) => name);
    this.table.node.classList.add("stack");
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
      list(this.table.body, found, this.key, (one) => this.named(this.row(one, this)));
    } catch {
      this.seen = null;
    }
  }

  /** In a narrow window a row is a block, and each cell says what it is. */
  named(row) {
    [...row.children].forEach((part, i) => !UNNAMED.has(this.names[i]) && (part.dataset.name = this.names[i].toLowerCase()));
    return row;
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

/** A cell; where it says nothing a narrow window leaves it out. */
export function cell(value, kind = "", title = null) {
  const words = value ?? NONE;
  return h("td", { class: words === NONE ? `${kind} nothing` : kind, title }, words);
}

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
