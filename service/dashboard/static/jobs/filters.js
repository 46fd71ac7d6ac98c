// Search and filters of the jobs page: text, status and labels, all kept in the URL.
import { h, setAttr, updateList } from "../dom.js";
import { getParam, getParams, setParam, setParams } from "../router.js";
import { FINAL_STATUSES, STATUSES } from "../status.js";

const DEBOUNCE_MS = 250; // Wait until the user stops typing.

/** Returns the query parameters for `/jobs`. */
export function jobFilter() {
  const status = getParam("status");
  return { search: getParam("search"), status: status === "active" ? STATUSES.filter((one) => !FINAL_STATUSES.has(one)) : status, label: getParams("label").filter((one) => one.includes("=")) };
}

export const isFiltered = () => Boolean(getParam("search") || getParam("status") || getParams("label").length);

export class Filters {
  /** `onChange` is called after every change of a filter. */
  constructor(onChange) {
    this.onChange = onChange;
    this.search = h("input", { type: "search", id: "search", placeholder: "Part of a name, or an id", value: getParam("search") ?? "", oninput: () => this.onInput() });
    const options = [["", "any status"], ["active", "not finished"], ...STATUSES.map((name) => [name, name])];
    this.status = h("select", { id: "status", onchange: () => (setParam("status", this.status.value), onChange()) }, options.map(([value, words]) => h("option", { value }, words)));
    this.status.value = getParam("status") ?? "";
    this.label = h("input", { id: "label", placeholder: "key=value", size: "14", autocomplete: "off", onchange: () => this.add() });
    this.chosen = h("span", { class: "labels chosen" });
    this.node = h("form", { class: "bar", role: "search", onsubmit: (event) => (event.preventDefault(), this.add()) }, h("label", { for: "search" }, "Search"), this.search,
      h("span", { class: "choice" }, h("label", { for: "status" }, "Status"), this.status), h("span", { class: "choice" }, h("label", { for: "label" }, "Label"), this.label), this.chosen);
    this.draw();
  }

  onInput() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (setParam("search", this.search.value.trim()), this.onChange()), DEBOUNCE_MS);
  }

  /** Adds a label filter; a job must match all of them. */
  add() {
    const words = this.label.value.trim();
    const broken = words !== "" && !words.includes("=");
    setAttr(this.label, "aria-invalid", broken ? "true" : null);
    if (broken || words === "") return;
    this.label.value = "";
    this.set([...new Set([...getParams("label"), words])]);
  }

  set(labels) {
    setParams("label", labels);
    this.draw();
    this.onChange();
  }

  draw() {
    const remove = (words) => (this.set(getParams("label").filter((one) => one !== words)), this.label.focus());
    updateList(this.chosen, getParams("label"), (words) => words, (words) => h("button", { type: "button", class: "label", "aria-label": `Remove filter ${words}`, onclick: () => remove(words) }, words, " ×"));
  }

  close() {
    clearTimeout(this.timer);
  }
}
