// Definitions of all charts of a job except the main loss chart: lines, number format, initial y axis. Pure.
import { chartLabel, lineWithGaps } from "../chart-data.js";
import { bytes, compactNumber, fewDigits, loss, percent } from "../format.js";

const fieldLine = (name, words) => ({ name, words, of: (row) => row[name] ?? null, fields: [name] });
const SI = "~s";
const PERCENT = ".3~p";
const shareText = (value) => percent(value === null || value === undefined ? null : value * 100);

/** The small charts below the loss. */
export const SMALL_CHARTS = [
  { name: "Learning rate", lines: [fieldLine("learning_rate", "rate")], format: fewDigits },
  { name: "Gradient norm", lines: [fieldLine("grad_norm", "norm")], format: fewDigits, log: true },
  { name: "Tokens/s", lines: [fieldLine("tokens_per_second", "tokens/s")], format: compactNumber, ticks: SI },
  { name: "Step time (s)", lines: [fieldLine("step_seconds", "step"), fieldLine("data_seconds", "data")], format: fewDigits, log: true },
];

/** The charts of the metrics tab. */
export const ALL_CHARTS = [
  { name: "Train loss", lines: [{ name: "loss_ema", words: "smoothed", of: (row) => row.loss_ema, fields: [] }, { name: "loss", words: "last", of: (row) => row.loss, fields: [], faint: true }], format: loss },
  { name: "Evaluation loss", lines: [fieldLine("eval_loss", "evaluation")], format: loss, sparse: true },
  ...SMALL_CHARTS,
  { name: "Model FLOPs utilization", lines: [fieldLine("mfu", "MFU")], format: shareText, ticks: PERCENT },
  { name: "Peak memory", lines: [fieldLine("memory_bytes", "bytes")], format: bytes, ticks: SI },
  { name: "Perplexity", lines: [{ name: "perplexity", words: "exp(loss)", of: (row) => (row.loss_ema === null ? null : Math.exp(row.loss_ema)), fields: [] }], format: fewDigits, log: true },
  { name: "Loss range within a point", lines: [{ name: "spread", words: "spread", of: (row) => (row.loss_max === null ? null : row.loss_max - row.loss_min), fields: [] }], format: fewDigits },
  { name: "Data wait as share of step time", lines: [{ name: "waiting", words: "share", of: (row) => (row.step_seconds && row.data_seconds !== null ? row.data_seconds / row.step_seconds : null), fields: ["step_seconds", "data_seconds"] }], format: shareText, ticks: PERCENT },
  { name: "Tokens", lines: [fieldLine("tokens", "tokens")], format: compactNumber, ticks: SI },
  { name: "Epoch", lines: [fieldLine("epoch", "epoch")], format: fewDigits },
  { name: "Auxiliary loss", lines: [fieldLine("aux_loss", "auxiliary")], format: fewDigits },
  { name: "Expert load, highest and lowest", lines: [expertLine("highest", Math.max), expertLine("lowest", Math.min)], format: shareText, ticks: PERCENT },
];

function expertLine(words, pick) {
  return { name: words, words, of: (row) => (row.expert_load?.length ? pick(...row.expert_load) : null), fields: ["expert_load"] };
}

/** Returns what `Chart.show` takes. */
export function chartContent(one, { rows, xs, breaks, colors, shapes }) {
  const traces = one.lines.map((part, i) => lineTrace(part, i, one, { rows, xs, breaks, colors }));
  const values = rows.map((row) => [row.step.toLocaleString("en-US"), ...one.lines.map((part) => one.format(part.of(row)))]);
  const [first] = one.lines;
  return { traces, values, shapes, columns: ["step", ...one.lines.map((part) => part.words)], label: chartLabel(one.name, rows, first.of, one.format),
    now: one.format(rows.findLast((row) => first.of(row) !== null)?.[first.name] ?? first.of(rows.at(-1) ?? {}) ?? null) };
}

function lineTrace(part, i, { sparse, lines }, { rows, xs, breaks, colors }) {
  const ys = rows.map(part.of);
  const style = { line: { width: part.faint ? 1 : 1.5, color: part.faint ? `${colors[0]}73` : colors[i], dash: i && !part.faint ? "dot" : "solid" } };
  const more = { uid: part.name, main: i === 0, end: lines.length > 1 ? part.words : null };
  if (!sparse) return { ...lineWithGaps(xs, ys, breaks), ...style, ...more, counted: ys };
  // Most rows have no value: connect those that have one.
  const there = rows.flatMap((_, k) => (ys[k] === null ? [] : [k]));
  return { x: there.map((k) => xs[k]), y: there.map((k) => ys[k]), mode: "lines+markers", marker: { size: 5 }, ...style, ...more, counted: there.map((k) => ys[k]) };
}
