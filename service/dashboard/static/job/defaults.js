// The schema's defaults as a spec, and what a spec has otherwise. Pure.
import { groupsOf } from "../form/schema.js";
import { at, put, same } from "../form/values.js";

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
