// The tabs of a job. Each is made when it is opened, and looks again with every look at the job.
import { Refused, fetched, get, send } from "../api.js";
import { copy, h, list, say, show, table, text } from "../dom.js";
import { ago, bytes, clock, exact, loss } from "../format.js";
import { go } from "../router.js";
import { Logs } from "./logs.js";

/** A table of one of the job's lists, asked for again when `mark` of the job changes. */
class Listing {
  constructor(place, address, { path, columns, caption, none, key = (one) => one.id, row, mark }) {
    Object.assign(this, { address, path, key, row, mark });
    this.table = table(columns, caption);
    this.none = h("p", { class: "muted", hidden: true }, none);
    this.wrong = h("p", { class: "wrong", role: "alert" });
    place.append(this.wrong, this.none, this.table.node);
  }

  async update(job) {
    const mark = this.mark(job);
    if (mark === this.seen) return;
    this.seen = mark;
    try {
      const found = await this.all();
      show(this.none, !found.length);
      show(this.table.node, found.length);
      list(this.table.body, found, this.key, (one) => this.row(one, this));
    } catch {
      this.seen = null;
    }
  }

  async all() {
    const found = [];
    for (let more = true, after = ""; more && found.length < 1000; after = `&after=${found.at(-1)?.id}`) {
      const page = await get(`${this.address}${this.path}?limit=100${after}`);
      found.push(...page.data);
      more = page.has_more;
    }
    return this.newestFirst ? found.reverse() : found;
  }
}

const cell = (value, kind = "", title = null) => h("td", { class: kind, title }, value ?? "–");
const moved = (job) => `${job.status} ${job.attempt} ${job.checkpoint?.step} ${job.alerts.length}`;

class Overview extends Listing {
  constructor(place, address) {
    super(place, address, {
      path: "/attempts", caption: "Attempts", none: "Not launched yet.", mark: moved, key: (one) => `${one.id} ${one.ended_at} ${one.started_at}`,
      columns: [["Attempt"], ["Began by"], ["From step", "num"], ["To step", "num"], ["Devices"], ["Started"], ["Ended"], ["How it ended"]],
      row: (one) => h("tr", {}, cell(String(one.number)), cell(one.trigger), cell(one.start_step, "num"), cell(one.end_step, "num"), cell(one.devices.join(", ")),
        cell(clock(one.started_at), "", exact(one.started_at)), cell(clock(one.ended_at), "", exact(one.ended_at)), cell(one.message ?? one.outcome)),
    });
  }
}

class Events extends Listing {
  constructor(place, address) {
    super(place, address, {
      path: "/events", caption: "Events, newest first", none: "Nothing has happened yet.", mark: (job) => `${moved(job)} ${job.progress.updated_at}`,
      columns: [["When"], ["By"], ["What"], ["Message"]],
      row: (one) => h("tr", {}, cell(clock(one.at), "num", exact(one.at)), cell(one.actor), cell(one.kind), cell(one.message)),
    });
    this.newestFirst = true;
  }
}

class Checkpoints extends Listing {
  constructor(place, address) {
    super(place, address, {
      path: "/checkpoints", caption: "Checkpoints, newest first", none: "No checkpoint yet.", mark: moved,
      columns: [["Step", "num"], ["Kind"], ["Loss", "num"], ["Size", "num"], ["Saved"], ["sha256"], ["Do"]], row: checkpointRow,
    });
  }
}

function checkpointRow(one, listing) {
  const at = `${listing.address}/checkpoints/${one.step}`;
  const act = (name, work) => h("button", { type: "button", onclick: () => tried(listing, work) }, name);
  const name = `step-${one.step}.safetensors`;
  const doing = [
    act("Download", () => download(`${at}/files/model.safetensors`, name)),
    act("Export HF", async () => say(`Exported to ${(await send("POST", `${at}/export`, { format: "hf" })).path}`)),
    act("Fork from here", async () => go(`/jobs/${(await send("POST", `${listing.address}/fork`, { step: one.step })).id}`)),
  ];
  return h("tr", {}, cell(one.step.toLocaleString("en-US"), "num"), cell(one.kind), cell(loss(one.loss), "num"), cell(bytes(one.bytes), "num"),
    cell(ago(one.created_at), "", exact(one.created_at)), h("td", {}, h("code", { title: one.sha256 }, one.sha256.slice(0, 12))),
    h("td", { class: "doing" }, one.kind === "full" ? doing : "–"));
}

async function tried(listing, work) {
  text(listing.wrong, "");
  try {
    await work();
  } catch (error) {
    text(listing.wrong, error instanceof Refused ? [error.message, ...error.errors.map((one) => `${one.pointer}: ${one.message}`)].join(" ") : error.message);
  }
}

/** With the token in a header, so by way of memory. */
async function download(path, name) {
  const blob = await (await fetched(path, { headers: { Accept: "*/*" } })).blob();
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

class Samples extends Listing {
  constructor(place, address) {
    super(place, address, {
      path: "/samples", caption: "Samples by step", none: "No sample yet: name prompts in reporting.sample_prompts.", mark: (job) => `${moved(job)} ${job.progress.step}`,
      columns: [["Step", "num"], ["Prompt"], ["Text"]],
      row: (one) => h("tr", {}, cell(one.step.toLocaleString("en-US"), "num"), cell(one.prompt), h("td", { class: "sample" }, one.text)),
    });
  }
}

class Config {
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

export const TABS = { overview: Overview, logs: Logs, checkpoints: Checkpoints, samples: Samples, config: Config, events: Events };
