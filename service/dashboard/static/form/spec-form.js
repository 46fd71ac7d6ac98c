// A job spec as a form and as JSON, both kept in sync.
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { t } from "../i18n.js";
import { getParam, setParam } from "../router.js";
import { Field, INVALID } from "./field.js";
import { fieldGroups, getAt, isObject, setAt, withoutFields } from "./schema.js";

// A job spec as a form: groups of fields with a search. Its value holds only what was changed.

const OPEN_GROUPS = new Set(["", "data", "training"]);

export class SpecForm {
  /** `base`: the spec that counts as unchanged, or null for the schema's defaults; `baseName`: its name. */
  constructor(schemas, base, baseName, onChange) {
    this.onChange = onChange;
    this.unknownSettings = {};
    this.groups = fieldGroups(schemas).map((group) => new FieldGroup(group, base, baseName, () => this.onInput()));
    this.fields = this.groups.flatMap((group) => group.fields);
    this.search = h("input", { type: "search", id: "settings", placeholder: t("Find a setting"), autocomplete: "off", oninput: () => this.filter() });
    this.noMatch = h("p", { class: "muted", role: "status", hidden: true }, t("No setting matches."));
    const find = h("div", { class: "bar" }, h("label", { class: "visually-hidden", for: "settings" }, t("Find a setting")), this.search);
    this.node = h("div", { class: "spec" }, find, this.noMatch, this.groups.map((group) => group.node));
    this.updateCount();
  }

  onInput() {
    this.updateCount();
    this.onChange();
  }

  /** Changed settings, and settings of the JSON that the form does not know. */
  get value() {
    const value = structuredClone(this.unknownSettings);
    for (const field of this.changed) setAt(value, field.path, field.value);
    return value;
  }

  get changed() {
    return this.fields.filter((field) => field.changed && field.value !== INVALID);
  }

  /** Returns the value of a setting, changed or not. */
  valueAt(...path) {
    return this.fields.find((field) => field.path.join() === path.join())?.value;
  }

  /** Fields without a valid value. */
  get invalidFields() {
    return this.fields.filter((field) => field.value === INVALID);
  }

  /** Shows a spec; settings that it leaves out get the base value. */
  setSpec(spec) {
    for (const field of this.fields) {
      const given = getAt(spec, field.path, field.aliases);
      field.show(given === undefined ? field.base : given);
    }
    this.unknownSettings = isObject(spec) ? withoutFields(spec, this.fields) : {};
    this.updateCount();
  }

  /** Shows errors at their fields and opens the groups. Returns the errors without a field. */
  showErrors(errors) {
    const withoutField = [];
    for (const field of this.fields) field.setError("");
    for (const error of errors) {
      const field = this.fieldAt(error.pointer);
      if (field) field.setError([field.error.textContent, error.message].filter(Boolean).join("; "));
      else withoutField.push(error);
    }
    for (const group of this.groups) if (group.fields.some((field) => field.hasError)) group.node.open = true;
    return withoutField;
  }

  /** Returns the field that a pointer points to or into. */
  fieldAt(pointer) {
    return this.fields.find((field) => field.matchesPointer(pointer));
  }

  filter() {
    const wanted = this.search.value.trim().toLowerCase();
    const shown = this.groups.map((group) => group.filter(wanted));
    setVisible(this.noMatch, !shown.some(Boolean));
  }

  updateCount() {
    for (const group of this.groups) group.updateCount();
  }
}

class FieldGroup {
  constructor({ name, help, fields }, base, baseName, onChange) {
    this.name = name;
    const baseValue = (field) => (base === null ? undefined : getAt(base, field.path));
    this.fields = fields.map((field) => new Field(field, baseValue(field) === undefined ? field.defaultValue : baseValue(field), baseName, onChange));
    this.changeCount = h("span", { class: "change-count" });
    const title = h("span", { class: "title" }, name === "" ? t("job") : name.replaceAll(".", " › "));
    this.node = h("details", { class: "group", open: OPEN_GROUPS.has(name) }, h("summary", {}, title, h("span", { class: "muted" }, help), this.changeCount), this.fields.map((field) => field.node));
  }

  updateCount() {
    const total = this.fields.filter((field) => field.changed).length;
    setText(this.changeCount, total ? t("{n} changed", { n: total }) : "");
  }

  /** Shows only fields that match; returns whether any does. */
  filter(query) {
    const fits = (field) => [field.name, field.helpText, ...field.aliases, this.name].some((text) => text.toLowerCase().includes(query));
    let any = false;
    for (const field of this.fields) {
      const fitting = fits(field);
      setVisible(field.node, fitting);
      any ||= fitting;
    }
    setVisible(this.node, any);
    if (query && any) {
      this.wasOpen ??= this.node.open;
      this.node.open = true;
    } else if (!query && this.wasOpen !== undefined) {
      this.node.open = this.wasOpen;
      this.wasOpen = undefined;
    }
    return any;
  }
}

// Edits a spec as a form or as JSON; both are kept in sync.

const VIEWS = { form: t("Form"), json: "JSON" };

export class SpecEditor {
  /** `label`: that of the JSON field; `onChange`: called after every change. */
  constructor(form, label, onChange) {
    this.form = form;
    this.onChange = onChange;
    this.json = h("textarea", { id: "spec", rows: "26", spellcheck: "false", class: "mono", "aria-describedby": "json-error", oninput: () => this.onInput() });
    this.jsonError = h("p", { class: "error", id: "json-error", role: "alert", hidden: true });
    this.errors = h("ul", { class: "errors", hidden: true });
    const inside = h("div", { class: "json" }, h("label", { for: "spec" }, label), this.json, this.jsonError);
    this.panels = { form: tabPanel("form", form.node), json: tabPanel("json", inside) };
    this.tabs = Object.entries(VIEWS).map(([view, name]) => this.tab(view, name));
    this.node = h("div", { class: "editor" }, h("div", { role: "tablist", class: "tabs", "aria-label": t("Form or JSON") }, this.tabs), this.errors, Object.values(this.panels));
    this.selectView(getParam("view") === "json" ? "json" : "form");
  }

  tab(view, name) {
    const button = h("button", { type: "button", role: "tab", id: `tab-${view}`, "aria-controls": `panel-${view}`, onclick: () => this.selectView(view) }, name);
    button.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      this.selectView(view === "form" ? "json" : "form");
      this.tabs.find((tab) => tab.tabIndex === 0).focus();
    });
    return button;
  }

  selectView(view) {
    this.view = view;
    setParam("view", view === "form" ? null : view);
    for (const tab of this.tabs) {
      const chosen = tab.id === `tab-${view}`;
      setAttr(tab, "aria-selected", String(chosen));
      setAttr(tab, "tabindex", chosen ? "0" : "-1");
    }
    for (const [name, panel] of Object.entries(this.panels)) setVisible(panel, name === view);
  }

  /** Updates the form from the JSON if it is valid. */
  onInput() {
    const parsed = parseSpec(this.json.value);
    this.setError("");
    if (parsed.spec) this.form.setSpec(parsed.spec);
    this.onChange();
  }

  /** Updates the JSON from the form. */
  updateJson() {
    this.setError("");
    this.json.value = JSON.stringify(this.form.value, null, 2);
  }

  get draft() {
    return this.json.value;
  }

  set draft(written) {
    this.json.value = written;
    const parsed = parseSpec(written);
    if (parsed.spec) this.form.setSpec(parsed.spec);
  }

  /** Returns the spec if it is complete, else null; shows nothing. */
  peek() {
    return this.form.invalidFields.length ? null : (parseSpec(this.json.value).spec ?? null);
  }

  /** Returns the spec, or null after showing an error if it is not complete. */
  read() {
    const { spec, error } = parseSpec(this.json.value);
    if (error) this.setError(error);
    if (error) this.selectView("json");
    const [first] = error ? [] : this.form.invalidFields;
    first?.setError(t("must not be empty"));
    first?.focus();
    return error || first ? null : spec;
  }

  setError(message) {
    setVisible(this.jsonError, message);
    setText(this.jsonError, message);
    setAttr(this.json, "aria-invalid", message ? "true" : null);
  }

  /** Shows errors at their fields and as a list; the first one gets the focus, unless the user is typing. */
  showErrors(errors, { isTyping = false } = {}) {
    const withoutField = this.form.showErrors(errors);
    const shown = this.view === "json" ? errors : withoutField;
    setVisible(this.errors, shown.length);
    updateList(this.errors, shown, (problem) => `${problem.pointer} ${problem.message}`, errorItem, (part, problem) => {
      setVisible(part.firstChild, problem.pointer);
      setText(part.firstChild, problem.pointer);
      part.firstChild.onclick = () => this.selectInJson(problem.pointer);
      setText(part.lastChild, ` ${problem.message}`);
    });
    if (this.view === "form" && !isTyping) this.form.fields.find((field) => field.hasError)?.focus();
    setAttr(this.json, "aria-invalid", errors.length ? "true" : null);
  }

  /** Selects the key that a JSON pointer names in the JSON text. */
  selectInJson(pointer) {
    this.selectView("json");
    let place = 0;
    for (const name of pointer.split("/").slice(1)) {
      const start = this.json.value.indexOf(JSON.stringify(name), place);
      if (start < 0) break;
      place = start + 1;
      this.json.setSelectionRange(start, start + name.length + 2);
    }
    this.json.focus();
  }
}

const tabPanel = (name, inside) => h("div", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}` }, inside);
const errorItem = () => h("li", {}, h("button", { type: "button", class: "quiet mono" }), h("span"));

/** Returns `{spec}` or `{error}`. */
function parseSpec(written) {
  try {
    const spec = JSON.parse(written);
    return spec !== null && typeof spec === "object" && !Array.isArray(spec) ? { spec } : { error: t("A spec is a JSON object: { … }") };
  } catch (error) {
    return { error: t("This is not JSON: {reason}", { reason: error.message }) };
  }
}
