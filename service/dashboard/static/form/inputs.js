// What one setting is typed into. Each input is `{node, control, get, set}`: `get` gives the value as JSON has it, BAD where
// it is none; `set` says whether it could show the value. Numbers are the browser's own number fields.
import { h } from "../dom.js";
import { isObject } from "./values.js";

export const BAD = Symbol("no value");

/** The input for a field; `id` is that of its label, `told` is called with every change. */
export function inputFor(field, id, told) {
  return { switch: toggle, choice, text, integer: number, number, numbers, texts, pairs, json }[field.kind](field, id, told);
}

const blank = (field) => (field.nullable ? null : BAD);
// As its help calls it.
const nothing = (field) => (!field.nullable ? null : field.none ? field.none : field.help.includes("null") ? "null" : "none");

function text(field, id, told) {
  const control = h("input", { id, type: "text", maxlength: field.longest, placeholder: nothing(field), spellcheck: "false", autocomplete: "off", oninput: told });
  return {
    node: control, control,
    get: () => (control.value === "" && field.nullable ? null : control.value),
    set: (value) => (value === null || typeof value === "string") && ((control.value = value ?? ""), true),
  };
}

function number(field, id, told) {
  const step = field.kind === "integer" ? "1" : "any";
  const control = h("input", { id, type: "number", step, min: field.least ?? field.above, max: field.most ?? field.below, placeholder: nothing(field), autocomplete: "off", oninput: told });
  return {
    node: control, control,
    get: () => (control.validity.badInput ? BAD : control.value === "" ? blank(field) : Number(control.value)),
    set: (value) => (value === null || typeof value === "number") && ((control.value = value === null ? "" : digits(value)), true),
  };
}

/** 0.0005 as 5e-4: what a rate is usually written as, and what the browser's field takes. */
function digits(value) {
  const long = String(value);
  const short = value.toExponential().replace("+", "");
  return value !== 0 && !Number.isInteger(value) && short.length < long.length ? short : long;
}

function toggle(field, id, told) {
  const control = h("input", { id, type: "checkbox", onchange: told });
  return { node: control, control, get: () => control.checked, set: (value) => typeof value === "boolean" && ((control.checked = value), true) };
}

function choice(field, id, told) {
  const all = field.nullable ? [null, ...field.choices] : field.choices;
  const control = h("select", { id, onchange: told }, all.map((one, i) => h("option", { value: i }, one === null ? nothing(field) : String(one))));
  const set = (value) => {
    const place = all.indexOf(value);
    if (place >= 0) control.value = place;
    return place >= 0;
  };
  return { node: control, control, get: () => all[control.value], set };
}

function numbers(field, id, told) {
  const make = (_, i) => h("input", { id: i ? `${id}-${i}` : id, type: "number", step: "any", "aria-label": `${field.name}, ${i + 1} of ${field.parts}`, oninput: told });
  const all = Array.from({ length: field.parts }, make);
  const get = () => (all.some((one) => one.value === "") ? BAD : all.map((one) => Number(one.value)));
  const fits = (value) => Array.isArray(value) && value.length === all.length && value.every((one) => typeof one === "number");
  return { node: h("span", { class: "several" }, all), control: all[0], get, set: (value) => fits(value) && (all.forEach((one, i) => (one.value = digits(value[i]))), true) };
}

/** Rows that come and go; a row is `make()`, which has `read` and `write`. */
function rows(id, make, word, told) {
  const place = h("div", { class: "rows" });
  const parts = [];
  const add = (value) => {
    const part = make();
    part.write(value);
    const drop = () => {
      parts.splice(parts.indexOf(part), 1);
      line.remove();
      more.focus();
      told();
    };
    const line = h("div", { class: "row" }, part.node, h("button", { type: "button", class: "quiet", "aria-label": `Remove this ${word}`, onclick: drop }, "×"));
    parts.push(part);
    place.append(line);
    return part;
  };
  const more = h("button", { id, type: "button", class: "more", onclick: () => (add(null).control.focus(), told()) }, `Add a ${word}`);
  const fill = (values) => {
    parts.length = 0;
    place.replaceChildren();
    values.forEach(add);
    return true;
  };
  return { node: h("div", { class: "several-rows" }, place, more), control: more, parts, fill };
}

function texts(field, id, told) {
  const all = rows(id, () => {
    const control = h("textarea", { rows: "1", "aria-label": field.name, oninput: told });
    return { node: control, control, read: () => control.value, write: (value) => (control.value = value ?? "") };
  }, "text", told);
  const fits = (value) => Array.isArray(value) && value.every((one) => typeof one === "string");
  return { ...all, get: () => all.parts.map((part) => part.read()), set: (value) => fits(value) && all.fill(value) };
}

function pairs(field, id, told) {
  const all = rows(id, () => {
    const key = h("input", { type: "text", placeholder: "key", "aria-label": `${field.name}: key`, oninput: told });
    const value = h("input", { type: "text", placeholder: "value", "aria-label": `${field.name}: value`, oninput: told });
    return { node: h("span", { class: "pair" }, key, value), control: key, read: () => [key.value, value.value], write: (pair) => ([key.value, value.value] = pair ?? ["", ""]) };
  }, "label", told);
  // A row without a key is one that is still being typed.
  const get = () => Object.fromEntries(all.parts.map((part) => part.read()).filter(([key]) => key !== ""));
  const fits = (value) => isObject(value) && Object.values(value).every((one) => typeof one === "string");
  return { ...all, get, set: (value) => fits(value) && all.fill(Object.entries(value)) };
}

/** What no other input is made for, as JSON. */
function json(field, id, told) {
  const control = h("textarea", { id, rows: "2", spellcheck: "false", class: "mono", oninput: told });
  const get = () => {
    try {
      return JSON.parse(control.value);
    } catch {
      return control.value.trim() === "" ? blank(field) : BAD;
    }
  };
  return { node: control, control, get, set: (value) => ((control.value = value === null ? "" : JSON.stringify(value)), true) };
}
