// The job spec's schema as fields that can be filled in. Pure: everything comes from the API's own document.
import { get } from "../api.js";

let asked = null;

/** The whole OpenAPI document. */
export function openapi() {
  asked ??= get("/openapi.json").catch((error) => {
    asked = null;
    throw error;
  });
  return asked;
}

export const schemas = async () => (await openapi()).components.schemas;

/** The members of a change's body, `{name: schema}`. */
export async function bodyOf(method, path) {
  const { paths } = await openapi();
  return paths[path][method].requestBody.content["application/json"].schema.properties;
}

/** `[{name, help, fields}]`, the group "" holding what stands at the top. A group in a group is one of its own. */
export function groupsOf(schemas) {
  const found = [];
  collect(schemas.JobSpec, [], schemas, found);
  return found.filter((group) => group.fields.length);
}

function collect(schema, path, schemas, found) {
  const group = { name: path.join("."), help: (schema.description ?? "").replaceAll("`", ""), fields: [] };
  found.push(group);
  for (const [name, described] of Object.entries(schema.properties)) {
    const place = [...path, name];
    const inner = resolved(described, schemas);
    if (inner.properties) collect(inner, place, schemas, found);
    else if (!("const" in inner)) group.fields.push(fieldOf(described, place, schemas, (schema.required ?? []).includes(name)));
  }
}

/** The same of one leaf that stands by itself, such as a member of a change's body. */
export function fieldOf(described, path, schemas, required = false) {
  const branches = described.anyOf?.map((one) => resolved(one, schemas)) ?? [resolved(described, schemas)];
  const real = branches.filter((one) => one.type !== "null");
  const form = real.length === 1 ? real[0] : {};
  const kind = kindOf(form);
  const nullable = real.length < branches.length || [form.type].flat().includes("null");
  return {
    path, pointer: pointer(path), name: path.at(-1), kind, nullable, required,
    choices: form.enum ?? ("const" in form ? [form.const] : null), least: form.minimum, above: form.exclusiveMinimum, most: form.maximum, below: form.exclusiveMaximum,
    longest: form.maxLength, parts: form.prefixItems?.length, usual: "default" in described ? described.default : empty(kind, nullable),
    help: described.description ?? form.description ?? "", unit: described["x-unit"] ?? "", none: described["x-none"], aliases: described["x-aliases"] ?? [],
  };
}

function kindOf(form) {
  if (form.enum || "const" in form) return "choice";
  const type = [form.type].flat().find((one) => one !== "null");
  if (type === "boolean") return "switch";
  if (type === "integer" || type === "number") return type;
  if (type === "string") return "text";
  if (type === "array" && form.prefixItems) return "numbers";
  if (type === "array" && form.items?.type === "string") return "texts";
  if (type === "object" && form.additionalProperties?.type === "string") return "pairs";
  return "json";
}

function empty(kind, nullable) {
  if (nullable) return null;
  return { text: "", texts: [], pairs: {} }[kind] ?? null;
}

function resolved(described, schemas) {
  return described.$ref ? schemas[described.$ref.split("/").at(-1)] : described;
}

/** RFC 6901 */
export const pointer = (path) => path.map((part) => `/${String(part).replaceAll("~", "~0").replaceAll("/", "~1")}`).join("");

/** "1 to 65,536", "over 0", "" */
export function range({ least, above, most, below }) {
  const write = (value) => (Math.abs(value) >= 1e10 || (value && Math.abs(value) < 1e-3) ? value.toExponential().replace("+", "") : value.toLocaleString("en-US", { maximumFractionDigits: 6 }));
  // The largest whole number of JSON says nothing to people.
  const high = most !== undefined && most < 1e12 ? write(most) : below !== undefined ? `below ${write(below)}` : null;
  const low = least !== undefined ? write(least) : above !== undefined ? `over ${write(above)}` : null;
  if (low === null) return high === null ? "" : `up to ${high}`;
  if (high === null) return above === undefined ? `${low} or more` : low;
  return `${low} to ${high}`;
}
