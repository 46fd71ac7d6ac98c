// A job spec as a form: groups of fields with a search. Its value holds only what was changed.
import { h, setText, setVisible } from "../dom.js";
import { Field } from "./field.js";
import { INVALID } from "./inputs.js";
import { fieldGroups } from "./schema.js";
import { getAt, isObject, setAt, withoutFields } from "./values.js";

const OPEN_GROUPS = new Set(["", "data", "training"]);

export class SpecForm {
  /** `base`: the spec that counts as unchanged, or null for the schema's defaults; `baseName`: its name. */
  constructor(schemas, base, baseName, onChange) {
    this.onChange = onChange;
    this.unknownSettings = {};
    this.groups = fieldGroups(schemas).map((group) => new FieldGroup(group, base, baseName, () => this.onInput()));
    this.fields = this.groups.flatMap((group) => group.fields);
    this.search = h("input", { type: "search", id: "settings", placeholder: "Find a setting", autocomplete: "off", oninput: () => this.filter() });
    this.noMatch = h("p", { class: "muted", role: "status", hidden: true }, "No setting matches.");
    const find = h("div", { class: "bar" }, h("label", { class: "visually-hidden", for: "settings" }, "Find a setting"), this.search);
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
    const title = h("span", { class: "title" }, name === "" ? "job" : name.replaceAll(".", " › "));
    this.node = h("details", { class: "group", open: OPEN_GROUPS.has(name) }, h("summary", {}, title, h("span", { class: "muted" }, help), this.changeCount), this.fields.map((field) => field.node));
  }

  updateCount() {
    const total = this.fields.filter((field) => field.changed).length;
    setText(this.changeCount, total ? `${total} changed` : "");
  }

  /** Shows only fields that match; returns whether any does. */
  filter(words) {
    const fits = (field) => [field.name, field.words, ...field.aliases, this.name].some((one) => one.toLowerCase().includes(words));
    let any = false;
    for (const field of this.fields) {
      const fitting = fits(field);
      setVisible(field.node, fitting);
      any ||= fitting;
    }
    setVisible(this.node, any);
    if (words && any) {
      this.wasOpen ??= this.node.open;
      this.node.open = true;
    } else if (!words && this.wasOpen !== undefined) {
      this.node.open = this.wasOpen;
      this.wasOpen = undefined;
    }
    return any;
  }
}
