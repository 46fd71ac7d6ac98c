// Job specs as flat lists of settings, and what differs between several. Pure.

import { written } from "./form/values.js";

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
