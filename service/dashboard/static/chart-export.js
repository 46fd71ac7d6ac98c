// Saves a chart as a picture or as its values. The picture has a title and the colors of the current theme.
import { h } from "./dom.js";

const MARGIN_TOP = 34; // px, for the title
const PNG_SCALE = 2;

/** Saves what the chart shows: "png", "svg" or "csv". */
export async function saveChart(chart, kind) {
  const name = `${document.title.split(" · ")[0]} ${chart.name}`.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").toLowerCase();
  if (kind === "csv") return saveBlob(new Blob([tracesAsCsv(chart.group.axis, chart.content.traces)], { type: "text/csv" }), `${name}.csv`);
  const picture = await asSvg(chart);
  saveBlob(kind === "svg" ? new Blob([picture.text], { type: "image/svg+xml" }) : await asPng(picture), `${name}.${kind}`);
}

/** One row per x value, one column per line. Pure. */
export function tracesAsCsv(axis, traces) {
  const lines = traces.filter((trace) => trace.x.length);
  const known = lines.map((trace) => new Map(trace.x.flatMap((x, i) => (x === null || !Number.isFinite(trace.y[i]) ? [] : [[x, trace.y[i]]]))));
  const xs = [...new Set(known.flatMap((values) => [...values.keys()]))].sort((a, b) => (a < b ? -1 : 1));
  const head = [axis, ...lines.map((trace) => trace.label ?? trace.end ?? trace.uid)];
  return [head, ...xs.map((x) => [x, ...known.map((values) => values.get(x) ?? "")])].map((row) => `${row.map(csvCell).join(",")}\r\n`).join("");
}

/** A spreadsheet would run a text that starts like a formula. */
function csvCell(value) {
  if (typeof value !== "string") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

async function asSvg(chart) {
  const { data, layout, offsetWidth: width, offsetHeight } = chart.plot;
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const title = { text: chart.titleText(), x: 0, xref: "paper", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 10 }, font: { size: 13, color: color("--text") } };
  const height = offsetHeight + MARGIN_TOP;
  const figure = { data, layout: { ...layout, title, width, height, autosize: false, margin: { ...layout.margin, t: layout.margin.t + MARGIN_TOP }, paper_bgcolor: color("--background") } };
  const address = await window.Plotly.toImage(figure, { format: "svg", width, height });
  return { text: decodeURIComponent(address.slice(address.indexOf(",") + 1)), width, height };
}

/** Not by plotly: it uses an address of a kind that the content security policy forbids. */
async function asPng({ text, width, height }) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = h("canvas", { width: width * PNG_SCALE, height: height * PNG_SCALE });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function saveBlob(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
