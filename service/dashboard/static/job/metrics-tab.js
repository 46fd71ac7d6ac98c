// Every chart of the run: eight at first, the rest when they are asked for, by a search or all together. Drawn as they come into sight.
import { Chart } from "../charts.js";
import { h, list, show, text } from "../dom.js";
import { keep, kept } from "../router.js";
import { ALL, contentOf } from "./metric-charts.js";

const AT_FIRST = 8;
const HEIGHT = 200;

export class Metrics {
  constructor(place, address, page) {
    this.curves = page.curves;
    this.charts = new Map();
    this.search = h("input", { id: "chart", type: "search", placeholder: "Search the charts", "aria-label": "Search the charts", value: kept("chart") ?? "" });
    this.many = h("span", { class: "muted", role: "status" });
    this.grid = h("div", { class: "small two" });
    this.more = h("button", { type: "button", onclick: () => ((this.all = true), this.choose()) });
    place.append(h("div", { class: "bar" }, this.search, this.many), this.grid, this.more);
    this.search.addEventListener("input", () => {
      keep("chart", this.search.value.trim());
      this.choose();
    });
    this.fields = [...new Set(ALL.flatMap((one) => one.lines.flatMap((part) => part.fields)))];
    this.curves.join({ fields: this.fields, draw: (view) => this.draw(view) });
    this.choose();
  }

  /** The rows come with those of the charts above. */
  update() {}

  draw(view) {
    this.view = view;
    for (const [one, chart] of this.charts) chart.show(contentOf(one, view));
  }

  choose() {
    const words = this.search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const fits = ALL.filter((one) => words.every((word) => said(one).includes(word)));
    const shown = words.length || this.all ? fits : fits.slice(0, AT_FIRST);
    for (const [one, chart] of this.charts) {
      if (shown.includes(one)) continue;
      this.curves.board.remove(chart);
      this.charts.delete(one);
    }
    list(this.grid, shown, (one) => one.name, (one) => this.made(one));
    text(this.many, words.length ? `${fits.length} of ${ALL.length} charts` : "");
    show(this.more, shown.length < fits.length);
    text(this.more, `Show all ${ALL.length} charts`);
  }

  made(one) {
    const chart = new Chart(one.name, { ...one, height: HEIGHT });
    this.charts.set(one, chart);
    const node = this.curves.board.add(chart);
    if (this.view) {
      chart.show(contentOf(one, this.view));
      chart.draw().catch((error) => console.warn(error));
    }
    return node;
  }

  close() {
    this.curves.join(null);
    for (const chart of this.charts.values()) this.curves.board.remove(chart);
  }
}

/** Where a search looks: the chart's name, its lines and their fields. */
const said = (one) => [one.name, ...one.lines.flatMap((part) => [part.words, part.name, ...part.fields])].join(" ").toLowerCase();
