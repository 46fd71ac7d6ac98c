// Which jobs are shown: words, statuses and labels, all of them in the address.
import { attr, h, list } from "../dom.js";
import { keepAll, keptAll, keep, kept } from "../router.js";
import { OVER, STATUSES } from "../status.js";

const PAUSE_MS = 250; // Nobody wants an answer to half a word.

/** What is asked of `/jobs`. */
export function wanted() {
  const status = kept("status");
  return { search: kept("search"), status: status === "active" ? STATUSES.filter((one) => !OVER.has(one)) : status, label: keptAll("label").filter((one) => one.includes("=")) };
}

export const isFiltered = () => Boolean(kept("search") || kept("status") || keptAll("label").length);

export class Filters {
  /** `again` is called when something else is wanted. */
  constructor(again) {
    this.again = again;
    this.search = h("input", { type: "search", id: "search", placeholder: "Part of a name, or an id", value: kept("search") ?? "", oninput: () => this.typed() });
    const options = [["", "any status"], ["active", "not over"], ...STATUSES.map((name) => [name, name])];
    this.status = h("select", { id: "status", onchange: () => (keep("status", this.status.value), again()) }, options.map(([value, words]) => h("option", { value }, words)));
    this.status.value = kept("status") ?? "";
    this.label = h("input", { id: "label", placeholder: "key=value", size: "14", autocomplete: "off", onchange: () => this.add() });
    this.chosen = h("span", { class: "labels chosen" });
    this.node = h("form", { class: "bar", role: "search", onsubmit: (event) => (event.preventDefault(), this.add()) }, h("label", { for: "search" }, "Search"), this.search,
      h("span", { class: "choice" }, h("label", { for: "status" }, "Status"), this.status), h("span", { class: "choice" }, h("label", { for: "label" }, "Label"), this.label), this.chosen);
    this.draw();
  }

  typed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (keep("search", this.search.value.trim()), this.again()), PAUSE_MS);
  }

  /** A label more; all of them must hold. */
  add() {
    const words = this.label.value.trim();
    const broken = words !== "" && !words.includes("=");
    attr(this.label, "aria-invalid", broken ? "true" : null);
    if (broken || words === "") return;
    this.label.value = "";
    this.set([...new Set([...keptAll("label"), words])]);
  }

  set(labels) {
    keepAll("label", labels);
    this.draw();
    this.again();
  }

  draw() {
    const drop = (words) => (this.set(keptAll("label").filter((one) => one !== words)), this.label.focus());
    list(this.chosen, keptAll("label"), (words) => words, (words) => h("button", { type: "button", class: "label", "aria-label": `Without ${words}`, onclick: () => drop(words) }, words, " ×"));
  }

  close() {
    clearTimeout(this.timer);
  }
}
