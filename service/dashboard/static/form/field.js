// One setting of a form: label, input, unit, help, reset button and error; and forms of a few settings.
import { ApiError } from "../api.js";
import { h, setAttr, setText, setVisible } from "../dom.js";
import { formatValue, isEqual, isObject, jsonPointer, rangeText, setAt } from "./schema.js";
import { t } from "../i18n.js";

// Inputs for one setting. Each is `{node, control, get, set}`: `get` returns the JSON value or INVALID;
// `set` returns whether the input can hold the value. Numbers use the browser's number fields.

export const INVALID = Symbol("no value");

/** Creates the input of a field; `id` matches its label; `onChange` is called after every change. */
function createInput(field, id, onChange) {
  return { switch: checkbox, choice: select, text: textInput, paths: pathLines, integer: numberInput, number: numberInput, numbers: numberTuple, texts: textRows, pairs: pairRows, json: jsonInput }[field.kind](field, id, onChange);
}

const emptyValue = (field) => (field.nullable ? null : INVALID);
// The same word as in the help text.
const nullLabel = (field) => (!field.nullable ? null : field.none ? field.none : field.help.includes("null") ? "null" : t("none"));

const LONG_TEXT = 10_000;

function textInput(field, id, onChange) {
  // A long text may have several lines, which an input would remove.
  const control = field.maxLength >= LONG_TEXT ? h("textarea", { id, rows: "2", maxlength: field.maxLength, oninput: onChange }) : h("input", { id, type: "text", maxlength: field.maxLength, placeholder: nullLabel(field), spellcheck: "false", autocomplete: "off", oninput: onChange });
  return {
    node: control, control,
    get: () => (control.value === "" && field.nullable ? null : control.value),
    set: (value) => (value === null || typeof value === "string") && ((control.value = value ?? ""), true),
  };
}

/** A text, or a list of texts: one a line. */
function pathLines(field, id, onChange) {
  const control = h("textarea", { id, rows: "1", placeholder: nullLabel(field), spellcheck: "false", class: "mono", oninput: onChange });
  const get = () => {
    const lines = control.value.split("\n").filter((line) => line.trim() !== "");
    return lines.length > 1 ? lines : lines[0] ?? emptyValue(field);
  };
  const isLine = (text) => typeof text === "string" && !text.includes("\n");
  const set = (value) => (value === null || [value].flat().every(isLine)) && ((control.value = [value ?? ""].flat().join("\n")), true);
  return { node: control, control, get, set };
}

function numberInput(field, id, onChange) {
  const step = field.kind === "integer" ? "1" : "any";
  const control = h("input", { id, type: "number", step, min: field.min ?? field.exclusiveMin, max: field.max ?? field.exclusiveMax, placeholder: nullLabel(field), autocomplete: "off", oninput: onChange });
  return {
    node: control, control,
    get: () => (control.validity.badInput ? INVALID : control.value === "" ? emptyValue(field) : Number(control.value)),
    set: (value) => (value === null || typeof value === "number") && ((control.value = value === null ? "" : shortNumber(value)), true),
  };
}

/** 0.0005 as 5e-4, as learning rates are usually written. */
function shortNumber(value) {
  const long = String(value);
  const short = value.toExponential().replace("+", "");
  return value !== 0 && !Number.isInteger(value) && short.length < long.length ? short : long;
}

function checkbox(field, id, onChange) {
  const control = h("input", { id, type: "checkbox", onchange: onChange });
  return { node: control, control, get: () => control.checked, set: (value) => typeof value === "boolean" && ((control.checked = value), true) };
}

function select(field, id, onChange) {
  const all = field.nullable ? [null, ...field.choices] : field.choices;
  const control = h("select", { id, onchange: onChange }, all.map((choice, i) => h("option", { value: i }, choice === null ? nullLabel(field) : String(choice))));
  const set = (value) => {
    const place = all.indexOf(value);
    if (place >= 0) control.value = place;
    return place >= 0;
  };
  return { node: control, control, get: () => all[control.value], set };
}

function numberTuple(field, id, onChange) {
  const make = (_, i) => h("input", { id: i ? `${id}-${i}` : id, type: "number", step: "any", "aria-label": t("{name}, {i} of {all}", { name: field.name, i: i + 1, all: field.tupleLength }), oninput: onChange });
  const all = Array.from({ length: field.tupleLength }, make);
  const get = () => (all.some((input) => input.value === "") ? INVALID : all.map((input) => Number(input.value)));
  const fits = (value) => Array.isArray(value) && value.length === all.length && value.every((number) => typeof number === "number");
  return { node: h("span", { class: "several" }, all), control: all[0], get, set: (value) => fits(value) && (all.forEach((input, i) => (input.value = shortNumber(value[i]))), true) };
}

/** Rows that can be added and removed. `make()` creates a row with `read` and `write`. */
function rowList(id, make, { add: addText, remove: removeText }, onChange) {
  const place = h("div", { class: "rows" });
  const parts = [];
  const add = (value) => {
    const part = make();
    part.write(value);
    const remove = () => {
      parts.splice(parts.indexOf(part), 1);
      line.remove();
      more.focus();
      onChange();
    };
    const line = h("div", { class: "row" }, part.node, h("button", { type: "button", class: "quiet", "aria-label": removeText, onclick: remove }, "×"));
    parts.push(part);
    place.append(line);
    return part;
  };
  const more = h("button", { id, type: "button", class: "more", onclick: () => (add(null).control.focus(), onChange()) }, addText);
  const fill = (values) => {
    parts.length = 0;
    place.replaceChildren();
    values.forEach(add);
    return true;
  };
  return { node: h("div", { class: "several-rows" }, place, more), control: more, parts, fill };
}

function textRows(field, id, onChange) {
  const all = rowList(id, () => {
    const control = h("textarea", { rows: "1", "aria-label": field.name, oninput: onChange });
    return { node: control, control, read: () => control.value, write: (value) => (control.value = value ?? "") };
  }, { add: t("Add a text"), remove: t("Remove this text") }, onChange);
  const fits = (value) => Array.isArray(value) && value.every((text) => typeof text === "string");
  return { ...all, get: () => all.parts.map((part) => part.read()), set: (value) => fits(value) && all.fill(value) };
}

function pairRows(field, id, onChange) {
  const all = rowList(id, () => {
    const key = h("input", { type: "text", placeholder: t("key"), "aria-label": t("{name}: key", { name: field.name }), oninput: onChange });
    const value = h("input", { type: "text", placeholder: t("value"), "aria-label": t("{name}: value", { name: field.name }), oninput: onChange });
    return { node: h("span", { class: "pair" }, key, value), control: key, read: () => [key.value, value.value], write: (pair) => ([key.value, value.value] = pair ?? ["", ""]) };
  }, { add: t("Add a label"), remove: t("Remove this label") }, onChange);
  // A row without a key is not complete yet.
  const get = () => Object.fromEntries(all.parts.map((part) => part.read()).filter(([key]) => key !== ""));
  const fits = (value) => isObject(value) && Object.values(value).every((text) => typeof text === "string");
  return { ...all, get, set: (value) => fits(value) && all.fill(Object.entries(value)) };
}

/** Any other type, as JSON. */
function jsonInput(field, id, onChange) {
  const control = h("textarea", { id, rows: "2", spellcheck: "false", class: "mono", oninput: onChange });
  const get = () => {
    try {
      return JSON.parse(control.value);
    } catch {
      return control.value.trim() === "" ? emptyValue(field) : INVALID;
    }
  };
  return { node: control, control, get, set: (value) => ((control.value = value === null ? "" : JSON.stringify(value)), true) };
}

// One setting of a form: label, input, unit, help, reset button and error.

const WIDE_KINDS = new Set(["paths", "texts", "pairs", "json"]);
const ROW_KINDS = new Set(["texts", "pairs"]);
const WIDE_TEXT_LENGTH = 500; // Longer texts are paths, which need a wide input.
const NOT_A_NUMBER = t("must be a number");
let fieldCount = 0;

export class Field {
  /** `base`: the unchanged value; `from`: where it comes from, "default" or a job. */
  constructor(described, base, from, onChange) {
    Object.assign(this, described, { base, from, onChange, helpText: described.help });
    const id = `field-${++fieldCount}-${described.name}`;
    this.input = createInput(described, id, () => this.onInput());
    this.help = h("p", { class: "help", id: `${id}-help` });
    this.error = h("p", { class: "error", id: `${id}-error`, hidden: true });
    this.resetButton = h("button", { type: "button", class: "quiet reset", hidden: true, onclick: () => this.reset() }, "↺");
    setAttr(this.input.control, "aria-describedby", `${id}-help ${id}-error`);
    const wide = WIDE_KINDS.has(described.kind) || (described.kind === "text" && described.maxLength > WIDE_TEXT_LENGTH);
    // Each row has its own label, and the button that adds a row has its text.
    const named = ROW_KINDS.has(described.kind) ? ["span", { class: "mono" }] : ["label", { for: id, class: "mono" }];
    const label = h(...named, described.name, described.required ? h("span", { class: "required-mark" }, ` ${t("required")}`) : null);
    this.unit = described.unit ? h("span", { class: "unit" }, described.unit) : null;
    this.node = h("div", { class: `field${wide ? " wide" : ""}` }, label, h("div", { class: "entry" }, this.input.node, this.unit, this.resetButton), this.help, this.error);
    this.node.addEventListener("focusout", (event) => this.node.contains(event.relatedTarget) || this.restoreIfEmpty());
    this.show(base);
  }

  /** Shows a value. If the input cannot hold it, it is kept until the user types. */
  show(value) {
    this.foreign = this.input.set(value) ? undefined : { value };
    if (this.foreign) this.input.set(this.base);
    this.setError(this.foreign ? t("the JSON has a value of another type here") : "");
    this.refresh();
  }

  /** The value, or INVALID. */
  get value() {
    return this.foreign ? this.foreign.value : this.input.get();
  }

  get changed() {
    return !isEqual(this.value, this.base);
  }

  onInput() {
    this.foreign = undefined;
    this.setError(this.value === INVALID && this.input.control.validity?.badInput ? NOT_A_NUMBER : "");
    this.refresh();
    this.onChange(this);
  }

  /** An unchanged field is not sent, so an emptied required field gets its base value back. */
  restoreIfEmpty() {
    if (this.value === INVALID && !this.input.control.validity?.badInput) this.show(this.base);
  }

  reset() {
    this.show(this.base);
    this.input.control.focus();
    this.onChange(this);
  }

  refresh() {
    const { changed } = this;
    this.node.classList.toggle("changed", changed);
    setVisible(this.resetButton, changed);
    const baseText = formatValue(this.base === "" ? null : this.base);
    setAttr(this.resetButton, "aria-label", t("Back to {value}: {name}", { value: baseText, name: this.name }));
    setAttr(this.resetButton, "title", t("back to {value}", { value: baseText }));
    const limits = this.choices ? "" : rangeText(this);
    const was = changed && !(this.required && this.base === "") ? `${this.from} ${baseText}` : "";
    setText(this.help, [this.helpText, limits, was].filter(Boolean).join(" · "));
  }

  /** Shows an error; "" removes it. */
  setError(message) {
    setText(this.error, message);
    setVisible(this.error, message);
    setAttr(this.input.control, "aria-invalid", message ? "true" : null);
    this.node.classList.toggle("invalid", Boolean(message));
  }

  get hasError() {
    return !this.error.hidden;
  }

  /** Whether an RFC 6901 pointer points to this setting or into it, also by an alias. */
  matchesPointer(place) {
    const names = [this.pointer, ...this.aliases.map((alias) => jsonPointer([...this.path.slice(0, -1), alias]))];
    return names.some((pointer) => place === pointer || place.startsWith(`${pointer}/`));
  }

  focus() {
    this.input.control.focus();
  }
}

// A small form of a few settings: sends what was changed, and shows errors at their fields.

export class SettingsForm {
  /** `send(changes)` sends the changes; `done(response)` is called after success, `leave` when the user discards them. */
  constructor(fields, verb, { send, done, leave }) {
    Object.assign(this, { fields, send, done });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.button = h("button", { class: "primary" }, verb);
    const cancel = h("button", { type: "button", onclick: leave }, t("Discard"));
    this.node = h("form", { class: "sheet", novalidate: true, onsubmit: (event) => (event.preventDefault(), this.press()) },
      fields.map((field) => field.node), this.error, h("div", { class: "bar" }, this.button, cancel));
    this.node.addEventListener("keydown", (event) => event.key === "Escape" && (event.preventDefault(), leave()));
  }

  get value() {
    return this.fields.filter((field) => field.changed && field.value !== INVALID).reduce((value, field) => setAt(value, field.path, field.value), {});
  }

  async press() {
    const bad = this.fields.find((field) => field.value === INVALID);
    bad?.setError(t("must not be empty"));
    bad?.focus();
    if (bad || this.busy) return;
    this.busy = true;
    setAttr(this.button, "aria-disabled", "true");
    try {
      this.showError("");
      this.done(await this.send(this.value));
    } catch (error) {
      this.handleError(error);
    } finally {
      this.busy = false;
      setAttr(this.button, "aria-disabled", null);
    }
  }

  handleError(error) {
    const withoutField = [];
    for (const field of this.fields) field.setError("");
    for (const problem of error instanceof ApiError ? error.errors : []) {
      const field = this.fields.find((other) => other.matchesPointer(problem.pointer));
      if (field) field.setError(problem.message);
      else withoutField.push(`${problem.pointer} ${problem.message}`);
    }
    const first = this.fields.find((field) => field.hasError);
    this.showError(withoutField.length ? withoutField.join("; ") : first ? "" : error.message);
    first?.focus();
  }

  showError(message) {
    setVisible(this.error, message);
    setText(this.error, message);
  }
}
