// The table of jobs. Only the rows in view are in the document, so a thousand jobs scroll like ten. Elements of rows that leave the view show those that enter it.
import { h, setAttr, setText, setVisible } from "../dom.js";
import { ago, count, dateTime } from "../format.js";
import { NAME_COLUMN } from "./columns.js";
import { t } from "../i18n.js";

const ROW_HEIGHT = 46; // px, as in workspace.css
const OVERSCAN = 6; // rows above and below the view
const PICK_WIDTH = 52;

export class JobTable {
  /** `on`: `sort(key)`, `choose(row, wanted)`, `toggle(row)` opens or closes a fold, `move()` is called when other rows are in view. */
  constructor(on) {
    this.on = on;
    this.rows = [];
    this.columns = [];
    this.parts = new Map(); // elements of the rows in the document, by key
    this.version = 0; // of what `show` was given: a row that has it needs no update
    this.columnNodes = h("colgroup");
    this.head = h("tr");
    this.body = h("tbody", { class: "jobs" });
    [this.above, this.below] = [spacer(), spacer()];
    this.table = h("table", { class: "runs-table" }, h("caption", { class: "visually-hidden" }, t("Jobs")), this.columnNodes, h("thead", {}, this.head), this.above, this.body, this.below);
    this.node = h("div", { class: "scroll runs", tabindex: "0", role: "region", "aria-label": t("Jobs") }, this.table);
    this.node.addEventListener("scroll", () => this.onScroll(), { passive: true });
    // Its height is read here: in the middle of a redraw it would cost a layout.
    this.height = 0;
    this.onResize = new ResizeObserver(() => {
      this.height = this.node.clientHeight;
      this.drawRows();
    });
    this.onResize.observe(this.node);
  }

  /** Shows rows `{key, jobs, name, depth, open, style}`. `style`: color and dash of the row's curve, or null if it is not chosen. */
  show({ rows, columns, sort, isFull, context }) {
    [this.rows, this.isFull, this.context] = [rows, isFull, context];
    const keys = columns.map((column) => column.key).join();
    if (keys !== this.columnKeys) this.setColumns(columns, keys);
    for (const [key, { head, mark }] of this.heads) {
      setAttr(head, "aria-sort", sort?.key !== key ? null : sort.descending ? "descending" : "ascending");
      setText(mark, sort?.key !== key ? "" : sort.descending ? " ↓" : " ↑");
    }
    setAttr(this.table, "aria-rowcount", rows.length + 1);
    this.refresh();
  }

  setColumns(columns, keys) {
    [this.columns, this.columnKeys] = [columns, keys];
    this.heads = new Map();
    const cells = [NAME_COLUMN, ...columns].map((column) => {
      const mark = h("span", { "aria-hidden": "true" });
      const label = column.key === "curve" ? h("span", { class: "sort" }, column.label) : h("button", { type: "button", class: "quiet sort", title: column.hint, onclick: () => this.on.sort(column.key) }, column.label, mark);
      const head = h("th", { scope: "col", class: column.numeric ? "num" : "" }, label);
      this.heads.set(column.key, { head, mark });
      return head;
    });
    this.head.replaceChildren(h("td", { class: "pick" }), ...cells);
    const widths = columns.map((column) => column.width);
    this.columnNodes.replaceChildren(sizedColumn(PICK_WIDTH), h("col", { class: "name-column" }), ...widths.map(sizedColumn));
    this.table.style.minWidth = `calc(${widths.reduce((sum, width) => sum + width, PICK_WIDTH)}px + var(--name-width))`;
    this.parts.clear();
    this.body.replaceChildren();
  }

  onScroll() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.scrollTop = this.node.scrollTop;
      if (this.inView().join() !== this.drawn) {
        this.drawRows();
        this.on.move();
      }
    });
  }

  /** Returns the indexes of the first row to draw, and of the one after the last. */
  inView() {
    const most = Math.ceil((this.height || innerHeight) / ROW_HEIGHT) + 2 * OVERSCAN;
    const first = Math.max(0, Math.min(Math.floor((this.scrollTop ?? 0) / ROW_HEIGHT) - OVERSCAN, this.rows.length - most));
    return [first, Math.min(this.rows.length, first + most)];
  }

  /** Updates all rows in view: what they show may have changed. */
  refresh() {
    this.version += 1;
    this.drawRows();
  }

  drawRows() {
    const [first, end] = this.inView();
    this.drawn = [first, end].join();
    const shown = this.rows.slice(first, end);
    const free = this.takeOutOfView(shown);
    setHeight(this.above, first * ROW_HEIGHT);
    setHeight(this.below, (this.rows.length - end) * ROW_HEIGHT);
    let place = this.body.firstChild;
    shown.forEach((row, i) => {
      let part = this.parts.get(row.key);
      if (!part) {
        part = free.get(row.jobs.length > 1).pop() ?? this.createRow(row);
        this.parts.set(row.key, part);
      }
      if (part.version !== this.version || part.row !== row) {
        this.updateRow(part, row);
        part.version = this.version;
      }
      setAttr(part, "aria-rowindex", first + i + 2);
      // Rows that go to the other end of the table are in the way until then.
      while (place && place !== part && place.isFree) place = place.nextSibling;
      if (part === place) place = place.nextSibling;
      else this.body.insertBefore(part, place);
      part.isFree = false;
    });
    for (const part of [...free.get(false), ...free.get(true)]) part.remove();
  }

  /** Returns the elements whose rows are no longer shown, for use by others: `true` -> those of folds, `false` -> those of single jobs. */
  takeOutOfView(shown) {
    const kinds = new Map(shown.map((row) => [row.key, row.jobs.length > 1]));
    const free = new Map([[true, []], [false, []]]);
    const focused = document.activeElement;
    // The last ones first: the first of them is used first, and need not be moved if all rows are others.
    for (const part of [...this.body.children].reverse()) {
      const isFold = part.row.jobs.length > 1;
      if (kinds.get(part.row.key) === isFold) continue;
      this.parts.delete(part.row.key);
      // The focus must not go on to another job.
      if (part.contains(focused)) part.remove();
      else {
        part.isFree = true;
        free.get(isFold).push(part);
      }
    }
    return free;
  }

  /** Returns the jobs of the rows in view, without folded ones. */
  jobsInView() {
    const [first, end] = this.inView();
    return this.rows.slice(first, end).filter((row) => row.jobs.length === 1).map((row) => row.jobs[0]);
  }

  createRow(row) {
    const isFold = row.jobs.length > 1;
    const parts = {
      box: h("input", { type: "checkbox", onchange: () => this.on.choose(part.row, parts.box.checked) }), swatch: h("span", { class: "swatch", "aria-hidden": "true" }),
      name: isFold ? h("button", { type: "button", class: "fold name", onclick: () => this.on.toggle(part.row) }, h("span", { class: "caret", "aria-hidden": "true" }), h("span")) : h("a", { class: "name" }),
      id: h("code"), made: h("span"),
    };
    const meta = h("span", { class: "detail" }, isFold ? parts.made : [parts.id, " ", parts.made]);
    const cells = this.columns.map((column) => column.create(column));
    const part = Object.assign(h("tr", {}, h("td", { class: "pick" }, parts.box, parts.swatch), h("th", { scope: "row", class: "job-name" }, parts.name, meta), cells), { parts, values: cells });
    return part;
  }

  updateRow(part, row) {
    part.row = row;
    const { parts } = part;
    const [job] = row.jobs;
    const isFold = row.jobs.length > 1;
    setAttr(parts.box, "aria-label", t("Choose {name}", { name: row.name }));
    parts.box.checked = row.chosen === row.jobs.length;
    parts.box.indeterminate = row.chosen > 0 && row.chosen < row.jobs.length;
    parts.box.disabled = this.isFull && row.chosen === 0;
    setVisible(parts.swatch, row.style);
    if (row.style) showSwatch(parts.swatch, row.style);
    part.classList.toggle("member", row.depth > 0);
    if (isFold) {
      setAttr(parts.name, "aria-expanded", String(row.open));
      setText(parts.name.firstChild, row.open ? "▾" : "▸");
      setText(parts.name.lastChild, row.name);
      setText(parts.made, t("{n} jobs", { n: count(row.jobs.length) }));
    } else {
      setAttr(parts.name, "href", `/jobs/${job.id}`);
      setText(parts.name, job.name);
      setText(parts.id, job.id);
      setText(parts.made, ago(job.created_at));
      setAttr(parts.made, "title", dateTime(job.created_at));
    }
    setAttr(parts.name, "title", [row.name.length > 18 ? row.name : "", isFold ? "" : job.description].filter(Boolean).join("\n") || null);
    this.columns.forEach((column, i) => column.update(part.values[i], row, column, this.context));
  }

  /** Moves the focus by some rows, from the row that had it last; scrolls it into view. */
  moveFocus(by) {
    const focused = document.activeElement?.closest?.("tr")?.row ?? null;
    const key = focused?.key ?? this.focusedKey;
    const from = this.rows.findIndex((row) => row.key === key);
    const to = Math.max(0, Math.min(this.rows.length - 1, from < 0 ? 0 : from + by));
    const row = this.rows[to];
    if (!row) return;
    this.focusedKey = row.key;
    const [top, bottom] = [to * ROW_HEIGHT, (to + 1) * ROW_HEIGHT + this.head.offsetHeight];
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    else if (bottom > this.node.scrollTop + this.node.clientHeight) this.node.scrollTop = bottom - this.node.clientHeight;
    this.scrollTop = this.node.scrollTop;
    this.drawRows();
    this.parts.get(row.key)?.parts.box.focus();
  }

  /** Returns the row that has the focus, or null. */
  focusedRow() {
    const part = document.activeElement?.closest?.("tr");
    return part && this.body.contains(part) ? part.row : null;
  }

  close() {
    this.onResize.disconnect();
    cancelAnimationFrame(this.frame);
  }
}

/** Shows the color and the dashes of a curve. */
export function showSwatch(node, { color, dash }) {
  node.style.borderTopColor = color;
  node.style.borderTopStyle = dash === "solid" ? "solid" : dash === "dot" ? "dotted" : "dashed";
}

function sizedColumn(width) {
  const node = h("col");
  node.style.width = `${width}px`;
  return node;
}

const spacer = () => h("tbody", { hidden: true, "aria-hidden": "true" }, h("tr", { class: "space" }, h("td")));

function setHeight(node, height) {
  setVisible(node, height > 0);
  node.firstChild.style.height = `${height}px`;
}
