// The resolved spec of a job: differences from the defaults or from another job, and copy buttons.
import { get, token, withQuery } from "../api.js";
import { copyText, h, setText, setVisible, updateList } from "../dom.js";
import { fetchSchemas } from "../form/schema.js";
import { t } from "../i18n.js";
import { getParam, setParam } from "../router.js";
import { differingSettings, specChanges, specDefaults } from "../spec-diff.js";

const AUTH_HEADER = "Authorization: Bearer $TRAINYARD_TOKEN";
const HEREDOC_END = "SPEC";

export class ConfigTab {
  constructor(place, address) {
    this.address = address;
    this.otherJob = h("input", { id: "against", type: "search", list: "against-jobs", placeholder: t("the defaults, or another job's name"), autocomplete: "off", size: "34" });
    this.suggestions = h("datalist", { id: "against-jobs" });
    this.table = h("table", { class: "differs" }, h("caption", { class: "visually-hidden" }, t("Settings that differ")), (this.head = h("thead")), (this.body = h("tbody")));
    this.noDifference = h("p", { class: "muted", hidden: true });
    this.error = h("p", { class: "error", role: "alert" });
    this.wholeSpec = h("pre", { tabindex: "0", role: "region", "aria-label": t("The resolved spec") });
    this.otherJob.addEventListener("input", () => this.onInput());
    const buttons = Object.entries(COPY_FORMATS).map(([name, make]) => h("button", { type: "button", onclick: () => this.copyAs(name, make) }, name === "command" ? t("command") : name));
    this.submitLikeLink = h("a", { class: "button" }, t("Submit a similar job"));
    this.scroll = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("Settings that differ") }, this.table);
    place.append(
      h("div", { class: "bar" }, h("label", { for: "against" }, t("Compare with")), this.otherJob, this.suggestions), this.error, this.noDifference, this.scroll,
      h("div", { class: "bar" }, h("span", { class: "muted" }, t("Copy as")), buttons, this.submitLikeLink), h("details", {}, h("summary", {}, t("Full spec")), this.wholeSpec));
    this.loadSuggestions("");
  }

  async update(job) {
    const mark = `${JSON.stringify(job.spec)} ${getParam("against")}`;
    if (mark === this.mark) return;
    this.mark = mark;
    this.job = job;
    this.submitLikeLink.href = `/submit?like=${encodeURIComponent(job.id)}`;
    setText(this.wholeSpec, JSON.stringify(job.spec, null, 2));
    try {
      await (getParam("against") ? this.againstJob(getParam("against")) : this.againstDefaults());
      setText(this.error, "");
    } catch (error) {
      this.mark = null;
      setText(this.error, error.message);
    }
  }

  async againstDefaults() {
    const defaults = specDefaults(await fetchSchemas());
    this.draw([t("default")], differingSettings([this.job.spec, { ...defaults, version: this.job.spec.version }]), t("Every setting has its default value."));
  }

  async againstJob(id) {
    const other = await get(`/jobs/${encodeURIComponent(id)}`);
    if (document.activeElement !== this.otherJob) this.otherJob.value = jobTitle(other);
    this.draw([other.name], differingSettings([this.job.spec, other.spec]), t("All settings are the same as in {name}.", { name: other.name }));
  }

  draw(others, rows, none) {
    this.head.replaceChildren(h("tr", {}, [t("Setting"), this.job.name, ...others].map((name) => h("th", { scope: "col" }, name))));
    updateList(this.body, rows, ([name, values]) => JSON.stringify([name, values]), ([name, values]) =>
      h("tr", {}, h("th", { scope: "row", class: "mono" }, name), values.map((value) => h("td", {}, value))));
    setVisible(this.scroll, rows.length);
    setVisible(this.noDifference, !rows.length);
    setText(this.noDifference, none);
  }

  /** A suggestion ends with the job's id in parentheses; an empty field means the defaults. */
  onInput() {
    const id = /\((job_[^)]+)\)$/.exec(this.otherJob.value.trim())?.[1] ?? null;
    if (id || this.otherJob.value === "") {
      setParam("against", id);
      this.update(this.job);
    } else this.loadSuggestions(this.otherJob.value.trim());
  }

  async loadSuggestions(text) {
    const { data } = await get(withQuery("/jobs", { search: text, limit: 30 })).catch(() => ({ data: [] }));
    const others = data.filter((job) => this.address !== `/jobs/${encodeURIComponent(job.id)}`);
    this.suggestions.replaceChildren(...others.map((job) => h("option", { value: jobTitle(job) })));
  }

  async copyAs(name, make) {
    const changed = specChanges(this.job.spec, specDefaults(await fetchSchemas()));
    copyText(make(this.job.spec, JSON.stringify(changed, null, 2)), name === "command" ? t("command") : name);
  }
}

const jobTitle = (job) => `${job.name} (${job.id})`;

/** JSON copies the full spec; the other formats copy only what differs from the defaults. */
const COPY_FORMATS = {
  JSON: (spec) => JSON.stringify(spec, null, 2),
  curl: (_, changed) => `curl ${token.get() ? `-H "${AUTH_HEADER}" ` : ""}--json @- ${location.origin}/jobs <<'${HEREDOC_END}'\n${changed}\n${HEREDOC_END}`,
  command: (_, changed) => `trainyard submit - <<'${HEREDOC_END}'\n${changed}\n${HEREDOC_END}`,
  Python: (_, changed) => `from trainyard import Client\n\nspec = ${toPythonLiteral(changed)}\n\nwith Client("${location.origin}") as client:\n    job = client.submit(spec)\n    print(job["id"])`,
};

/** Only true, false and null differ: a JSON string is also a Python string. */
const toPythonLiteral = (json) => json.replace(/"(?:[^"\\]|\\.)*"|true|false|null/g, (part) => ({ true: "True", false: "False", null: "None" })[part] ?? part);
