// The resolved spec of a job: what differs from the defaults, and the whole, to be copied.
import { get } from "../api.js";
import { copy, h, list, text } from "../dom.js";

export class Config {
  constructor(place, address) {
    this.address = address;
    this.differs = h("dl", { class: "facts" });
    this.whole = h("pre", { tabindex: "0", "aria-label": "The resolved spec" });
    const forms = {
      JSON: (spec) => spec,
      curl: (spec) => `curl --json '${spec.replaceAll("'", "'\\''")}' ${location.origin}/jobs`,
      command: (spec) => `cat > spec.json <<'END'\n${spec}\nEND\ntrainyard submit spec.json`,
      Python: (spec) => `import json, httpx2\n\nspec = json.loads(${JSON.stringify(spec)})\nprint(httpx2.post("${location.origin}/jobs", json=spec).json()["id"])`,
    };
    const buttons = Object.entries(forms).map(([name, make]) =>
      h("button", { type: "button", onclick: () => copy(make(this.whole.textContent), name) }, `Copy as ${name}`));
    place.append(h("h2", {}, "Differs from the defaults"), this.differs, h("div", { class: "bar" }, buttons), h("h2", {}, "The whole spec"), this.whole);
  }

  async update(job) {
    text(this.whole, JSON.stringify(job.spec, null, 2));
    this.defaults ??= get("/openapi.json").then((document) => document.components.schemas).catch(() => (this.defaults = null));
    const schemas = await this.defaults;
    if (!schemas) return;
    const found = differing(job.spec, schemas.JobSpec, schemas);
    list(this.differs, found, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value]) => text(part.lastChild, value));
  }
}

/** [name, value] of every setting that is not the schema's default. */
function differing(value, schema, schemas, name = "") {
  const full = schema?.$ref ? schemas[schema.$ref.split("/").at(-1)] : schema;
  if (!full?.properties) return JSON.stringify(value) === JSON.stringify(schema?.default ?? null) ? [] : [[name, typeof value === "string" ? value : JSON.stringify(value)]];
  return Object.entries(value).flatMap(([key, one]) => differing(one, full.properties[key], schemas, name ? `${name}.${key}` : key));
}
