// Every chart of a job but the loss itself: what it shows of a row, how it is written, and how its axis begins. Pure.
import { bytes, figure, loss, percent, short } from "../format.js";
import { described, line } from "../chart-data.js";

const field = (name, words) => ({ name, words, of: (row) => row[name] ?? null, fields: [name] });
const SI = "~s";
const PERCENT = ".3~p";
const share = (value) => percent(value === null || value === undefined ? null : value * 100);

/** The small ones beside the loss. */
export const SMALL = [
  { name: "Learning rate", lines: [field("learning_rate", "rate")], write: figure },
  { name: "Gradient norm", lines: [field("grad_norm", "norm")], write: figure, log: true },
  { name: "Tokens/s", lines: [field("tokens_per_second", "tokens/s")], write: short, ticks: SI },
  { name: "Step time (s)", lines: [field("step_seconds", "step"), field("data_seconds", "data")], write: figure, log: true },
];

/** The metrics tab: eight at first. */
export const ALL = [
  { name: "Train loss", lines: [{ name: "loss_ema", words: "smoothed", of: (row) => row.loss_ema, fields: [] }, { name: "loss", words: "last", of: (row) => row.loss, fields: [], faint: true }], write: loss },
  { name: "Evaluation loss", lines: [field("eval_loss", "evaluation")], write: loss, sparse: true },
  ...SMALL,
  { name: "Model FLOPs use", lines: [field("mfu", "MFU")], write: share, ticks: PERCENT },
  { name: "Peak memory", lines: [field("memory_bytes", "bytes")], write: bytes, ticks: SI },
  { name: "Perplexity", lines: [{ name: "perplexity", words: "exp(loss)", of: (row) => (row.loss_ema === null ? null : Math.exp(row.loss_ema)), fields: [] }], write: figure, log: true },
  { name: "Loss, most minus least of a point", lines: [{ name: "spread", words: "spread", of: (row) => (row.loss_max === null ? null : row.loss_max - row.loss_min), fields: [] }], write: figure },
  { name: "Share of a step that waits for data", lines: [{ name: "waiting", words: "share", of: (row) => (row.step_seconds && row.data_seconds !== null ? row.data_seconds / row.step_seconds : null), fields: ["step_seconds", "data_seconds"] }], write: share, ticks: PERCENT },
  { name: "Tokens", lines: [field("tokens", "tokens")], write: short, ticks: SI },
  { name: "Epoch", lines: [field("epoch", "epoch")], write: figure },
  { name: "Auxiliary loss", lines: [field("aux_loss", "auxiliary")], write: figure },
  { name: "Load of the fullest and the emptiest expert", lines: [expert("fullest", Math.max), expert("emptiest", Math.min)], write: share, ticks: PERCENT },
];

function expert(words, pick) {
  return { name: words, words, of: (row) => (row.expert_load?.length ? pick(...row.expert_load) : null), fields: ["expert_load"] };
}

/** What a chart shows of the rows, for `Chart.show`. */
export function contentOf(one, { rows, xs, breaks, colours, shapes }) {
  const traces = one.lines.map((part, i) => traceOf(part, i, one, { rows, xs, breaks, colours }));
  const values = rows.map((row) => [row.step.toLocaleString("en-US"), ...one.lines.map((part) => one.write(part.of(row)))]);
  const [first] = one.lines;
  return { traces, values, shapes, columns: ["step", ...one.lines.map((part) => part.words)], label: described(one.name, rows, first.of, one.write),
    now: one.write(rows.findLast((row) => first.of(row) !== null)?.[first.name] ?? first.of(rows.at(-1) ?? {}) ?? null) };
}

function traceOf(part, i, { sparse, lines }, { rows, xs, breaks, colours }) {
  const ys = rows.map(part.of);
  const style = { line: { width: part.faint ? 1 : 1.5, color: part.faint ? `${colours[0]}73` : colours[i], dash: i && !part.faint ? "dot" : "solid" } };
  const more = { uid: part.name, main: i === 0, end: lines.length > 1 ? part.words : null };
  if (!sparse) return { ...line(xs, ys, breaks), ...style, ...more, counted: ys };
  // Most rows have none: what is there is joined.
  const there = rows.flatMap((_, k) => (ys[k] === null ? [] : [k]));
  return { x: there.map((k) => xs[k]), y: there.map((k) => ys[k]), mode: "lines+markers", marker: { size: 5 }, ...style, ...more, counted: there.map((k) => ys[k]) };
}
