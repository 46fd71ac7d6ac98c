// One job: what it is, how it goes, what may be done; curves above, the rest in tabs.
import { Refused, get } from "../api.js";
import { attr, h, list, mark, show, text } from "../dom.js";
import { Actions } from "../job/actions.js";
import { Ahead } from "../job/jobs-ahead.js";
import { Curves } from "../job/job-charts.js";
import { Details } from "../job/details.js";
import { FailureCard } from "../job/failure-card.js";
import { Facts } from "../job/key-facts.js";
import { Lineage } from "../job/lineage.js";
import { TABS } from "../job/tabs.js";
import { exact } from "../format.js";
import { beat, freshNow } from "../polling.js";
import { keep, kept } from "../router.js";
import { OVER, badge, showStatus } from "../status.js";
import { follow } from "../sse.js";

export const job = { title: "Job", open };

function open(place, { id }) {
  const page = new Page(place, id);
  return () => page.close();
}

class Page {
  constructor(place, id) {
    this.id = id;
    this.address = `/jobs/${encodeURIComponent(id)}`;
    this.name = h("h1", {}, id);
    this.status = badge();
    this.sentence = h("p", { class: "sentence" });
    this.failure = new FailureCard((job) => this.draw(job));
    this.alerts = h("ul", { class: "alerts" });
    this.actions = new Actions(this.address, (job) => this.draw(job));
    this.facts = new Facts();
    this.curves = new Curves(this.address);
    this.details = new Details(this.address, (job) => this.draw(job));
    this.lineage = new Lineage(id);
    this.ahead = new Ahead();
    place.append(h("div", { class: "head" }, h("div", { class: "who" }, this.name, this.status, h("code", { class: "muted" }, id)), this.actions.node),
      this.details.node, this.sentence, this.ahead.node, this.lineage.node, this.failure.node, this.alerts, this.curves.bar,
      h("div", { class: "front" }, this.curves.loss, this.facts.node), this.curves.small, this.tabs());
    this.look = beat(() => this.load());
    this.curves.begin();
    this.seen = () => this.listen();
    document.addEventListener("visibilitychange", this.seen);
  }

  tabs() {
    this.panel = h("div", { role: "tabpanel", id: "panel", tabindex: "0", class: "panel" });
    this.strip = h("div", { role: "tablist", class: "tabs", "aria-label": "About this job" });
    for (const name of Object.keys(TABS)) {
      const tab = h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", onclick: () => this.turn(name) }, name);
      tab.addEventListener("keydown", (event) => this.arrow(event, name));
      this.strip.append(tab);
    }
    return h("section", {}, this.strip, this.panel);
  }

  arrow(event, name) {
    const names = Object.keys(TABS);
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = names[(names.indexOf(name) + by + names.length) % names.length];
    this.turn(next);
    document.getElementById(`tab-${next}`).focus();
  }

  turn(name) {
    keep("tab", name === "overview" ? null : name);
    this.openTab();
  }

  openTab() {
    const name = kept("tab") in TABS ? kept("tab") : "overview";
    for (const tab of this.strip.children) {
      const chosen = tab.id === `tab-${name}`;
      attr(tab, "aria-selected", String(chosen));
      attr(tab, "tabindex", chosen ? "0" : "-1");
    }
    if (this.tab?.kind !== name) {
      this.tab?.part.close?.();
      this.panel.replaceChildren();
      attr(this.panel, "aria-labelledby", `tab-${name}`);
      this.tab = { kind: name, part: new TABS[name](this.panel, this.address, this) };
    }
    this.tab.part.update(this.job);
  }

  async load() {
    try {
      this.draw(await get(this.address));
    } catch (error) {
      if (error instanceof Refused && error.status === 404) {
        text(this.sentence, "There is no such job.");
        this.look?.();
      }
      throw error;
    }
    await Promise.all([this.curves.update(this.job), this.lineage.update(this.job), this.ahead.update(this.job)]);
    this.listen();
  }

  draw(found) {
    this.job = found;
    document.title = `${found.name} · Trainyard`;
    text(this.name, found.name);
    showStatus(this.status, found.status);
    // The hint stands in the card, beside what helps.
    text(this.sentence, found.error?.hint ? found.summary.replace(found.error.hint, "").trim() : found.summary);
    this.failure.update(found);
    list(this.alerts, found.alerts, (one) => `${one.code} ${one.at}`, () => h("li"), (part, one) => {
      text(part, one.message);
      attr(part, "title", exact(one.at));
    });
    mark("text");
    this.actions.update(found);
    this.details.update(found);
    this.facts.update(found);
    this.openTab();
  }

  /** The one stream: closed while the tab is hidden, and when nothing more will come. */
  listen() {
    const wanted = !document.hidden && this.job && !OVER.has(this.job.status);
    if (wanted && !this.stream) this.stream = follow(`${this.address}/metrics/stream?after_step=${this.job.progress.step}`, (kind, data) => this.heard(kind, data));
    if (!wanted && this.stream) {
      this.stream();
      this.stream = null;
    }
  }

  heard(kind, data) {
    freshNow();
    if (kind === "metric") {
      this.facts.point(data);
      this.curves.stale();
    } else this.look.now();
  }

  close() {
    document.removeEventListener("visibilitychange", this.seen);
    this.look();
    this.stream?.();
    this.tab?.part.close?.();
    this.curves.close();
  }
}
