// Form fields from the job spec's JSON schema in the API's OpenAPI document, and values in specs.
import { get } from "../api.js";
import { t } from "../i18n.js";

// Reads, sets and compares values in specs. Pure.

/** Returns the value at `path`, or undefined. The last name may also be one of `aliases`. */
export function getAt(spec, path, aliases = []) {
  const place = path.slice(0, -1).reduce((inside, name) => (isObject(inside) ? inside[name] : undefined), spec);
  if (!isObject(place)) return undefined;
  const name = [path.at(-1), ...aliases].find((candidate) => Object.hasOwn(place, candidate));
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
export function isEqual(left, right) {
  if (Array.isArray(left) && Array.isArray(right)) return left.length === right.length && left.every((value, i) => isEqual(value, right[i]));
  if (!isObject(left) || !isObject(right)) return left === right;
  const names = Object.keys(left);
  return names.length === Object.keys(right).length && names.every((name) => Object.hasOwn(right, name) && isEqual(left[name], right[name]));
}

export const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

/** Writes a value for people: 5e-4, true, a text without quotes. */
export function formatValue(value) {
  if (value === undefined || value === null) return t("none");
  if (typeof value === "string") return value;
  if (typeof value !== "number") return JSON.stringify(value);
  return value !== 0 && (Math.abs(value) < 1e-2 || Math.abs(value) >= 1e7) ? value.toExponential().replace("+", "") : String(value);
}

// Form fields from the job spec's JSON schema in the API's OpenAPI document.

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
  const groups = [];
  collectGroups(schemas.JobSpec, [], schemas, groups);
  return groups.filter((group) => group.fields.length);
}

/** Returns a description without its Markdown: the texts of links, and no reference to a guide. */
function plainText(description) {
  return description.replace(/(, see|:) \[(the )?guide\]\([^)]*\)/g, "").replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").replaceAll("`", "");
}

function collectGroups(schema, path, schemas, groups) {
  const group = { name: path.join("."), help: plainText(schema.description ?? ""), fields: [] };
  groups.push(group);
  for (const [name, described] of Object.entries(schema.properties)) {
    const place = [...path, name];
    const inner = resolveRef(described, schemas);
    if (inner.properties) collectGroups(inner, place, schemas, groups);
    else if (!("const" in inner)) group.fields.push(describeField(described, place, schemas, (schema.required ?? []).includes(name)));
  }
}

/** Describes one setting, of the job spec or of another request body. */
export function describeField(described, path, schemas, required = false) {
  const branches = described.anyOf?.map((branch) => resolveRef(branch, schemas)) ?? [resolveRef(described, schemas)];
  const real = branches.filter((branch) => branch.type !== "null");
  const form = real.length === 1 ? real[0] : {};
  const kind = inputKind(form);
  const nullable = real.length < branches.length || [form.type].flat().includes("null");
  return {
    path, pointer: jsonPointer(path), name: path.at(-1), kind, nullable, required,
    choices: form.enum ?? ("const" in form ? [form.const] : null), min: form.minimum, exclusiveMin: form.exclusiveMinimum, max: form.maximum, exclusiveMax: form.exclusiveMaximum,
    maxLength: form.maxLength, tupleLength: form.prefixItems?.length, defaultValue: "default" in described ? described.default : emptyDefault(kind, nullable, form.type),
    help: plainText(described.description ?? form.description ?? ""), unit: described["x-unit"] ?? "", none: described["x-none"], aliases: described["x-aliases"] ?? [],
  };
}

function inputKind(form) {
  if (form.enum || "const" in form) return "choice";
  if (form.oneOf?.some(isText) && form.oneOf.every((one) => isText(one) || isText(one.items ?? {}))) return "paths";
  const type = [form.type].flat().find((name) => name !== "null");
  if (type === "boolean") return "switch";
  if (type === "integer" || type === "number") return type;
  if (type === "string") return "text";
  if (type === "array" && form.prefixItems) return "numbers";
  if (type === "array" && form.items?.type === "string") return "texts";
  if (type === "object" && form.additionalProperties?.type === "string") return "pairs";
  return "json";
}

const isText = (form) => form.type === "string";

function emptyDefault(kind, nullable, type) {
  if (nullable) return null;
  return { text: "", texts: [], pairs: {} }[kind] ?? (type === "array" ? [] : null);
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
  const high = max !== undefined && max < 1e12 ? write(max) : exclusiveMax !== undefined ? t("below {high}", { high: write(exclusiveMax) }) : null;
  const low = min !== undefined ? write(min) : exclusiveMin !== undefined ? t("above {low}", { low: write(exclusiveMin) }) : null;
  if (low === null) return high === null ? "" : t("up to {n}", { n: high });
  if (high === null) return exclusiveMin === undefined ? t("{low} or more", { low }) : low;
  return t("{low} to {high}", { low, high });
}
