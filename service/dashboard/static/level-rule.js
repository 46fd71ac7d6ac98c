// A horizontal rule of a chart, moved by pointer or keyboard: when each run reached this loss.
import { xValues } from "./chart-data.js";
import { h, setAttr, setText, setVisible, updateList } from "./dom.js";
import { NONE, compactNumber, count, duration } from "./format.js";
import { t } from "./i18n.js";
import { getParam, setParam } from "./router.js";

const PARAM = "level";
const DIGITS = 4;
const COLUMNS = [[t("Run"), ""], [t("Step"), "num"], [t("Tokens"), "num"], [t("Active time"), "num"]];

/** Returns where the run first is at or below `level`: `{step, tokens, seconds}`, between two points by a straight line; `{lowest}` if it never is. `run`: `{rows, attempts, of}`. Pure. */
export function firstReached(level, { rows, attempts, of }) {
  const measured = rows.filter((row) => Number.isFinite(of(row)));
  const i = measured.findIndex((row) => of(row) <= level);
  if (i < 0) return { lowest: measured.length ? measured.map(of).reduce((a, b) => Math.min(a, b)) : null };
  const row = measured[i];
  const before = measured[i - 1] ?? row;
  const part = row === before ? 1 : (of(before) - level) / (of(before) - of(row));
  const between = (a, b) => (typeof a === "number" && typeof b === "number" ? a + part * (b - a) : null);
  const [from, to] = xValues([before, row], "active", attempts);
  const hours = between(from, to);
  return { step: Math.ceil(between(before.step, row.step)), tokens: between(before.tokens, row.tokens), seconds: hours === null ? null : hours * 3600 };
}

/** The rule of `chart`, whose content has `runs`: [{name, rows, attempts, of}]. The level is kept in the URL. */
export class LevelRule {
  constructor(chart) {
    this.chart = chart;
    const given = Number(getParam(PARAM) ?? NaN);
    this.level = Number.isFinite(given) ? given : null;
    this.button = h("button", { type: "button", class: "quiet", "aria-pressed": "false", title: t("When was this loss reached?"), onclick: () => this.toggle() }, t("level"));
    this.value = h("span", { class: "level-value", "aria-hidden": "true" });
    this.node = h("div", { class: "level-rule", role: "slider", tabindex: "0", "aria-orientation": "vertical", "aria-label": t("Level of {chart}", { chart: chart.name }), hidden: true }, this.value);
    this.body = h("tbody");
    const head = h("tr", {}, COLUMNS.map(([name, kind]) => h("th", { scope: "col", class: kind }, name)));
    this.caption = h("caption");
    this.table = h("table", { class: "reached", hidden: true }, this.caption, h("thead", {}, head), this.body);
    this.node.addEventListener("pointerdown", (event) => this.onPress(event));
    this.node.addEventListener("pointermove", (event) => this.node.hasPointerCapture(event.pointerId) && this.moveTo(event.clientY - this.chart.plot.getBoundingClientRect().top));
    this.node.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** Shows or removes the rule. It starts in the middle of the values. */
  toggle() {
    const axis = this.axis();
    if (this.level !== null) this.set(null);
    else if (axis) {
      this.set(axis.p2d(axis._length / 2));
      this.node.focus();
    }
  }

  axis() {
    return this.chart.plot._fullLayout?.yaxis ?? null;
  }

  set(level) {
    this.level = level === null ? null : Number(level.toPrecision(DIGITS));
    setParam(PARAM, this.level);
    this.update();
  }

  onPress(event) {
    event.preventDefault();
    this.node.focus();
    this.node.setPointerCapture(event.pointerId);
  }

  /** Moves the rule to `y`, in px below the top of the plot. */
  moveTo(y) {
    const axis = this.axis();
    if (axis) this.set(axis.p2d(Math.max(0, Math.min(axis._length, y - axis._offset))));
  }

  onKey(event) {
    const axis = this.axis();
    const by = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: Infinity, End: -Infinity }[event.key];
    if (event.key === "Escape" || event.key === "Delete") {
      this.set(null);
      this.button.focus();
    }
    if (by === undefined || !axis) return;
    event.preventDefault();
    this.moveTo(axis._offset + axis.d2p(this.level) + (by * axis._length) / 100);
  }

  /** Called after each drawing: the axis or the runs may have changed. */
  update() {
    const runs = this.chart.content?.runs ?? [];
    const axis = this.axis();
    const on = this.level !== null && axis !== null && runs.length > 0;
    setVisible(this.button, runs.length);
    setAttr(this.button, "aria-pressed", String(on));
    setVisible(this.node, on);
    setVisible(this.table, on);
    if (!on) return;
    this.place(axis);
    const found = runs.map((run) => ({ name: run.name, ...firstReached(this.level, run) }));
    this.showTable(found);
    this.describe(axis, found);
  }

  place(axis) {
    const y = axis.d2p(this.level);
    const { style } = this.node;
    style.top = `${Math.round(axis._offset + Math.max(0, Math.min(axis._length, Number.isFinite(y) ? y : axis._length)))}px`;
    // By both margins, so that it follows the width of the window at once.
    const { xaxis, width } = this.chart.plot._fullLayout;
    style.left = `${xaxis._offset}px`;
    style.right = `${width - xaxis._offset - xaxis._length}px`;
    setText(this.value, this.chart.format(this.level));
  }

  showTable(found) {
    setText(this.caption, t("First at or below {level}, on the smoothed line", { level: this.chart.format(this.level) }));
    updateList(this.body, found.map((run, i) => [run, i]), ([, i]) => i, () => h("tr", {}, h("th", { scope: "row" }), COLUMNS.slice(1).map(([, kind]) => h("td", { class: kind }))), (row, [run]) => {
      const never = run.step === undefined;
      const lowest = run.lowest === null ? t("no loss yet") : t("not reached, lowest {lowest}", { lowest: this.chart.format(run.lowest) });
      const values = never ? [lowest, "", ""] : [count(run.step), compactNumber(run.tokens), run.seconds === null ? NONE : duration(run.seconds)];
      setText(row.firstChild, run.name);
      values.forEach((value, i) => setText(row.children[i + 1], value));
    });
  }

  describe(axis, found) {
    const [low, high] = axis.range.map((end) => axis.r2l(end)).map((end) => (axis.type === "log" ? 10 ** end : end));
    setAttr(this.node, "aria-valuemin", low.toPrecision(DIGITS));
    setAttr(this.node, "aria-valuemax", high.toPrecision(DIGITS));
    setAttr(this.node, "aria-valuenow", this.level);
    const texts = found.map((run) => (run.step === undefined ? t("{run} not reached", { run: run.name }) : t("{run} at step {step}", { run: run.name, step: count(run.step) })));
    setAttr(this.node, "aria-valuetext", `${this.chart.format(this.level)}: ${texts.join(", ")}`);
  }
}
