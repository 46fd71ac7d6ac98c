// The resolved spec of a job: what differs from the defaults, or from another job; and the whole, to be copied.
import { get, query, token } from "../api.js";
import { copy, h, list, show, text } from "../dom.js";
import { schemas } from "../form/schema.js";
import { keep, kept } from "../router.js";
import { changesOf, defaultsOf, differing } from "../spec-diff.js";

const KEY = "Authorization: Bearer $TRAINYARD_TOKEN";
const END = "SPEC";

export class Config {
  constructor(place, address) {
    this.address = address;
    this.other = h("input", { id: "against", type: "search", list: "against-jobs", placeholder: "its defaults, or another job's name", autocomplete: "off", size: "34" });
    this.offers = h("datalist", { id: "against-jobs" });
    this.table = h("table", { class: "differs" }, h("caption", { class: "unseen" }, "Settings that differ"), (this.head = h("thead")), (this.body = h("tbody")));
    this.same = h("p", { class: "muted", hidden: true });
    this.wrong = h("p", { class: "wrong", role: "alert" });
    this.whole = h("pre", { tabindex: "0", role: "region", "aria-label": "The resolved spec" });
    this.other.addEventListener("input", () => this.typed());
    const buttons = Object.entries(FORMS).map(([name, make]) => h("button", { type: "button", onclick: () => this.copied(name, make) }, name));
    this.like = h("a", { class: "button" }, "Submit one like it");
    this.scroll = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Settings that differ" }, this.table);
    place.append(
      h("div", { class: "bar" }, h("label", { for: "against" }, "Differs from"), this.other, this.offers), this.wrong, this.same, this.scroll,
      h("div", { class: "bar" }, h("span", { class: "muted" }, "Copy as"), buttons, this.like), h("details", {}, h("summary", {}, "The whole spec"), this.whole));
    this.offer("");
  }

  async update(job) {
    const mark = `${JSON.stringify(job.spec)} ${kept("against")}`;
    if (mark === this.seen) return;
    this.seen = mark;
    this.job = job;
    this.like.href = `/submit?like=${encodeURIComponent(job.id)}`;
    text(this.whole, JSON.stringify(job.spec, null, 2));
    try {
      await (kept("against") ? this.againstJob(kept("against")) : this.againstDefaults());
      text(this.wrong, "");
    } catch (error) {
      this.seen = null;
      text(this.wrong, error.message);
    }
  }

  async againstDefaults() {
    const usual = defaultsOf(await schemas());
    this.draw(["default"], differing([this.job.spec, { ...usual, version: this.job.spec.version }]), "Every setting is as by default.");
  }

  async againstJob(id) {
    const found = await get(`/jobs/${encodeURIComponent(id)}`);
    if (document.activeElement !== this.other) this.other.value = titled(found);
    this.draw([found.name], differing([this.job.spec, found.spec]), `All settings are those of ${found.name}.`);
  }

  draw(others, rows, none) {
    this.head.replaceChildren(h("tr", {}, ["Setting", this.job.name, ...others].map((name) => h("th", { scope: "col" }, name))));
    list(this.body, rows, ([name, values]) => JSON.stringify([name, values]), ([name, values]) =>
      h("tr", {}, h("th", { scope: "row", class: "mono" }, name), values.map((value) => h("td", {}, value))));
    show(this.scroll, rows.length);
    show(this.same, !rows.length);
    text(this.same, none);
  }

  /** A job is chosen once its id stands there, as the offers write it; an empty field means the defaults. */
  typed() {
    const id = /\((job_[^)]+)\)$/.exec(this.other.value.trim())?.[1] ?? null;
    if (id || this.other.value === "") {
      keep("against", id);
      this.update(this.job);
    } else this.offer(this.other.value.trim());
  }

  async offer(words) {
    const { data } = await get(query("/jobs", { search: words, limit: 30 })).catch(() => ({ data: [] }));
    const others = data.filter((one) => this.address !== `/jobs/${encodeURIComponent(one.id)}`);
    this.offers.replaceChildren(...others.map((one) => h("option", { value: titled(one) })));
  }

  async copied(name, make) {
    const changed = changesOf(this.job.spec, defaultsOf(await schemas()));
    copy(make(this.job.spec, JSON.stringify(changed, null, 2)), name);
  }
}

const titled = (job) => `${job.name} (${job.id})`;

/** The whole spec as JSON; the others as short as they can be: what differs from the defaults. */
const FORMS = {
  JSON: (spec) => JSON.stringify(spec, null, 2),
  curl: (_, changed) => `curl ${token.get() ? `-H "${KEY}" ` : ""}--json @- ${location.origin}/jobs <<'${END}'\n${changed}\n${END}`,
  command: (_, changed) => `trainyard submit - <<'${END}'\n${changed}\n${END}`,
  Python: (_, changed) => `from client.api import Trainyard\n\nspec = ${python(changed)}\n\nwith Trainyard("${location.origin}") as trainyard:\n    job = trainyard.submit(spec)\n    print(job["id"])`,
};

/** JSON as a Python literal: its texts are Python's, its words are not. */
const python = (json) => json.replace(/"(?:[^"\\]|\\.)*"|true|false|null/g, (part) => ({ true: "True", false: "False", null: "None" })[part] ?? part);
