// Names at the ends of lines, for up to five: nobody has to look from a key to a line and back. Pure.
import { moment } from "./series.js";

const MOST = 5;
const APART = 13; // px between two names
const LETTER = 6.2; // px, about
const EDGE = 0.02; // of the width: what ends so near to the right edge has its name behind it

/** `{room, annotations}`: the margin at the right in px, and what plotly writes there. `zoom` is [from, to] on the x axis, or null. */
export function endLabels(traces, { isLog, height, ink, zoom }) {
  const shown = ({ x, y }, i) => Number.isFinite(y[i]) && (!isLog || y[i] > 0) && x[i] !== null && (!zoom || (moment(x[i]) >= moment(zoom[0]) && moment(x[i]) <= moment(zoom[1])));
  const ends = traces.filter((one) => one.end).flatMap((one) => {
    const i = one.y.findLastIndex((_, at) => shown(one, at));
    return i < 0 ? [] : [{ name: one.end, x: one.x[i], y: one.y[i], goesOn: i < one.y.findLastIndex(Number.isFinite) }];
  });
  if (ends.length < 2 || ends.length > MOST) return { room: 12, annotations: [] };
  const points = traces.flatMap((one) => one.y.flatMap((_, i) => (shown(one, i) ? [[moment(one.x[i]), one.y[i]]] : [])));
  const [left, right] = zoom ? zoom.map(moment) : extent(points.map(([x]) => x));
  const value = (y) => (isLog ? Math.log10(y) : y);
  const [low, high] = extent(points.map(([, y]) => value(y)));
  const scale = (height - 32) / (high - low || 1);
  const atEdge = ends.filter((one) => one.goesOn || moment(one.x) >= right - EDGE * (right - left));
  const label = { xanchor: "left", yref: "y", showarrow: false, font: { size: 11, color: ink } };
  const behind = spread(atEdge, (one) => value(one.y) * scale).map(({ name, y, shift }) => ({ ...label, xref: "paper", x: 1, xshift: 3, y: value(y), yshift: shift, text: plain(name) }));
  const within = ends.filter((one) => !atEdge.includes(one)).map(({ name, x, y }) => ({ ...label, xref: "x", x, xshift: 3, y: value(y), text: plain(name) }));
  const room = 12 + Math.min(120, Math.max(0, ...atEdge.map((one) => cut(one.name).length)) * LETTER);
  return { room, annotations: [...behind, ...within] };
}

const extent = (values) => values.reduce(([low, high], one) => [Math.min(low, one), Math.max(high, one)], [Infinity, -Infinity]);

/** Each moved up as far as it must be, to stand above the one below. */
function spread(ends, place) {
  let below = -Infinity;
  return [...ends].sort((a, b) => place(a) - place(b)).map((one) => {
    below = Math.max(place(one), below + APART);
    return { ...one, shift: below - place(one) };
  });
}

const cut = (name) => (name.length > 18 ? `${name.slice(0, 17)}…` : name);

/** Plotly reads a few tags in texts: names come from others. */
const plain = (name) => cut(name).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
