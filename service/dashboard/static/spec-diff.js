// Job specs as flat lists of settings, and what differs between several. Pure.

import { groupsOf } from "./form/schema.js";
import { at, put, same, written } from "./form/values.js";

/** {a: {b: 1}} -> [["a.b", 1]]; lists stay whole. */
export function flat(spec, before = "") {
  return Object.entries(spec ?? {}).flatMap(([name, value]) => {
    const nested = value !== null && typeof value === "object" && !Array.isArray(value);
    return nested ? flat(value, `${before}${name}.`) : [[`${before}${name}`, value]];
  });
}

/** [[setting, [value of each job]]] for those settings in which they are not all alike, as people write them; "–" where one has none. */
export function differing(specs) {
  const known = specs.map((spec) => new Map(flat(spec)));
  const names = [...new Set(known.flatMap((one) => [...one.keys()]))];
  const shown = (value) => (value === undefined ? "–" : written(value));
  return names.map((name) => [name, known.map((one) => shown(one.get(name)))]).filter(([, values]) => new Set(values).size > 1);
}

/** A spec in which everything is as by default; what must be given is missing. */
export function defaultsOf(schemas) {
  const fields = groupsOf(schemas).flatMap((group) => group.fields);
  return fields.filter((field) => !field.required).reduce((spec, field) => put(spec, field.path, field.usual), {});
}

/** What makes `spec` another one than `usual`: the same run, submitted again. */
export function changesOf(spec, usual) {
  const changed = {};
  walk(spec, []);
  return changed;

  function walk(inside, path) {
    for (const [name, value] of Object.entries(inside)) {
      const place = [...path, name];
      if (place.length === 1 && name === "version") continue;
      if (path.length < 2 && name !== "labels" && value !== null && typeof value === "object" && !Array.isArray(value)) walk(value, place);
      else if (!same(value, at(usual, place))) put(changed, place, value);
    }
  }
}
