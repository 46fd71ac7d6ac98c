// Labels at the ends of up to five lines, in place of a legend. Pure.
import { toNumber } from "./chart-data.js";

const MAX_LABELS = 5;
const LABEL_LIFT = 9; // px above the end of a line that ends among others
const MIN_DISTANCE = 13; // px between two labels
const LETTER_WIDTH = 6.2; // px, approximate
const LEFT_MARGIN = 52; // px
const EDGE_FRACTION = 0.02; // of the width: a line that ends this near to the right edge has its label in the margin

/** Returns `{room, annotations}`: the right margin in px, and plotly's annotations. `zoom`: [from, to] on the x axis or null; `width` in px. */
export function endLabels(traces, { isLog, height, width, ink, ground, zoom }) {
  const shown = ({ x, y }, i) => Number.isFinite(y[i]) && (!isLog || y[i] > 0) && x[i] !== null && (!zoom || (toNumber(x[i]) >= toNumber(zoom[0]) && toNumber(x[i]) <= toNumber(zoom[1])));
  const ends = traces.filter((one) => one.end).flatMap((one) => {
    const i = one.y.findLastIndex((_, at) => shown(one, at));
    return i < 0 ? [] : [{ name: truncate(one.end), x: one.x[i], y: one.y[i], continues: i < one.y.findLastIndex(Number.isFinite) }];
  });
  if (ends.length < 2 || ends.length > MAX_LABELS) return { room: 12, annotations: [] };
  const value = (y) => (isLog ? Math.log10(y) : y);
  const points = traces.flatMap((one) => one.y.flatMap((y, i) => (shown(one, i) ? [[toNumber(one.x[i]), value(y)]] : [])));
  const [left, right] = zoom ? zoom.map(toNumber) : extent(points.map(([x]) => x));
  const [low, high] = extent(points.map(([, y]) => y));
  const isAtEdge = (one) => one.continues || toNumber(one.x) >= right - EDGE_FRACTION * (right - left);
  const room = 12 + Math.min(120, Math.max(0, ...ends.filter(isAtEdge).map((one) => one.name.length)) * LETTER_WIDTH);
  const wide = (width - LEFT_MARGIN - room) / (right - left || 1);
  const tall = (height - 32) / (high - low || 1);
  const placed = avoidOverlaps(ends.map((one) => ({ ...one, atEdge: isAtEdge(one), from: isAtEdge(one) ? width : (toNumber(one.x) - left) * wide, up: (value(one.y) - low) * tall + (isAtEdge(one) ? 0 : LABEL_LIFT), at: (value(one.y) - low) * tall })));
  const annotations = placed.map(({ name, x, y, atEdge, shift }) => ({
    ...(atEdge ? { xref: "paper", x: 1 } : { xref: "x", x, bgcolor: ground, borderpad: 0 }), xanchor: "left", xshift: 3, yref: "y", y: value(y), yshift: shift,
    showarrow: false, text: escapeHtml(name), font: { size: 11, color: ink } }));
  return { room, annotations };
}

const extent = (values) => values.reduce(([low, high], one) => [Math.min(low, one), Math.max(high, one)], [Infinity, -Infinity]);

/** Moves labels up until none overlaps another. */
function avoidOverlaps(ends) {
  const placed = [];
  for (const one of [...ends].sort((a, b) => a.up - b.up)) {
    let { up } = one;
    const neighbors = placed.filter((other) => one.from < other.from + other.name.length * LETTER_WIDTH && other.from < one.from + one.name.length * LETTER_WIDTH);
    for (const other of neighbors.sort((a, b) => a.up - b.up)) if (up < other.up + MIN_DISTANCE && up > other.up - MIN_DISTANCE) up = other.up + MIN_DISTANCE;
    placed.push({ ...one, up, shift: up - one.at });
  }
  return placed;
}

const truncate = (name) => (name.length > 18 ? `${name.slice(0, 17)}…` : name);

/** Plotly interprets some HTML tags in texts, and job names are user input. */
const escapeHtml = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
