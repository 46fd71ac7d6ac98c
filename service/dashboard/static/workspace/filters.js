// Search and filters of the workspace: text, status, labels, group, owner and discarded jobs, all kept in the address.
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { t } from "../i18n.js";
import { getParam, getParams, setParam, setParams } from "../router.js";
import { FINAL_STATUSES, STATUSES, wordFor } from "../status.js";

const DEBOUNCE_MS = 150; // Wait until the user stops typing.
const ACTIVE = STATUSES.filter((name) => !FINAL_STATUSES.has(name));

const labelFilters = () => getParams("label").filter((text) => text.includes("="));

export const showsDiscarded = () => getParam("discarded") !== null;
export const isFiltered = () => Boolean(getParam("search") || getParam("status") || getParam("group") || getParam("owner") || showsDiscarded() || labelFilters().length);

/** Returns the filter as query parameters for `/jobs`. */
export function queryFilter() {
  const status = getParam("status");
  return { search: getParam("search"), status: status === "active" ? ACTIVE : status, label: labelFilters(), group: getParam("group"), owner: getParam("owner") };
}

/** Returns whether a job matches, as the service decides it. */
export function jobMatcher() {
  const { search, status, label, group, owner } = queryFilter();
  const text = (search ?? "").toLowerCase();
  const statuses = status ? new Set([status].flat()) : null;
  const labels = label.map((pair) => [pair.slice(0, pair.indexOf("=")), pair.slice(pair.indexOf("=") + 1)]);
  return (job) => (!text || job.name.toLowerCase().includes(text) || job.id.startsWith(search)) && (!statuses || statuses.has(job.status)) && (!group || job.group === group)
    && (!owner || job.owner === owner) && labels.every(([key, value]) => job.labels[key] === value);
}

export class Filters {
  /** `onChange` is called after every change of a filter; `more`: other controls in the same bar. */
  constructor(onChange, ...more) {
    this.onChange = onChange;
    this.search = h("input", { type: "search", id: "search", placeholder: t("Part of a name, or an id"), value: getParam("search") ?? "", oninput: () => this.onInput() });
    this.status = this.select("status", [["", t("any status")], ["active", t("not finished")], ...STATUSES.map((name) => [name, wordFor(name)])]);
    this.group = this.select("group", [["", t("any group")]]);
    this.owner = this.select("owner", [["", t("any owner")]]);
    this.known = h("datalist", { id: "known-labels" });
    this.label = h("input", { id: "label", placeholder: t("key=value"), size: "12", autocomplete: "off", list: "known-labels", onchange: () => this.add() });
    this.discarded = h("input", { type: "checkbox", id: "discarded", onchange: () => (setParam("discarded", this.discarded.checked ? "1" : ""), onChange()) });
    this.discarded.checked = showsDiscarded();
    this.chosen = h("span", { class: "labels chosen" });
    this.groupChoice = choice("group", t("Group"), this.group);
    this.ownerChoice = choice("owner", t("Owner"), this.owner);
    this.node = h("form", { class: "bar", role: "search", onsubmit: (event) => (event.preventDefault(), this.add()) }, h("label", { for: "search" }, t("Search")), this.search,
      choice("status", t("Status"), this.status), this.groupChoice, this.ownerChoice, choice("label", t("Label"), this.label, this.known), h("span", { class: "choice" }, this.discarded, h("label", { for: "discarded" }, t("Discarded"))), this.chosen, ...more);
    this.draw();
  }

  select(name, options) {
    const node = h("select", { id: name, onchange: () => (setParam(name, node.value), this.onChange()) }, options.map(([value, label]) => h("option", { value }, label)));
    node.value = getParam(name) ?? "";
    return node;
  }

  onInput() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (setParam("search", this.search.value.trim()), this.onChange()), DEBOUNCE_MS);
  }

  /** Adds a label filter; a job must match all of them. */
  add() {
    const text = this.label.value.trim();
    const broken = text !== "" && !text.includes("=");
    setAttr(this.label, "aria-invalid", broken ? "true" : null);
    if (broken || text === "") return;
    this.label.value = "";
    this.setLabels([...new Set([...getParams("label"), text])]);
  }

  setLabels(labels) {
    setParams("label", labels);
    this.draw();
    this.onChange();
  }

  /** Shows the chosen labels; a press removes one. */
  draw() {
    const remove = (label) => {
      this.setLabels(getParams("label").filter((other) => other !== label));
      this.label.focus();
    };
    updateList(this.chosen, getParams("label"), (label) => label, (label) => h("button", { type: "button", class: "label", "aria-label": t("Remove filter {label}", { label }), onclick: () => remove(label) }, label, " ×"));
  }

  /** Offers the groups, owners and labels of the jobs. A choice of one owner is no choice. */
  offer(jobs) {
    const groups = new Set(jobs.map((job) => job.group).filter((group) => group !== null));
    const owners = new Set(jobs.map((job) => job.owner));
    fill(this.group, t("any group"), groups, getParam("group"));
    fill(this.owner, t("any owner"), owners, getParam("owner"));
    setVisible(this.groupChoice, groups.size || getParam("group"));
    setVisible(this.ownerChoice, owners.size > 1 || getParam("owner"));
    const labels = new Set(jobs.flatMap((job) => Object.entries(job.labels).map((pair) => pair.join("="))));
    updateList(this.known, [...labels].sort().slice(0, 200), (text) => text, (text) => h("option", { value: text }));
  }

  close() {
    clearTimeout(this.timer);
  }
}

function choice(id, name, ...control) {
  return h("span", { class: "choice" }, h("label", { for: id }, name), ...control);
}

/** Updates the options of a select and keeps the chosen one, also if no job has it. */
function fill(select, any, names, chosen) {
  const all = ["", ...[...new Set([...names, ...(chosen ? [chosen] : [])])].sort()];
  updateList(select, all, (name) => name, (name) => h("option", { value: name }), (option, name) => setText(option, name || any));
  for (const option of [...select.children]) if (!select.known.has(option.value) || select.known.get(option.value) !== option) option.remove();
  select.value = chosen ?? "";
}
