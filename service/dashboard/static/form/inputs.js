// Inputs for one setting. Each is `{node, control, get, set}`: `get` returns the JSON value or INVALID;
// `set` returns whether the input can hold the value. Numbers use the browser's number fields.
import { h } from "../dom.js";
import { isObject } from "./values.js";

export const INVALID = Symbol("no value");

/** Creates the input of a field; `id` matches its label; `onChange` is called after every change. */
export function createInput(field, id, onChange) {
  return { switch: checkbox, choice: select, text: textInput, integer: numberInput, number: numberInput, numbers: numberTuple, texts: textRows, pairs: pairRows, json: jsonInput }[field.kind](field, id, onChange);
}

const emptyValue = (field) => (field.nullable ? null : INVALID);
// The same word as in the help text.
const nullLabel = (field) => (!field.nullable ? null : field.none ? field.none : field.help.includes("null") ? "null" : "none");

function textInput(field, id, onChange) {
  const control = h("input", { id, type: "text", maxlength: field.maxLength, placeholder: nullLabel(field), spellcheck: "false", autocomplete: "off", oninput: onChange });
  return {
    node: control, control,
    get: () => (control.value === "" && field.nullable ? null : control.value),
    set: (value) => (value === null || typeof value === "string") && ((control.value = value ?? ""), true),
  };
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
  const control = h("select", { id, onchange: onChange }, all.map((one, i) => h("option", { value: i }, one === null ? nullLabel(field) : String(one))));
  const set = (value) => {
    const place = all.indexOf(value);
    if (place >= 0) control.value = place;
    return place >= 0;
  };
  return { node: control, control, get: () => all[control.value], set };
}

function numberTuple(field, id, onChange) {
  const make = (_, i) => h("input", { id: i ? `${id}-${i}` : id, type: "number", step: "any", "aria-label": `${field.name}, ${i + 1} of ${field.tupleLength}`, oninput: onChange });
  const all = Array.from({ length: field.tupleLength }, make);
  const get = () => (all.some((one) => one.value === "") ? INVALID : all.map((one) => Number(one.value)));
  const fits = (value) => Array.isArray(value) && value.length === all.length && value.every((one) => typeof one === "number");
  return { node: h("span", { class: "several" }, all), control: all[0], get, set: (value) => fits(value) && (all.forEach((one, i) => (one.value = shortNumber(value[i]))), true) };
}

/** Rows that can be added and removed. `make()` creates a row with `read` and `write`. */
function rowList(id, make, word, onChange) {
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
    const line = h("div", { class: "row" }, part.node, h("button", { type: "button", class: "quiet", "aria-label": `Remove this ${word}`, onclick: remove }, "×"));
    parts.push(part);
    place.append(line);
    return part;
  };
  const more = h("button", { id, type: "button", class: "more", onclick: () => (add(null).control.focus(), onChange()) }, `Add a ${word}`);
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
  }, "text", onChange);
  const fits = (value) => Array.isArray(value) && value.every((one) => typeof one === "string");
  return { ...all, get: () => all.parts.map((part) => part.read()), set: (value) => fits(value) && all.fill(value) };
}

function pairRows(field, id, onChange) {
  const all = rowList(id, () => {
    const key = h("input", { type: "text", placeholder: "key", "aria-label": `${field.name}: key`, oninput: onChange });
    const value = h("input", { type: "text", placeholder: "value", "aria-label": `${field.name}: value`, oninput: onChange });
    return { node: h("span", { class: "pair" }, key, value), control: key, read: () => [key.value, value.value], write: (pair) => ([key.value, value.value] = pair ?? ["", ""]) };
  }, "label", onChange);
  // A row without a key is not complete yet.
  const get = () => Object.fromEntries(all.parts.map((part) => part.read()).filter(([key]) => key !== ""));
  const fits = (value) => isObject(value) && Object.values(value).every((one) => typeof one === "string");
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
