// The job page: status, actions and tabs. The overview has the charts and the key facts.
import { ApiError, get } from "../api.js";
import { h, markPaint, setAttr, setText, setVisible, updateList } from "../dom.js";
import { dateTime } from "../format.js";
import { t } from "../i18n.js";
import { Actions } from "../job/actions.js";
import { startsFrom } from "../job/checkpoint-actions.js";
import { JobCharts } from "../job/job-charts.js";
import { Details, FailureCard, JobsAhead, KeyFacts, Lineage } from "../job/summary.js";
import { TABS, TAB_NAMES } from "../job/tabs.js";
import { canWatch, isWatched, setWatched } from "../notifications.js";
import { markUpdated, poll } from "../polling.js";
import { getParam, setParam } from "../router.js";
import { openEventStream } from "../sse.js";
import { FINAL_STATUSES, showStatus, statusBadge } from "../status.js";

const CHART_TABS = new Set(["overview", "metrics"]);

export const jobPage = { title: t("Job"), open };

function open(place, { id }) {
  const page = new JobPage(place, id);
  return () => page.close();
}

class JobPage {
  constructor(place, id) {
    this.id = id;
    this.address = `/jobs/${encodeURIComponent(id)}`;
    this.name = h("h1", {}, id);
    this.status = statusBadge();
    this.sentence = h("p", { class: "sentence" });
    this.failureCard = new FailureCard((job) => this.draw(job));
    this.alerts = h("ul", { class: "alerts" });
    this.actions = new Actions(this.address, (job) => this.draw(job));
    this.watch = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.toggleWatch() });
    this.keyFacts = new KeyFacts();
    this.jobCharts = new JobCharts(this.address, (checkpoint) => this.startsFrom(checkpoint));
    this.details = new Details(this.address, (job) => this.draw(job));
    this.lineage = new Lineage(id);
    this.jobsAhead = new JobsAhead();
    this.overview = h("div", {}, this.alerts, this.failureCard.node, h("div", { class: "main-chart" }, this.jobCharts.loss, this.keyFacts.node), this.jobCharts.small);
    place.append(h("div", { class: "head" }, h("div", { class: "job-title" }, this.name, this.status, h("code", { class: "muted" }, id)), h("div", { class: "job-head-actions" }, this.watch, this.actions.node)),
      this.details.node, this.sentence, this.jobsAhead.node, this.lineage.node, this.tabs());
    this.poller = poll(() => this.load());
    if (this.showsCharts()) this.jobCharts.prefetch();
    this.onVisibility = () => this.updateStream();
    document.addEventListener("visibilitychange", this.onVisibility);
  }

  tabs() {
    this.panel = h("div", { role: "tabpanel", id: "panel", tabindex: "0", class: "panel" });
    this.tabList = h("div", { role: "tablist", class: "tabs", "aria-label": t("About this job") });
    for (const name of Object.keys(TABS)) {
      const tab = h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", onclick: () => this.selectTab(name) }, TAB_NAMES[name]);
      tab.addEventListener("keydown", (event) => this.onTabKey(event, name));
      this.tabList.append(tab);
    }
    return h("section", { class: "job-tabs" }, this.tabList, this.panel);
  }

  onTabKey(event, name) {
    const names = Object.keys(TABS);
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = names[(names.indexOf(name) + by + names.length) % names.length];
    this.selectTab(next);
    document.getElementById(`tab-${next}`).focus();
  }

  selectTab(name) {
    setParam("tab", name === "overview" ? null : name);
    this.openTab();
    if (this.job && this.showsCharts()) this.jobCharts.update(this.job).catch((error) => console.warn(error));
  }

  /** Opens a tab at a checkpoint. */
  selectCheckpoint(name, step) {
    setParam("at", step);
    this.tab = this.tab?.kind === name ? this.closeTab() : this.tab;
    this.selectTab(name);
  }

  /** Items of the loss chart's menu. */
  startsFrom(checkpoint) {
    if (!this.job) return [];
    const run = (work) => Promise.resolve().then(work).catch((error) => this.actions.showError(error.message));
    return [...startsFrom(checkpoint, this, run), { label: t("Show it in the list"), press: () => this.selectCheckpoint("checkpoints", checkpoint.step) }];
  }

  closeTab() {
    this.tab?.part.close?.();
    return null;
  }

  chosenTab() {
    return getParam("tab") in TABS ? getParam("tab") : "overview";
  }

  /** Whether the open tab has the charts of the metrics: others do not fetch them. */
  showsCharts() {
    return CHART_TABS.has(this.chosenTab());
  }

  openTab() {
    const name = this.chosenTab();
    for (const tab of this.tabList.children) {
      const chosen = tab.id === `tab-${name}`;
      setAttr(tab, "aria-selected", String(chosen));
      setAttr(tab, "tabindex", chosen ? "0" : "-1");
    }
    if (this.tab?.kind !== name) {
      this.closeTab();
      this.panel.replaceChildren();
      setAttr(this.panel, "aria-labelledby", `tab-${name}`);
      this.tab = { kind: name, part: new TABS[name](this.panel, this.address, this) };
    }
    this.tab.part.update(this.job);
  }

  async load() {
    try {
      this.draw(await get(this.address));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) {
        setText(this.sentence, t("Job not found."));
        this.poller?.();
      }
      throw error;
    }
    await Promise.all([this.showsCharts() ? this.jobCharts.update(this.job) : null, this.lineage.update(this.job), this.jobsAhead.update(this.job)]);
    this.updateStream();
  }

  draw(job) {
    this.job = job;
    document.title = `${job.name} · Trainyard`;
    setText(this.name, job.name);
    showStatus(this.status, job.status);
    // The failure card shows the hint.
    setText(this.sentence, job.error?.hint ? job.summary.replace(job.error.hint, "").trim() : job.summary);
    this.failureCard.update(job);
    updateList(this.alerts, job.alerts, (alert) => `${alert.code} ${alert.at}`, () => h("li"), (part, alert) => {
      setText(part, alert.message);
      setAttr(part, "title", dateTime(alert.at));
    });
    markPaint("text");
    this.actions.update(job);
    this.drawWatch();
    this.details.update(job);
    this.keyFacts.update(job);
    this.openTab();
  }

  /** The state is kept in this browser, so it is drawn with each poll: another tab may have changed it. */
  drawWatch() {
    const watched = isWatched(this.job);
    setVisible(this.watch, canWatch(this.job) || watched);
    setAttr(this.watch, "aria-pressed", String(watched));
    setText(this.watch, watched ? t("Notifies me at the end") : t("Notify me at the end"));
    setAttr(this.watch, "title", watched ? t("Press to stop watching this job") : t("The browser shows a notification when the job has ended"));
  }

  toggleWatch() {
    setWatched([this.job], !isWatched(this.job)).then(() => this.drawWatch());
    this.drawWatch();
  }

  /** Opens the metric stream, or closes it while the tab is hidden or after the job has ended. */
  updateStream() {
    const wanted = !document.hidden && this.job && !FINAL_STATUSES.has(this.job.status);
    if (wanted && !this.stream) this.stream = openEventStream(`${this.address}/metrics/stream?after_step=${this.job.progress.step}`, (kind, data) => this.onStreamEvent(kind, data));
    if (!wanted && this.stream) {
      this.stream();
      this.stream = null;
    }
  }

  onStreamEvent(kind, data) {
    markUpdated();
    if (kind === "metric") {
      this.keyFacts.updatePoint(data);
      if (this.showsCharts()) this.jobCharts.scheduleRefetch();
    } else this.poller.now();
  }

  close() {
    document.removeEventListener("visibilitychange", this.onVisibility);
    this.poller();
    this.stream?.();
    this.closeTab();
    this.jobCharts.close();
  }
}
