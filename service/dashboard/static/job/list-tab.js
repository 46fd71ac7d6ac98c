// Base class of tabs that show one of a job's lists as a table.
import { ApiError, get } from "../api.js";
import { createTable, h, setText, setVisible, updateList } from "../dom.js";
import { NONE } from "../format.js";

const WITHOUT_LABEL = new Set(["Actions", "Message", "Outcome"]); // Clear without a label, and as wide as the window.

/** Fetches the list again when `mark(job)` changes. */
export class ListTab {
  constructor(place, address, { path, columns, caption, none, key = (one) => one.id, row, mark }) {
    Object.assign(this, { address, path, key, row, mark });
    this.table = createTable(columns, caption);
    this.names = columns.map(([name]) => name);
    this.table.node.classList.add("stack");
    this.none = h("p", { class: "muted", hidden: true }, none);
    this.error = h("p", { class: "error", role: "alert" });
    place.append(this.error, this.none, this.table.node);
  }

  async update(job) {
    const mark = this.mark(job);
    if (mark === this.shownMark) return;
    this.shownMark = mark;
    try {
      const found = await this.fetchAll();
      setVisible(this.none, !found.length);
      setVisible(this.table.node, found.length);
      updateList(this.table.body, found, this.key, (one) => this.addLabels(this.row(one, this)));
    } catch {
      this.shownMark = null;
    }
  }

  /** In a narrow window a row is a block, so each cell has a label. */
  addLabels(row) {
    [...row.children].forEach((part, i) => !WITHOUT_LABEL.has(this.names[i]) && (part.dataset.name = this.names[i].toLowerCase()));
    return row;
  }

  async fetchAll() {
    const found = [];
    for (let more = true, after = ""; more && found.length < 1000; after = `&after=${found.at(-1)?.id}`) {
      const page = await get(`${this.address}${this.path}?limit=100${after}`);
      found.push(...page.data);
      more = page.has_more;
    }
    return this.newestFirst ? found.reverse() : found;
  }
}

/** Creates a cell; a narrow window hides it if it has no value. */
export function cell(value, kind = "", title = null) {
  const words = value ?? NONE;
  return h("td", { class: words === NONE ? `${kind} empty-cell` : kind, title }, words);
}

export const changeMark = (job) => `${job.status} ${job.attempt} ${job.checkpoint?.step} ${job.alerts.length}`;

/** Runs the action of a button and shows an error above the table. */
export async function runAction(listing, work) {
  setText(listing.error, "");
  try {
    await work();
  } catch (error) {
    setText(listing.error, error instanceof ApiError ? [error.message, ...error.errors.map((one) => `${one.pointer}: ${one.message}`)].join(" ") : error.message);
  }
}
