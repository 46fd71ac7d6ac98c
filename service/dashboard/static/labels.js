// Names at the ends of lines, for up to five: nobody has to look from a key to a line and back. Pure.

const MOST = 5;
const APART = 13; // px between two names
const LETTER = 6.2; // px, about

/** `{room, annotations}`: the margin at the right in px, and what plotly writes there. */
export function endLabels(traces, isLog, height, ink) {
  const named = traces.filter((one) => one.end && one.y.some(Number.isFinite));
  if (named.length < 2 || named.length > MOST) return { room: 12, annotations: [] };
  const value = (y) => (isLog ? Math.log10(y) : y);
  const ends = named.map((one) => ({ name: one.end, y: one.y.findLast((y) => Number.isFinite(y) && (!isLog || y > 0)) })).filter((one) => one.y !== undefined);
  const all = traces.flatMap((one) => one.y).filter((y) => Number.isFinite(y) && (!isLog || y > 0)).map(value);
  const low = all.reduce((a, b) => Math.min(a, b), Infinity);
  const high = all.reduce((a, b) => Math.max(a, b), -Infinity);
  const scale = (height - 32) / (high - low || 1);
  const annotations = spread(ends, (one) => value(one.y) * scale).map(({ name, y, shift }) => ({
    xref: "paper", x: 1, xanchor: "left", yref: "y", y: value(y), yshift: shift, showarrow: false, text: plain(name), font: { size: 11, color: ink }, xshift: 3 }));
  return { room: 12 + Math.min(120, Math.max(...ends.map((one) => cut(one.name).length)) * LETTER), annotations };
}

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
