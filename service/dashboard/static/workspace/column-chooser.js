// The menu that chooses the columns of the table. The choice is in the address.
import { h, updateList } from "../dom.js";
import { t } from "../i18n.js";
import { getParam, setParam } from "../router.js";
import { COLUMNS, DEFAULT_COLUMNS, OPTIONAL_COLUMNS, differingNames, findColumn } from "./columns.js";

/** Returns the columns to show, in order. */
export function shownColumns(jobs) {
  const text = getParam("columns");
  if (text !== null) return [...new Set(text.split(","))].map(findColumn).filter(Boolean);
  return DEFAULT_COLUMNS.map(findColumn).filter((column) => !OPTIONAL_COLUMNS.has(column.key) || jobs.some((job) => column.value(job) !== null));
}

export class ColumnChooser {
  /** `jobs()` returns the jobs whose differing settings are offered. */
  constructor(jobs, onChange) {
    [this.jobs, this.onChange] = [jobs, onChange];
    this.common = h("div", { class: "chooser-list" });
    this.settings = h("div", { class: "chooser-list" });
    this.none = h("p", { class: "muted", hidden: true }, t("The listed jobs have the same settings."));
    this.reset = h("button", { type: "button", class: "quiet", onclick: () => this.set(null) }, t("Default columns"));
    const panel = h("div", { class: "chooser-panel" }, h("h3", {}, t("Of the run")), this.common, h("h3", {}, t("Settings that differ")), this.none, this.settings, this.reset);
    this.node = h("details", { class: "chooser", ontoggle: () => this.node.open && this.draw() }, h("summary", { class: "button" }, t("Columns")), panel);
    this.node.addEventListener("keydown", (event) => event.key === "Escape" && this.dismiss());
    this.onPress = (event) => this.node.open && !this.node.contains(event.target) && (this.node.open = false);
    document.addEventListener("pointerdown", this.onPress);
  }

  dismiss() {
    this.node.open = false;
    this.node.firstChild.focus();
  }

  draw() {
    const shown = shownColumns(this.jobs());
    const differing = new Set([...differingNames(this.jobs()), ...shown.filter((column) => column.isSetting).map((column) => column.key)]);
    this.fill(this.common, COLUMNS.map((column) => [column.key, column.label]), shown);
    this.fill(this.settings, [...differing].map((name) => [name, name]), shown);
    this.none.hidden = differing.size > 0;
  }

  fill(list, items, shown) {
    const keys = new Set(shown.map((column) => column.key));
    updateList(list, items, ([key]) => key, ([key, label]) => {
      const box = h("input", { type: "checkbox", onchange: () => this.choose(key, box.checked) });
      return Object.assign(h("label", {}, box, " ", label), { box });
    }, (part, [key]) => (part.box.checked = keys.has(key)));
  }

  /** Adds a column at the end, or removes it. */
  choose(key, wanted) {
    const others = shownColumns(this.jobs()).map((column) => column.key).filter((other) => other !== key);
    this.set(wanted ? [...others, key] : others);
  }

  set(keys) {
    setParam("columns", keys === null || keys.join() === DEFAULT_COLUMNS.join() ? null : keys.join() || "-");
    this.draw();
    this.onChange();
  }

  close() {
    document.removeEventListener("pointerdown", this.onPress);
  }
}
