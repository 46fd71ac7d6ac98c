// Values of settings inside of specs: read, put, compared. Pure.

/** What stands at `path`, undefined where nothing does; in the last place also under one of `aliases`. */
export function at(spec, path, aliases = []) {
  const place = path.slice(0, -1).reduce((inside, name) => (isObject(inside) ? inside[name] : undefined), spec);
  if (!isObject(place)) return undefined;
  const name = [path.at(-1), ...aliases].find((one) => Object.hasOwn(place, one));
  return name === undefined ? undefined : place[name];
}

/** Puts `value` at `path`, making the objects on the way. */
export function put(spec, path, value) {
  const place = path.slice(0, -1).reduce((inside, name) => (isObject(inside[name]) ? inside[name] : (inside[name] = {})), spec);
  place[path.at(-1)] = value;
  return spec;
}

/** A copy of `spec` without what the fields show; empty groups go, too. What is left is no setting that a form knows. */
export function without(spec, fields) {
  const left = structuredClone(spec);
  for (const { path, aliases } of fields) {
    const place = path.slice(0, -1).reduce((inside, name) => (isObject(inside) ? inside[name] : undefined), left);
    if (isObject(place)) for (const name of [path.at(-1), ...aliases]) delete place[name];
  }
  return pruned(left, new Set(fields.map(({ path }) => path[0])));
}

function pruned(spec, groups) {
  const bare = (value) => isObject(value) && Object.values(value).every(bare);
  return Object.fromEntries(Object.entries(spec).filter(([name, value]) => !(groups.has(name) && bare(value))));
}

/** One spec over the other, group by group. */
export function merged(under, over) {
  if (!isObject(under) || !isObject(over)) return over;
  const both = { ...under };
  for (const [name, value] of Object.entries(over)) both[name] = isObject(value) && isObject(both[name]) ? merged(both[name], value) : value;
  return both;
}

/** 5 and 5.0 are one value, so are objects with their members in another order. */
export function same(one, other) {
  if (Array.isArray(one) && Array.isArray(other)) return one.length === other.length && one.every((value, i) => same(value, other[i]));
  if (!isObject(one) || !isObject(other)) return one === other;
  const names = Object.keys(one);
  return names.length === Object.keys(other).length && names.every((name) => Object.hasOwn(other, name) && same(one[name], other[name]));
}

export const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

/** A value as people write it: 5e-4, true, a text without quotes. */
export function written(value) {
  if (value === undefined || value === null) return "none";
  if (typeof value === "string") return value;
  if (typeof value !== "number") return JSON.stringify(value);
  return value !== 0 && (Math.abs(value) < 1e-2 || Math.abs(value) >= 1e7) ? value.toExponential().replace("+", "") : String(value);
}
