// Form fields from the job spec's JSON schema in the API's OpenAPI document.
import { get } from "../api.js";

let openApiDocument = null;

/** Fetches the OpenAPI document once. */
export function fetchOpenApi() {
  openApiDocument ??= get("/openapi.json").catch((error) => {
    openApiDocument = null;
    throw error;
  });
  return openApiDocument;
}

export const fetchSchemas = async () => (await fetchOpenApi()).components.schemas;

/** Returns the properties of a request body, `{name: schema}`. */
export async function requestProperties(method, path) {
  const { paths, components } = await fetchOpenApi();
  const { $ref } = paths[path][method].requestBody.content["application/json"].schema;
  return components.schemas[$ref.split("/").at(-1)].properties;
}

/** Returns `[{name, help, fields}]`. The group "" has the top-level settings; nested groups are groups of their own. */
export function fieldGroups(schemas) {
  const found = [];
  collectGroups(schemas.JobSpec, [], schemas, found);
  return found.filter((group) => group.fields.length);
}

function collectGroups(schema, path, schemas, found) {
  const group = { name: path.join("."), help: (schema.description ?? "").replaceAll("`", ""), fields: [] };
  found.push(group);
  for (const [name, described] of Object.entries(schema.properties)) {
    const place = [...path, name];
    const inner = resolveRef(described, schemas);
    if (inner.properties) collectGroups(inner, place, schemas, found);
    else if (!("const" in inner)) group.fields.push(describeField(described, place, schemas, (schema.required ?? []).includes(name)));
  }
}

/** Describes one setting, of the job spec or of another request body. */
export function describeField(described, path, schemas, required = false) {
  const branches = described.anyOf?.map((one) => resolveRef(one, schemas)) ?? [resolveRef(described, schemas)];
  const real = branches.filter((one) => one.type !== "null");
  const form = real.length === 1 ? real[0] : {};
  const kind = inputKind(form);
  const nullable = real.length < branches.length || [form.type].flat().includes("null");
  return {
    path, pointer: jsonPointer(path), name: path.at(-1), kind, nullable, required,
    choices: form.enum ?? ("const" in form ? [form.const] : null), min: form.minimum, exclusiveMin: form.exclusiveMinimum, max: form.maximum, exclusiveMax: form.exclusiveMaximum,
    maxLength: form.maxLength, tupleLength: form.prefixItems?.length, defaultValue: "default" in described ? described.default : emptyDefault(kind, nullable),
    help: described.description ?? form.description ?? "", unit: described["x-unit"] ?? "", none: described["x-none"], aliases: described["x-aliases"] ?? [],
  };
}

function inputKind(form) {
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

function emptyDefault(kind, nullable) {
  if (nullable) return null;
  return { text: "", texts: [], pairs: {} }[kind] ?? null;
}

function resolveRef(described, schemas) {
  return described.$ref ? schemas[described.$ref.split("/").at(-1)] : described;
}

/** RFC 6901 */
export const jsonPointer = (path) => path.map((part) => `/${String(part).replaceAll("~", "~0").replaceAll("/", "~1")}`).join("");

/** "1 to 65,536", "above 0", "" */
export function rangeText({ min, exclusiveMin, max, exclusiveMax }) {
  const write = (value) => (Math.abs(value) >= 1e10 || (value && Math.abs(value) < 1e-3) ? value.toExponential().replace("+", "") : value.toLocaleString("en-US", { maximumFractionDigits: 6 }));
  // JSON's largest integer is no useful limit.
  const high = max !== undefined && max < 1e12 ? write(max) : exclusiveMax !== undefined ? `below ${write(exclusiveMax)}` : null;
  const low = min !== undefined ? write(min) : exclusiveMin !== undefined ? `above ${write(exclusiveMin)}` : null;
  if (low === null) return high === null ? "" : `up to ${high}`;
  if (high === null) return exclusiveMin === undefined ? `${low} or more` : low;
  return `${low} to ${high}`;
}
