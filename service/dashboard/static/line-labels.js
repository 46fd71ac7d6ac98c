// Names at the ends of lines, for up to five: nobody has to look from a key to a line and back. Pure.
import { moment } from "./chart-data.js";

const MOST = 5;
const ABOVE = 9; // px: what ends in the midst of others has its name above its end
const APART = 13; // px between two names
const LETTER = 6.2; // px, about
const LEFT = 52; // px of the margin at the left
const EDGE = 0.02; // of the width: what ends so near to the right edge has its name behind it

/** `{room, annotations}`: the margin at the right in px, and what plotly writes there. `zoom` is [from, to] on the x axis, or null; `width` in px. */
export function endLabels(traces, { isLog, height, width, ink, ground, zoom }) {
  const shown = ({ x, y }, i) => Number.isFinite(y[i]) && (!isLog || y[i] > 0) && x[i] !== null && (!zoom || (moment(x[i]) >= moment(zoom[0]) && moment(x[i]) <= moment(zoom[1])));
  const ends = traces.filter((one) => one.end).flatMap((one) => {
    const i = one.y.findLastIndex((_, at) => shown(one, at));
    return i < 0 ? [] : [{ name: cut(one.end), x: one.x[i], y: one.y[i], goesOn: i < one.y.findLastIndex(Number.isFinite) }];
  });
  if (ends.length < 2 || ends.length > MOST) return { room: 12, annotations: [] };
  const value = (y) => (isLog ? Math.log10(y) : y);
  const points = traces.flatMap((one) => one.y.flatMap((y, i) => (shown(one, i) ? [[moment(one.x[i]), value(y)]] : [])));
  const [left, right] = zoom ? zoom.map(moment) : extent(points.map(([x]) => x));
  const [low, high] = extent(points.map(([, y]) => y));
  const isAtEdge = (one) => one.goesOn || moment(one.x) >= right - EDGE * (right - left);
  const room = 12 + Math.min(120, Math.max(0, ...ends.filter(isAtEdge).map((one) => one.name.length)) * LETTER);
  const wide = (width - LEFT - room) / (right - left || 1);
  const tall = (height - 32) / (high - low || 1);
  const placed = spread(ends.map((one) => ({ ...one, atEdge: isAtEdge(one), from: isAtEdge(one) ? width : (moment(one.x) - left) * wide, up: (value(one.y) - low) * tall + (isAtEdge(one) ? 0 : ABOVE), at: (value(one.y) - low) * tall })));
  const annotations = placed.map(({ name, x, y, atEdge, shift }) => ({
    ...(atEdge ? { xref: "paper", x: 1 } : { xref: "x", x, bgcolor: ground, borderpad: 0 }), xanchor: "left", xshift: 3, yref: "y", y: value(y), yshift: shift,
    showarrow: false, text: plain(name), font: { size: 11, color: ink } }));
  return { room, annotations };
}

const extent = (values) => values.reduce(([low, high], one) => [Math.min(low, one), Math.max(high, one)], [Infinity, -Infinity]);

/** Each moved up as far as it must be, to stand clear of those below and beside it. */
function spread(ends) {
  const placed = [];
  for (const one of [...ends].sort((a, b) => a.up - b.up)) {
    let { up } = one;
    const beside = placed.filter((other) => one.from < other.from + other.name.length * LETTER && other.from < one.from + one.name.length * LETTER);
    for (const other of beside.sort((a, b) => a.up - b.up)) if (up < other.up + APART && up > other.up - APART) up = other.up + APART;
    placed.push({ ...one, up, shift: up - one.at });
  }
  return placed;
}

const cut = (name) => (name.length > 18 ? `${name.slice(0, 17)}…` : name);

/** Plotly reads a few tags in texts: names come from others. */
const plain = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
