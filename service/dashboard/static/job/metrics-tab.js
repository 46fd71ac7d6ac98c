// The metrics tab: eight charts at first, the rest with "Show all" or a search. Charts are drawn when they become visible.
import { Chart } from "../charts.js";
import { h, setText, setVisible, updateList } from "../dom.js";
import { getParam, setParam } from "../router.js";
import { ALL_CHARTS, chartContent } from "./metric-charts.js";

const INITIAL_CHARTS = 8;
const HEIGHT = 200;

export class MetricsTab {
  constructor(place, address, page) {
    this.jobCharts = page.jobCharts;
    this.charts = new Map();
    this.search = h("input", { id: "chart", type: "search", placeholder: "Search the charts", "aria-label": "Search the charts", value: getParam("chart") ?? "" });
    this.matchCount = h("span", { class: "muted", role: "status" });
    this.grid = h("div", { class: "small two" });
    this.more = h("button", { type: "button", onclick: () => ((this.all = true), this.updateCharts()) });
    place.append(h("div", { class: "bar" }, this.search, this.matchCount), this.grid, this.more);
    this.search.addEventListener("input", () => {
      setParam("chart", this.search.value.trim());
      this.updateCharts();
    });
    this.fields = [...new Set(ALL_CHARTS.flatMap((one) => one.lines.flatMap((part) => part.fields)))];
    this.jobCharts.setTab({ fields: this.fields, draw: (view) => this.draw(view) });
    this.updateCharts();
  }

  /** Nothing to do: `JobCharts` fetches the rows and calls `draw`. */
  update() {}

  draw(view) {
    this.view = view;
    for (const [one, chart] of this.charts) chart.show(chartContent(one, view));
  }

  updateCharts() {
    const words = this.search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const fits = ALL_CHARTS.filter((one) => words.every((word) => searchText(one).includes(word)));
    const shown = words.length || this.all ? fits : fits.slice(0, INITIAL_CHARTS);
    for (const [one, chart] of this.charts) {
      if (shown.includes(one)) continue;
      this.jobCharts.group.remove(chart);
      this.charts.delete(one);
    }
    updateList(this.grid, shown, (one) => one.name, (one) => this.createChart(one));
    setText(this.matchCount, words.length ? `${fits.length} of ${ALL_CHARTS.length} charts` : "");
    setVisible(this.more, shown.length < fits.length);
    setText(this.more, `Show all ${ALL_CHARTS.length} charts`);
  }

  createChart(one) {
    const chart = new Chart(one.name, { ...one, height: HEIGHT });
    this.charts.set(one, chart);
    const node = this.jobCharts.group.add(chart);
    if (this.view) {
      chart.show(chartContent(one, this.view));
      chart.draw().catch((error) => console.warn(error));
    }
    return node;
  }

  close() {
    this.jobCharts.setTab(null);
    for (const chart of this.charts.values()) this.jobCharts.group.remove(chart);
  }
}

/** The text that the search looks in: chart name, line names and fields. */
const searchText = (one) => [one.name, ...one.lines.flatMap((part) => [part.words, part.name, ...part.fields])].join(" ").toLowerCase();
