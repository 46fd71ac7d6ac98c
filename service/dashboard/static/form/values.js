// Reads, sets and compares values in specs. Pure.

/** Returns the value at `path`, or undefined. The last name may also be one of `aliases`. */
export function getAt(spec, path, aliases = []) {
  const place = path.slice(0, -1).reduce((inside, name) => (isObject(inside) ? inside[name] : undefined), spec);
  if (!isObject(place)) return undefined;
  const name = [path.at(-1), ...aliases].find((one) => Object.hasOwn(place, one));
  return name === undefined ? undefined : place[name];
}

/** Sets `value` at `path` and creates missing objects. */
export function setAt(spec, path, value) {
  const place = path.slice(0, -1).reduce((inside, name) => (isObject(inside[name]) ? inside[name] : (inside[name] = {})), spec);
  place[path.at(-1)] = value;
  return spec;
}

/** Returns a copy of `spec` without the settings of `fields` and without empty groups: what the form does not know. */
export function withoutFields(spec, fields) {
  const left = structuredClone(spec);
  for (const { path, aliases } of fields) {
    const place = path.slice(0, -1).reduce((inside, name) => (isObject(inside) ? inside[name] : undefined), left);
    if (isObject(place)) for (const name of [path.at(-1), ...aliases]) delete place[name];
  }
  return withoutEmptyGroups(left, new Set(fields.map(({ path }) => path[0])));
}

function withoutEmptyGroups(spec, groups) {
  const bare = (value) => isObject(value) && Object.values(value).every(bare);
  return Object.fromEntries(Object.entries(spec).filter(([name, value]) => !(groups.has(name) && bare(value))));
}

/** Deep-merges `over` into `under`. */
export function mergeSpecs(under, over) {
  if (!isObject(under) || !isObject(over)) return over;
  const both = { ...under };
  for (const [name, value] of Object.entries(over)) both[name] = isObject(value) && isObject(both[name]) ? mergeSpecs(both[name], value) : value;
  return both;
}

/** Deep equality; the order of members does not matter. */
export function isEqual(one, other) {
  if (Array.isArray(one) && Array.isArray(other)) return one.length === other.length && one.every((value, i) => isEqual(value, other[i]));
  if (!isObject(one) || !isObject(other)) return one === other;
  const names = Object.keys(one);
  return names.length === Object.keys(other).length && names.every((name) => Object.hasOwn(other, name) && isEqual(one[name], other[name]));
}

export const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

/** Writes a value for people: 5e-4, true, a text without quotes. */
export function formatValue(value) {
  if (value === undefined || value === null) return "none";
  if (typeof value === "string") return value;
  if (typeof value !== "number") return JSON.stringify(value);
  return value !== 0 && (Math.abs(value) < 1e-2 || Math.abs(value) >= 1e7) ? value.toExponential().replace("+", "") : String(value);
}
