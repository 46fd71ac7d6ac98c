// The metrics tab: the charts that are not on the overview. A chart is drawn when it becomes visible.
import { Chart } from "../charts.js";
import { h, setText, setVisible, updateList } from "../dom.js";
import { t } from "../i18n.js";
import { getParam, setParam } from "../router.js";
import { MORE_CHARTS, chartContent, chartFields } from "./job-charts.js";

const HEIGHT = 200;

export class MetricsTab {
  constructor(place, address, page) {
    this.jobCharts = page.jobCharts;
    this.charts = new Map();
    this.search = h("input", { id: "chart", type: "search", placeholder: t("Search the charts"), "aria-label": t("Search the charts"), value: getParam("chart") ?? "" });
    this.matchCount = h("span", { class: "muted", role: "status" });
    this.grid = h("div", { class: "small two" });
    this.emptyNote = h("p", { class: "muted", hidden: true });
    place.append(this.jobCharts.bar, h("div", { class: "bar" }, this.search, this.matchCount), this.grid, this.emptyNote);
    this.search.addEventListener("input", () => {
      setParam("chart", this.search.value.trim());
      this.updateCharts();
    });
    this.fields = [...new Set(MORE_CHARTS.flatMap(chartFields))];
    this.jobCharts.setTab({ fields: this.fields, draw: (view) => this.draw(view) });
    this.updateCharts();
  }

  /** Nothing to do: `JobCharts` fetches the rows and calls `draw`. */
  update() {}

  draw(view) {
    this.view = view;
    for (const [described, chart] of this.charts) chart.show(chartContent(described, view));
    this.hideEmptyCharts();
  }

  updateCharts() {
    const words = this.search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const shown = MORE_CHARTS.filter((described) => words.every((word) => searchText(described).includes(word)));
    for (const [described, chart] of this.charts) {
      if (shown.includes(described)) continue;
      this.jobCharts.group.remove(chart);
      this.charts.delete(described);
    }
    updateList(this.grid, shown, (described) => described.name, (described) => this.createChart(described));
    setText(this.matchCount, words.length ? t("{n} of {all} charts", { n: shown.length, all: MORE_CHARTS.length }) : "");
  }

  /** A chart without a point is only named. */
  hideEmptyCharts() {
    const empty = [...this.charts].filter(([, chart]) => chart.isEmpty);
    for (const chart of this.charts.values()) setVisible(chart.node, !chart.isEmpty);
    setVisible(this.emptyNote, empty.length);
    setText(this.emptyNote, t("Not reported by this run: {charts}", { charts: empty.map(([{ name }]) => name).join(t(", ")) }));
  }

  createChart(described) {
    const chart = new Chart(described.name, { ...described, height: HEIGHT });
    this.charts.set(described, chart);
    const node = this.jobCharts.group.add(chart);
    if (this.view) {
      chart.show(chartContent(described, this.view));
      chart.draw().catch((error) => console.warn(error));
      this.hideEmptyCharts();
    }
    return node;
  }

  close() {
    this.jobCharts.setTab(null);
    for (const chart of this.charts.values()) this.jobCharts.group.remove(chart);
  }
}

/** The text that the search looks in: chart name, line names and fields. */
const searchText = (chart) => [chart.name, ...chart.lines.flatMap((part) => [part.label, part.name, ...part.fields])].join(" ").toLowerCase();
