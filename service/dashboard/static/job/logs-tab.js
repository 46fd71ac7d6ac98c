// A rank's log: any part of it by line numbers, its end as it is written, and a search through all of it.
import { Refused, get, query } from "../api.js";
import { h, list, show, text } from "../dom.js";
import { bytes, count } from "../format.js";
import { keep, kept } from "../router.js";
import { LineView } from "./virtual-list.js";

const PAGE = 250;
const KEPT_PAGES = 80;
const MOST_MATCHES = 10_000;
const TYPING_MS = 300;

export class Logs {
  constructor(place, address) {
    this.address = `${address}/logs`;
    this.attempt = h("select", { id: "attempt", onchange: () => this.chosen("attempt", this.attempt.value) });
    this.rank = h("select", { id: "rank", onchange: () => this.chosen("rank", this.rank.value) });
    this.search = h("input", { id: "grep", type: "search", placeholder: "Search the whole log", "aria-label": "Search the whole log", maxlength: "200", value: kept("grep") ?? "" });
    this.follow = h("input", { id: "follow", type: "checkbox", checked: !kept("line") });
    this.note = h("span", { class: "muted", role: "status" });
    this.log = new LineView("Log", { onEnd: (isEnd) => this.scrolled(isEnd), sticks: () => this.follow.checked });
    this.found = new LineView("Lines that match", { onPick: (number) => this.goTo(number) });
    this.bar = h("div", { class: "bar" }, h("label", { for: "attempt" }, "Attempt"), this.attempt, h("label", { for: "rank" }, "Rank"), this.rank,
      this.search, h("label", { for: "follow" }, "Follow"), this.follow, this.note);
    place.append(this.bar, this.log.node, this.found.node);
    show(this.found.node, false);
    this.search.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.seek(), TYPING_MS);
    });
    this.follow.addEventListener("change", () => this.follow.checked && (keep("line", null), this.log.toEnd(), this.look()));
    this.anew();
  }

  scrolled(isEnd) {
    this.follow.checked = isEnd;
    if (isEnd) keep("line", null);
  }

  /** Another log: nothing of the one before is kept. */
  anew() {
    Object.assign(this, { pages: new Map(), loading: new Set(), stale: new Set(), span: [0, 0] });
    Object.assign(this, { total: 0, size: 0, matches: [], searched: 0, sought: "", number: (this.number ?? 0) + 1 });
    this.abort?.abort();
    this.abort = new AbortController();
    this.log.show(this.source());
  }

  chosen(name, value) {
    keep(name, value === (name === "rank" ? "0" : "") ? null : value);
    keep("line", null);
    this.follow.checked = true;
    this.anew();
    this.look().then(() => this.seek());
  }

  async update(job) {
    const changed = this.job?.attempt !== job.attempt;
    this.job = job;
    if (changed) this.offer(job);
    if (!job.attempt) return this.tell("Not launched yet.");
    if (changed && !this.attempt.value) this.anew();
    await this.look();
    if (changed) await this.arrive();
  }

  offer(job) {
    const numbers = Array.from({ length: job.attempt ?? 0 }, (_, i) => String(job.attempt - i));
    const whose = [...Array.from({ length: ranks(job) }, (_, i) => String(i)), "agent"];
    const fill = (node, values, wanted) => {
      list(node, values, ([value]) => value, ([value, words]) => h("option", { value }, words));
      node.value = values.some(([value]) => value === wanted) ? wanted : values[0][0];
    };
    fill(this.attempt, [["", "newest"], ...numbers.map((one) => [one, one])], this.attempt.value || (kept("attempt") ?? ""));
    fill(this.rank, whose.map((one) => [one, one]), this.rank.value || (kept("rank") ?? "0"));
  }

  /** What the address asks for, once the log is here. */
  async arrive() {
    if (this.search.value) await this.seek();
    else if (kept("line")) this.goTo(Number(kept("line")));
  }

  where() {
    return { attempt: this.attempt.value || this.job.attempt, rank: this.rank.value };
  }

  /** How many lines there are now; those that are seen are asked for as they are drawn. */
  async look() {
    if (this.looking || !this.job?.attempt) return;
    this.looking = true;
    const { number } = this;
    try {
      const found = await get(query(`${this.address}/lines`, { ...this.where(), count: 0 }));
      if (number === this.number) this.grow(found);
    } catch (error) {
      if (!(error instanceof Refused)) return;
      this.tell(error.code === "log_not_found" ? "Nothing has been printed yet." : error.message);
    } finally {
      this.looking = false;
    }
  }

  grow({ total_lines: total, bytes: size }) {
    if (size !== this.size) {
      if (size < this.size) this.pages.clear();
      // The last line may have been written on.
      this.stale.add(this.pageOf(this.total - 1));
      Object.assign(this, { total, size });
      this.log.grown();
      if (this.follow.checked && !kept("line")) this.log.toEnd();
      if (this.sought && this.ended) this.seekOn();
    }
    if (!this.sought) this.tell(`${count(total)} ${total === 1 ? "line" : "lines"}, ${bytes(size)}`);
  }

  source() {
    const self = this;
    return {
      get total() {
        return self.total;
      },
      at: (i) => {
        const line = self.pages.get(self.pageOf(i))?.[i % PAGE];
        return line === undefined ? null : { number: i + 1, text: line };
      },
      want: (from, to) => self.want(from, to),
    };
  }

  pageOf(i) {
    return Math.floor(Math.max(0, i) / PAGE);
  }

  want(from, to) {
    this.span = [this.pageOf(from), this.pageOf(to - 1)];
    for (let page = this.span[0]; page <= this.span[1]; page++) {
      const isWhole = (this.pages.get(page)?.length ?? 0) >= Math.min(PAGE, this.total - page * PAGE);
      if ((!isWhole || this.stale.has(page)) && !this.loading.has(page)) this.fetch(page);
    }
  }

  /** One page, where it still is wanted after a moment: somebody may scroll over thousands. */
  async fetch(page) {
    const { number, loading, pages } = this;
    loading.add(page);
    try {
      await new Promise((done) => setTimeout(done, 40));
      if (page < this.span[0] || page > this.span[1] || number !== this.number) return;
      this.stale.delete(page);
      const { lines } = await get(query(`${this.address}/lines`, { ...this.where(), first: page * PAGE + 1, count: PAGE }), { signal: this.abort.signal });
      pages.delete(page);
      pages.set(page, lines.map(legible));
      if (pages.size > KEPT_PAGES) pages.delete(pages.keys().next().value);
    } catch {
      this.stale.add(page);
      await new Promise((done) => setTimeout(done, 1000));
    } finally {
      loading.delete(page);
    }
    if (number === this.number) this.log.draw();
  }

  async seek() {
    const wanted = this.search.value.trim();
    keep("grep", wanted);
    if (wanted === this.sought) return;
    Object.assign(this, { sought: wanted, matches: [], searched: 0, ended: false, quest: (this.quest ?? 0) + 1 });
    show(this.found.node, wanted);
    show(this.log.node, !wanted);
    if (!wanted) {
      this.log.draw();
      return this.grow({ total_lines: this.total, bytes: this.size });
    }
    this.found.needle = wanted;
    const { matches } = this;
    this.found.show({ get total() { return matches.length; }, get largest() { return matches.at(-1)?.number ?? 0; }, at: (i) => matches[i] ?? null, want: () => {} });
    await this.seekOn();
  }

  /** The rest of the log, piece by piece; also what is written later. */
  async seekOn() {
    const { quest, sought, matches } = this;
    this.ended = false;
    try {
      while (!this.ended && matches.length < MOST_MATCHES) {
        const found = await get(query(`${this.address}/search`, { ...this.where(), q: sought, after_line: this.searched, limit: 1000 }), { signal: this.abort.signal });
        if (quest !== this.quest) return;
        matches.push(...found.data.map((one) => ({ number: one.line, text: legible(one.text) })));
        Object.assign(this, { searched: found.searched_lines, ended: !found.has_more });
        this.found.grown();
        this.tell(this.soughtWords());
      }
    } catch (error) {
      if (quest === this.quest) this.tell(error.message);
    }
  }

  soughtWords() {
    const many = this.matches.length;
    if (many >= MOST_MATCHES) return `The first ${count(many)} lines that have it`;
    const words = `${count(many)} of ${count(this.searched)} lines ${many === 1 ? "has" : "have"} it`;
    return this.ended ? words : `${words}, searching on`;
  }

  /** A line in its place among the others; its number stays in the address. */
  goTo(number) {
    this.search.value = "";
    keep("line", number);
    this.follow.checked = false;
    this.log.marked = number;
    this.seek();
    show(this.found.node, false);
    show(this.log.node, true);
    this.log.grown();
    this.log.toLine(number - 1);
    this.log.node.focus({ preventScroll: true });
  }

  tell(words) {
    text(this.note, words);
  }

  close() {
    clearTimeout(this.typing);
    this.abort.abort();
    this.number += 1;
    this.quest += 1;
    this.log.close();
    this.found.close();
  }
}

/** What was launched; before that, what was asked for. */
const ranks = ({ plan, spec: { resources } }) => Math.max(plan.world_size ?? 1, resources.nproc_per_node * (resources.nnodes.max ?? resources.nnodes));

// eslint-disable-next-line no-control-regex -- colours of terminals, and lines that were written over
const CODES = /\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*(\x07|\x1b\\)/g;

/** A line without a terminal's codes; of one that was written over its newest state. */
function legible(line) {
  const plain = line.replace(CODES, "");
  return plain.slice(plain.lastIndexOf("\r") + 1);
}
