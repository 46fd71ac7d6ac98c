// Log of a rank: loads pages of lines around the scroll position, follows the end, and searches the whole file.
import { ApiError, get, withQuery } from "../api.js";
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { bytes, count } from "../format.js";
import { t, tn } from "../i18n.js";
import { getParam, setParam } from "../router.js";

// List of any number of text lines that renders only the visible ones. The scroll position is stable while lines are added.

const LINE_HEIGHT = 18; // px; the same as in job.css
const MAX_HEIGHT = 12_000_000; // px; browsers limit the height of an element
const OVERSCAN = 30;

class VirtualList {
  /** `onEnd(isAtEnd)`: called after the user scrolled; `onPick(number)`: called when a line number is pressed; `isFollowing()`: whether to stay at the end. */
  constructor(name, { onEnd = () => {}, onPick = null, isFollowing = () => false } = {}) {
    this.onPick = onPick;
    this.rows = h("div", { class: "rows" });
    this.space = h("div", { class: "space" }, this.rows);
    this.node = h("div", { class: "log", tabindex: "0", role: "region", "aria-label": name }, this.space);
    this.source = { total: 0, at: () => null, want: () => {} };
    this.widest = 0;
    this.node.addEventListener("scroll", () => {
      if (this.node.scrollTop !== this.ownScrollTop) onEnd(this.isAtEnd());
      this.ownScrollTop = null;
      this.draw();
    });
    this.resizeObserver = new ResizeObserver(() => (isFollowing() ? this.scrollToEnd() : this.draw()));
    this.resizeObserver.observe(this.node);
  }

  /** Shows lines of `source`: `total`, `largest` number, `at(i)` returns `{number, text}` or null if not loaded, `want(from, to)` requests lines. */
  show(source) {
    this.source = source;
    this.widest = 0;
    this.rows.style.minWidth = "100%";
    this.refresh();
  }

  /** Call after the number of lines changed. */
  refresh() {
    const before = this.scale;
    const top = this.firstVisible();
    // Rescale rarely: each change moves the visible lines slightly.
    const height = this.source.total * LINE_HEIGHT;
    if (!before || height * before > MAX_HEIGHT * 1.1 || this.source.total < this.lastTotal) this.scale = Math.min(1, MAX_HEIGHT / Math.max(1, height));
    this.lastTotal = this.source.total;
    this.space.style.height = `${Math.ceil(this.source.total * LINE_HEIGHT * this.scale)}px`;
    if (before && before !== this.scale) this.scrollTo(top * LINE_HEIGHT * this.scale);
    this.draw();
  }

  firstVisible() {
    return this.node.scrollTop / (LINE_HEIGHT * (this.scale ?? 1));
  }

  isAtEnd() {
    return this.node.scrollTop + this.node.clientHeight >= this.node.scrollHeight - LINE_HEIGHT;
  }

  scrollToEnd() {
    if (!this.isSelected()) this.scrollTo(this.node.scrollHeight - this.node.clientHeight);
  }

  /** Scrolls so that the line with index `i` is in the upper third. */
  scrollToLine(i) {
    this.scrollTo(Math.max(0, (i - 6) * LINE_HEIGHT * this.scale));
  }

  scrollTo(place) {
    const wanted = Math.max(0, Math.round(place));
    if (Math.abs(this.node.scrollTop - wanted) > 1) this.node.scrollTop = wanted;
    this.ownScrollTop = this.node.scrollTop;
    this.draw();
  }

  /** Whether the user has selected text in the list: then it must not scroll. */
  isSelected() {
    const chosen = getSelection();
    return !chosen.isCollapsed && this.node.contains(chosen.anchorNode);
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.drawNow();
    });
  }

  drawNow() {
    const { source, node } = this;
    const top = this.firstVisible();
    const seen = Math.ceil(node.clientHeight / LINE_HEIGHT) + 1;
    const from = Math.max(0, Math.floor(top) - OVERSCAN);
    const to = Math.min(source.total, Math.floor(top) + seen + OVERSCAN);
    source.want(from, to);
    const wanted = [];
    for (let i = from; i < to; i++) wanted.push([i, source.at(i)]);
    this.rows.style.top = `${node.scrollTop - (top - from) * LINE_HEIGHT}px`;
    this.rows.style.setProperty("--digits", `${String(source.largest ?? source.total).length}ch`);
    updateList(this.rows, wanted, ([i]) => i, () => this.row(), (part, [i, line]) => this.fill(part, i, line));
    this.widest = Math.max(this.widest, this.rows.scrollWidth);
    this.rows.style.minWidth = `max(100%, ${this.widest}px)`;
  }

  row() {
    const number = this.onPick ? h("button", { type: "button", class: "line-number", onclick: () => this.onPick(part.number) }) : h("span", { class: "line-number" });
    const part = h("div", { class: "line" }, number, h("span", { class: "line-text" }));
    return part;
  }

  fill(part, i, line) {
    part.number = line?.number ?? null;
    setText(part.firstChild, line ? String(line.number) : "");
    if (this.onPick) setAttr(part.firstChild, "aria-label", line ? t("Show line {n} in context", { n: line.number }) : null);
    setAttr(part, "class", line && line.number === this.highlighted ? "line highlighted" : "line");
    highlight(part.lastChild, line ? line.text : "…", this.needle);
  }

  close() {
    this.resizeObserver.disconnect();
    cancelAnimationFrame(this.frame);
  }
}

/** Writes the text with all matches of `needle` highlighted, if anything changed. */
function highlight(node, value, needle) {
  const mark = `${needle ?? ""}\n${value}`;
  if (node.shownMark === mark) return;
  node.shownMark = mark;
  if (!needle) {
    setText(node, value);
    return;
  }
  node.replaceChildren(...splitMatches(value, needle));
}

function splitMatches(value, needle) {
  const [folded, wanted] = [asciiLower(value), asciiLower(needle)];
  const parts = [];
  let at = 0;
  for (let hit = folded.indexOf(wanted); hit >= 0; hit = folded.indexOf(wanted, at)) {
    parts.push(value.slice(at, hit), h("mark", {}, value.slice(hit, hit + needle.length)));
    at = hit + needle.length;
  }
  return [...parts, value.slice(at)];
}

/** The service also folds ASCII letters only, so that offsets are equal. */
const asciiLower = (value) => value.replace(/[A-Z]+/g, (letters) => letters.toLowerCase());

const PAGE_LINES = 250;
const MAX_PAGES = 80;
const MAX_MATCHES = 10_000;
const DEBOUNCE_MS = 300;

export class LogsTab {
  constructor(place, address) {
    this.address = `${address}/logs`;
    this.attempt = h("select", { id: "attempt", onchange: () => this.onSelect("attempt", this.attempt.value) });
    this.rank = h("select", { id: "rank", onchange: () => this.onSelect("rank", this.rank.value) });
    this.search = h("input", { id: "grep", type: "search", placeholder: t("Search the whole log"), "aria-label": t("Search the whole log"), maxlength: "200", value: getParam("grep") ?? "" });
    this.follow = h("input", { id: "follow", type: "checkbox", checked: !getParam("line") });
    this.note = h("span", { class: "muted", role: "status" });
    this.view = new VirtualList(t("Log"), { onEnd: (isEnd) => this.scrolled(isEnd), isFollowing: () => this.follow.checked });
    this.matchList = new VirtualList(t("Matching lines"), { onPick: (number) => this.goTo(number) });
    this.bar = h("div", { class: "bar" }, h("label", { for: "attempt" }, t("Attempt")), this.attempt, h("label", { for: "rank" }, t("Rank")), this.rank,
      this.search, h("label", { for: "follow" }, t("Follow")), this.follow, this.note);
    place.append(this.bar, this.view.node, this.matchList.node);
    setVisible(this.matchList.node, false);
    this.search.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.startSearch(), DEBOUNCE_MS);
    });
    this.follow.addEventListener("change", () => this.follow.checked && (setParam("line", null), this.view.scrollToEnd(), this.poll()));
    this.reset();
  }

  scrolled(isEnd) {
    this.follow.checked = isEnd;
    if (isEnd) setParam("line", null);
  }

  /** Drops everything loaded from the previous log. */
  reset() {
    Object.assign(this, { pages: new Map(), loading: new Set(), stale: new Set(), span: [0, 0] });
    Object.assign(this, { total: 0, size: 0, matches: [], searched: 0, searchedFor: "", number: (this.number ?? 0) + 1 });
    this.abort?.abort();
    this.abort = new AbortController();
    this.view.show(this.source());
  }

  onSelect(name, value) {
    setParam(name, value === (name === "rank" ? "0" : "") ? null : value);
    setParam("line", null);
    this.follow.checked = true;
    this.reset();
    this.poll().then(() => this.startSearch());
  }

  async update(job) {
    const changed = this.job?.attempt !== job.attempt;
    this.job = job;
    if (changed) this.fillSelects(job);
    if (!job.attempt) return this.setNote(t("Not launched yet."));
    if (changed && !this.attempt.value) this.reset();
    await this.poll();
    if (changed) await this.applyUrl();
  }

  fillSelects(job) {
    const numbers = Array.from({ length: job.attempt ?? 0 }, (_, i) => String(job.attempt - i));
    const logNames = [...Array.from({ length: rankCount(job) }, (_, i) => String(i)), "agent"];
    const fill = (node, values, wanted) => {
      updateList(node, values, ([value]) => value, ([value, label]) => h("option", { value }, label));
      node.value = values.some(([value]) => value === wanted) ? wanted : values[0][0];
    };
    fill(this.attempt, [["", t("newest")], ...numbers.map((choice) => [choice, choice])], this.attempt.value || (getParam("attempt") ?? ""));
    fill(this.rank, logNames.map((choice) => [choice, choice === "agent" ? t("agent") : choice]), this.rank.value || (getParam("rank") ?? "0"));
  }

  /** Applies the search or line number of the URL after the log is loaded. */
  async applyUrl() {
    if (this.search.value) await this.startSearch();
    else if (getParam("line")) this.goTo(Number(getParam("line")));
  }

  logQuery() {
    return { attempt: this.attempt.value || this.job.attempt, rank: this.rank.value };
  }

  /** Reads the number of lines. Lines themselves are loaded when they are drawn. */
  async poll() {
    if (this.isPolling || !this.job?.attempt) return;
    this.isPolling = true;
    const { number } = this;
    try {
      const size = await get(withQuery(`${this.address}/lines`, { ...this.logQuery(), count: 0 }));
      if (number !== this.number) return;
      this.setSize(size);
      if (this.searchFailed) this.continueSearch();
    } catch (error) {
      if (!(error instanceof ApiError)) return;
      this.setNote(error.code === "log_not_found" ? t("Nothing has been printed yet.") : error.message);
    } finally {
      this.isPolling = false;
    }
  }

  setSize({ total_lines: total, bytes: size }) {
    if (size !== this.size) {
      if (size < this.size) this.pages.clear();
      // The last line may have been incomplete.
      this.stale.add(this.pageOf(this.total - 1));
      Object.assign(this, { total, size });
      this.view.refresh();
      if (this.follow.checked && !getParam("line")) this.view.scrollToEnd();
      if (this.searchedFor && this.isSearchDone) this.continueSearch();
    }
    if (!this.searchedFor) this.setNote(tn(total, "{n} line, {size}", "{n} lines, {size}", { n: count(total), size: bytes(size) }));
  }

  source() {
    const self = this;
    return {
      get total() {
        return self.total;
      },
      at: (i) => {
        const line = self.pages.get(self.pageOf(i))?.[i % PAGE_LINES];
        return line === undefined ? null : { number: i + 1, text: line };
      },
      want: (from, to) => self.loadPages(from, to),
    };
  }

  pageOf(i) {
    return Math.floor(Math.max(0, i) / PAGE_LINES);
  }

  loadPages(from, to) {
    this.span = [this.pageOf(from), this.pageOf(to - 1)];
    for (let page = this.span[0]; page <= this.span[1]; page++) {
      const isWhole = (this.pages.get(page)?.length ?? 0) >= Math.min(PAGE_LINES, this.total - page * PAGE_LINES);
      if ((!isWhole || this.stale.has(page)) && !this.loading.has(page)) this.fetch(page);
    }
  }

  /** Loads a page if it is still visible after 40 ms: a user may scroll past thousands. */
  async fetch(page) {
    const { number, loading, pages } = this;
    loading.add(page);
    try {
      await new Promise((done) => setTimeout(done, 40));
      if (page < this.span[0] || page > this.span[1] || number !== this.number) return;
      this.stale.delete(page);
      const { lines } = await get(withQuery(`${this.address}/lines`, { ...this.logQuery(), first: page * PAGE_LINES + 1, count: PAGE_LINES }), { signal: this.abort.signal });
      pages.delete(page);
      pages.set(page, lines.map(plainLine));
      if (pages.size > MAX_PAGES) pages.delete(pages.keys().next().value);
    } catch {
      this.stale.add(page);
      await new Promise((done) => setTimeout(done, 1000));
    } finally {
      loading.delete(page);
    }
    if (number === this.number) this.view.draw();
  }

  async startSearch() {
    const wanted = this.search.value.trim();
    setParam("grep", wanted);
    if (wanted === this.searchedFor) return;
    Object.assign(this, { searchedFor: wanted, matches: [], searched: 0, isSearchDone: false, searchFailed: false, searchNumber: (this.searchNumber ?? 0) + 1 });
    setVisible(this.matchList.node, wanted);
    setVisible(this.view.node, !wanted);
    if (!wanted) {
      this.view.draw();
      return this.setSize({ total_lines: this.total, bytes: this.size });
    }
    this.matchList.needle = wanted;
    const { matches } = this;
    this.matchList.show({ get total() { return matches.length; }, get largest() { return matches.at(-1)?.number ?? 0; }, at: (i) => matches[i] ?? null, want: () => {} });
    await this.continueSearch();
  }

  /** Searches the rest of the log in steps; called again when the log has grown. */
  async continueSearch() {
    const { searchNumber, searchedFor, matches } = this;
    this.isSearchDone = false;
    this.searchFailed = false;
    try {
      while (!this.isSearchDone && matches.length < MAX_MATCHES) {
        const page = await get(withQuery(`${this.address}/search`, { ...this.logQuery(), q: searchedFor, after_line: this.searched, limit: 1000 }), { signal: this.abort.signal });
        if (searchNumber !== this.searchNumber) return;
        matches.push(...page.data.map((match) => ({ number: match.line, text: plainLine(match.text) })));
        Object.assign(this, { searched: page.searched_lines, isSearchDone: !page.has_more });
        this.matchList.refresh();
        this.setNote(this.searchNote());
      }
    } catch (error) {
      if (searchNumber !== this.searchNumber) return;
      this.searchFailed = Boolean(searchedFor); // the next poll tries again
      this.setNote(error.message);
    }
  }

  searchNote() {
    const matchCount = this.matches.length;
    if (matchCount >= MAX_MATCHES) return t("The first {n} matching lines", { n: count(matchCount) });
    const text = tn(matchCount, "{n} matching line in {searched}", "{n} matching lines in {searched}", { n: count(matchCount), searched: count(this.searched) });
    return this.isSearchDone ? text : t("{found}, still searching", { found: text });
  }

  /** Shows a line in context; its number is kept in the URL. */
  goTo(number) {
    this.search.value = "";
    setParam("line", number);
    this.follow.checked = false;
    this.view.highlighted = number;
    this.startSearch();
    setVisible(this.matchList.node, false);
    setVisible(this.view.node, true);
    this.view.refresh();
    this.view.scrollToLine(number - 1);
    this.view.node.focus({ preventScroll: true });
  }

  setNote(text) {
    setText(this.note, text);
  }

  close() {
    clearTimeout(this.typing);
    this.abort.abort();
    this.number += 1;
    this.searchNumber += 1;
    this.view.close();
    this.matchList.close();
  }
}

/** The world size of the launched run, or the requested one before the launch. */
const rankCount = ({ plan, spec: { resources } }) => Math.max(plan.world_size ?? 1, resources.nproc_per_node * (resources.nnodes.max ?? resources.nnodes));

// eslint-disable-next-line no-control-regex -- terminal escape codes
const ANSI_CODES = /\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*(\x07|\x1b\\)/g;

/** Removes terminal codes; of a line rewritten with carriage returns, keeps the newest state. */
function plainLine(line) {
  const plain = line.replace(ANSI_CODES, "");
  return plain.slice(plain.lastIndexOf("\r") + 1);
}
