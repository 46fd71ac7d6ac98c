// Flattens job specs, and compares them with each other and with the defaults. Pure.

import { fieldGroups, formatValue, getAt, isEqual, setAt } from "./form/schema.js";

/** {a: {b: 1}} -> [["a.b", 1]]; lists are kept whole. */
export function flatten(spec, before = "") {
  return Object.entries(spec ?? {}).flatMap(([name, value]) => {
    const nested = value !== null && typeof value === "object" && !Array.isArray(value);
    return nested ? flatten(value, `${before}${name}.`) : [[`${before}${name}`, value]];
  });
}

/** Returns [[setting, [text for each spec]]] for the settings that differ; "–" if a spec does not have it. */
export function differingSettings(specs) {
  const known = specs.map((spec) => new Map(flatten(spec)));
  const names = [...new Set(known.flatMap((settings) => [...settings.keys()]))];
  const shown = (value) => (value === undefined ? "–" : formatValue(value));
  return names.map((name) => [name, known.map((settings) => shown(settings.get(name)))]).filter(([, values]) => new Set(values).size > 1);
}

/** Returns a spec of all defaults, without required settings. */
export function specDefaults(schemas) {
  const fields = fieldGroups(schemas).flatMap((group) => group.fields);
  return fields.filter((field) => !field.required).reduce((spec, field) => setAt(spec, field.path, field.defaultValue), {});
}

/** Returns the settings of `spec` that differ from `defaults`: submitted again, they give the same run. */
export function specChanges(spec, defaults) {
  const changed = {};
  walk(spec, []);
  return changed;

  function walk(inside, path) {
    for (const [name, value] of Object.entries(inside)) {
      const place = [...path, name];
      if (place.length === 1 && name === "version") continue;
      if (path.length < 2 && name !== "labels" && value !== null && typeof value === "object" && !Array.isArray(value)) walk(value, place);
      else if (!isEqual(value, getAt(defaults, place))) setAt(changed, place, value);
    }
  }
}
