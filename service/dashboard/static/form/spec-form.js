// A job spec as a form: groups of fields, a search over them, and only what was changed as its value.
import { h, show, text } from "../dom.js";
import { Field } from "./field.js";
import { BAD } from "./inputs.js";
import { groupsOf } from "./schema.js";
import { at, isObject, put, without } from "./values.js";

const OPEN = new Set(["", "data", "training"]);

export class SpecForm {
  /** `base`: a whole spec that counts as unchanged, the schema's defaults where it is null. `whose`: its name. */
  constructor(schemas, base, whose, told) {
    this.told = told;
    this.rest = {};
    this.groups = groupsOf(schemas).map((group) => new Group(group, base, whose, () => this.typed()));
    this.fields = this.groups.flatMap((group) => group.fields);
    this.search = h("input", { type: "search", id: "settings", placeholder: "Find a setting", autocomplete: "off", oninput: () => this.filter() });
    this.none = h("p", { class: "muted", role: "status", hidden: true }, "No setting has this in its name or description.");
    const find = h("div", { class: "bar" }, h("label", { class: "unseen", for: "settings" }, "Find a setting"), this.search);
    this.node = h("div", { class: "spec" }, find, this.none, this.groups.map((group) => group.node));
    this.count();
  }

  typed() {
    this.count();
    this.told();
  }

  /** What differs from the base, and what the JSON had that no field stands for. */
  get value() {
    const value = structuredClone(this.rest);
    for (const field of this.changed) put(value, field.path, field.value);
    return value;
  }

  get changed() {
    return this.fields.filter((field) => field.changed && field.value !== BAD);
  }

  /** Fields that hold nothing that could be sent. */
  get unfinished() {
    return this.fields.filter((field) => field.value === BAD);
  }

  /** Shows a spec; what it leaves out is as in the base. */
  fill(spec) {
    for (const field of this.fields) {
      const given = at(spec, field.path, field.aliases);
      field.show(given === undefined ? field.base : given);
    }
    this.rest = isObject(spec) ? without(spec, this.fields) : {};
    this.count();
  }

  /** Puts mistakes where they belong, and opens those places. Returns those that no field stands for. */
  refuse(errors) {
    const homeless = [];
    for (const field of this.fields) field.complain("");
    for (const error of errors) {
      const field = this.fieldAt(error.pointer);
      if (field) field.complain([field.wrong.textContent, error.message].filter(Boolean).join("; "));
      else homeless.push(error);
    }
    for (const group of this.groups) if (group.fields.some((field) => field.complains)) group.node.open = true;
    return homeless;
  }

  /** The field that a pointer leads to, or into. */
  fieldAt(pointer) {
    return this.fields.find((field) => field.named(pointer));
  }

  filter() {
    const wanted = this.search.value.trim().toLowerCase();
    const shown = this.groups.map((group) => group.filter(wanted));
    show(this.none, !shown.some(Boolean));
  }

  count() {
    for (const group of this.groups) group.count();
  }
}

class Group {
  constructor({ name, help, fields }, base, whose, told) {
    this.name = name;
    const usual = (field) => (base === null ? undefined : at(base, field.path));
    this.fields = fields.map((field) => new Field(field, usual(field) === undefined ? field.usual : usual(field), whose, told));
    this.many = h("span", { class: "many" });
    const title = h("span", { class: "title" }, name === "" ? "job" : name.replaceAll(".", " › "));
    this.node = h("details", { class: "group", open: OPEN.has(name) }, h("summary", {}, title, h("span", { class: "muted" }, help), this.many), this.fields.map((field) => field.node));
  }

  count() {
    const many = this.fields.filter((field) => field.changed).length;
    text(this.many, many ? `${many} changed` : "");
  }

  /** Shows only fields with these words; returns whether there are any. */
  filter(words) {
    const fits = (field) => [field.name, field.words, ...field.aliases, this.name].some((one) => one.toLowerCase().includes(words));
    let any = false;
    for (const field of this.fields) {
      const fitting = fits(field);
      show(field.node, fitting);
      any ||= fitting;
    }
    show(this.node, any);
    if (words && any) {
      this.was ??= this.node.open;
      this.node.open = true;
    } else if (!words && this.was !== undefined) {
      this.node.open = this.was;
      this.was = undefined;
    }
    return any;
  }
}
