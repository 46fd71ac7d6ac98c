// List of any number of text lines that renders only the visible ones. The scroll position is stable while lines are added.
import { h, setAttr, setText, updateList } from "../dom.js";

const LINE_HEIGHT = 18; // px; the same as in job.css
const MAX_HEIGHT = 12_000_000; // px; browsers limit the height of an element
const OVERSCAN = 30;

export class VirtualList {
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
    if (this.onPick) setAttr(part.firstChild, "aria-label", line ? `Show line ${line.number} in context` : null);
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
  const found = [];
  let at = 0;
  for (let hit = folded.indexOf(wanted); hit >= 0; hit = folded.indexOf(wanted, at)) {
    found.push(value.slice(at, hit), h("mark", {}, value.slice(hit, hit + needle.length)));
    at = hit + needle.length;
  }
  return [...found, value.slice(at)];
}

/** The service also folds ASCII letters only, so that offsets are equal. */
const asciiLower = (value) => value.replace(/[A-Z]+/g, (letters) => letters.toLowerCase());
