// The compare page: choose jobs, and see their curves and the settings in which they differ.
import { get, nullIfNotFound, withQuery } from "../api.js";
import { h, setText, setVisible, updateList } from "../dom.js";
import { count } from "../format.js";
import { t } from "../i18n.js";
import { poll } from "../polling.js";
import { wordFor } from "../status.js";
import { MAX_LINES, RunCharts } from "../workspace/run-charts.js";
import { chosenSlots, setChosen } from "../workspace/chosen.js";

export const comparePage = { title: t("Compare"), open };

function open(place) {
  const page = new ComparePage(place);
  return () => page.close();
}

class ComparePage {
  constructor(place) {
    this.charts = new RunCharts(() => this.poller.now());
    this.choices = h("div", { class: "choices" });
    this.hint = h("p", { class: "muted" }, t("Choose jobs to compare."));
    this.missingNote = h("p", { class: "error", role: "status", hidden: true });
    this.search = h("input", { type: "search", id: "find-job", placeholder: t("Part of a name, or an id"), autocomplete: "off", oninput: () => this.poller.now() });
    const chooser = h("details", { open: !chosenSlots().length }, h("summary", {}, t("Jobs")),
      h("div", { class: "bar" }, h("label", { for: "find-job" }, t("Find")), this.search, h("span", { class: "muted" }, t("up to {n}", { n: MAX_LINES }))), this.choices);
    place.append(h("h1", {}, t("Compare")), this.charts.controls, chooser, this.hint, this.missingNote, this.charts.node);
    this.poller = poll(() => this.load());
  }

  choose(id, wanted) {
    setChosen([id], wanted);
    this.poller.now();
  }

  async load() {
    const slots = chosenSlots();
    const ids = slots.filter(Boolean).slice(0, MAX_LINES);
    const listed = (await get(withQuery("/jobs", { search: this.search.value.trim(), limit: 100 }))).data;
    const chosen = await Promise.all(ids.map((id) => listed.find((job) => job.id === id) ?? get(`/jobs/${encodeURIComponent(id)}`).catch(nullIfNotFound)));
    const missing = ids.filter((_, i) => !chosen[i]);
    const found = chosen.filter(Boolean);
    setVisible(this.hint, !found.length);
    setVisible(this.missingNote, missing.length);
    setText(this.missingNote, t("Not found: {ids}", { ids: missing.join(", ") }));
    this.drawChoices(found, listed);
    await this.charts.update(found.map((job) => ({ key: job.id, name: job.name, slot: slots.indexOf(job.id), jobs: [job] })));
  }

  drawChoices(chosen, listed) {
    const first = new Set(chosen.map((job) => job.id));
    const some = [...chosen, ...listed.filter((job) => !first.has(job.id) && job.progress.step > 0)];
    // Not those of the requests: a box may have been pressed since they were sent.
    const ids = new Set(chosenSlots().filter(Boolean).slice(0, MAX_LINES));
    updateList(this.choices, some, (job) => job.id, (job) => this.choice(job), (part, job) => {
      part.box.checked = ids.has(job.id);
      part.box.disabled = !part.box.checked && ids.size >= MAX_LINES;
      setText(part.name, `${job.name}  ${job.id}  ${wordFor(job.status)}  ${t("step {step}", { step: count(job.progress.step) })}`);
    });
  }

  choice(job) {
    const box = h("input", { type: "checkbox", id: `choose-${job.id}`, onchange: () => this.choose(job.id, box.checked) });
    const name = h("label", { for: `choose-${job.id}` });
    return Object.assign(h("div", {}, box, name), { box, name });
  }

  close() {
    this.poller();
    this.charts.close();
  }
}
