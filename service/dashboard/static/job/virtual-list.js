// A box that shows any number of lines and holds only those that are seen. What is read stays where it is while lines come.
import { attr, h, list, text } from "../dom.js";

const LINE = 18; // px; styles.css says the same
const TALLEST = 12_000_000; // px: browsers cut taller boxes off
const AROUND = 30;

export class LineView {
  /** `onEnd(isAtEnd)` is told where the reader scrolled to; `onPick(number)` which number was pressed; `sticks()`: the end stays in sight. */
  constructor(name, { onEnd = () => {}, onPick = null, sticks = () => false } = {}) {
    this.onPick = onPick;
    this.rows = h("div", { class: "rows" });
    this.space = h("div", { class: "space" }, this.rows);
    this.node = h("div", { class: "log", tabindex: "0", role: "region", "aria-label": name }, this.space);
    this.source = { total: 0, at: () => null, want: () => {} };
    this.widest = 0;
    this.node.addEventListener("scroll", () => {
      if (this.node.scrollTop !== this.put) onEnd(this.isAtEnd());
      this.put = null;
      this.draw();
    });
    this.sized = new ResizeObserver(() => (sticks() ? this.toEnd() : this.draw()));
    this.sized.observe(this.node);
  }

  /** Lines from `source`: `total`, `largest` number, `at(i)` as `{number, text}` or null while it is not here, `want(from, to)` asks for some. */
  show(source) {
    this.source = source;
    this.widest = 0;
    this.rows.style.minWidth = "100%";
    this.grown();
  }

  /** There are more lines, or others. */
  grown() {
    const before = this.scale;
    const top = this.first();
    // Only now and then: what is read would move by a hair each time.
    const height = this.source.total * LINE;
    if (!before || height * before > TALLEST * 1.1 || this.source.total < this.most) this.scale = Math.min(1, TALLEST / Math.max(1, height));
    this.most = this.source.total;
    this.space.style.height = `${Math.ceil(this.source.total * LINE * this.scale)}px`;
    if (before && before !== this.scale) this.scrollTo(top * LINE * this.scale);
    this.draw();
  }

  first() {
    return this.node.scrollTop / (LINE * (this.scale ?? 1));
  }

  isAtEnd() {
    return this.node.scrollTop + this.node.clientHeight >= this.node.scrollHeight - LINE;
  }

  toEnd() {
    if (!this.isSelected()) this.scrollTo(this.node.scrollHeight - this.node.clientHeight);
  }

  /** Brings the line with index `i` into the upper third. */
  toLine(i) {
    this.scrollTo(Math.max(0, (i - 6) * LINE * this.scale));
  }

  scrollTo(place) {
    const wanted = Math.max(0, Math.round(place));
    if (Math.abs(this.node.scrollTop - wanted) > 1) this.node.scrollTop = wanted;
    this.put = this.node.scrollTop;
    this.draw();
  }

  /** Whether somebody selects text in it: then it stays where it is. */
  isSelected() {
    const chosen = getSelection();
    return !chosen.isCollapsed && this.node.contains(chosen.anchorNode);
  }

  draw() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      this.drawNow();
    });
  }

  drawNow() {
    const { source, node } = this;
    const top = this.first();
    const seen = Math.ceil(node.clientHeight / LINE) + 1;
    const from = Math.max(0, Math.floor(top) - AROUND);
    const to = Math.min(source.total, Math.floor(top) + seen + AROUND);
    source.want(from, to);
    const wanted = [];
    for (let i = from; i < to; i++) wanted.push([i, source.at(i)]);
    this.rows.style.top = `${node.scrollTop - (top - from) * LINE}px`;
    this.rows.style.setProperty("--digits", `${String(source.largest ?? source.total).length}ch`);
    list(this.rows, wanted, ([i]) => i, () => this.row(), (part, [i, line]) => this.fill(part, i, line));
    this.widest = Math.max(this.widest, this.rows.scrollWidth);
    this.rows.style.minWidth = `max(100%, ${this.widest}px)`;
  }

  row() {
    const number = this.onPick ? h("button", { type: "button", class: "at", onclick: () => this.onPick(part.number) }) : h("span", { class: "at" });
    const part = h("div", { class: "line" }, number, h("span", { class: "words" }));
    return part;
  }

  fill(part, i, line) {
    part.number = line?.number ?? null;
    text(part.firstChild, line ? String(line.number) : "");
    if (this.onPick) attr(part.firstChild, "aria-label", line ? `Show line ${line.number} in its place` : null);
    attr(part, "class", line && line.number === this.marked ? "line marked" : "line");
    write(part.lastChild, line ? line.text : "…", this.needle);
  }

  close() {
    this.sized.disconnect();
    cancelAnimationFrame(this.drawing);
  }
}

/** The text with each place of `needle` marked; nothing is touched where nothing changed. */
function write(node, said, needle) {
  const mark = `${needle ?? ""}\n${said}`;
  if (node.said === mark) return;
  node.said = mark;
  if (!needle) {
    text(node, said);
    return;
  }
  node.replaceChildren(...pieces(said, needle));
}

function pieces(said, needle) {
  const [folded, wanted] = [lower(said), lower(needle)];
  const found = [];
  let at = 0;
  for (let hit = folded.indexOf(wanted); hit >= 0; hit = folded.indexOf(wanted, at)) {
    found.push(said.slice(at, hit), h("mark", {}, said.slice(hit, hit + needle.length)));
    at = hit + needle.length;
  }
  return [...found, said.slice(at)];
}

/** As the service folds: ASCII letters alone, so that places stay. */
const lower = (said) => said.replace(/[A-Z]+/g, (letters) => letters.toLowerCase());
