// Folds jobs that belong together to one row and one curve. Pure.
import { toNumber } from "../chart-data.js";
import { t } from "../i18n.js";
import { flatten } from "../spec-diff.js";

export const FOLDS = { "": t("no"), group: t("by group"), seeds: t("over seeds") };

const MAX_MEAN_POINTS = 1000;
/** Settings that do not change what is trained, and the seed. */
const NOT_COMPARED = new Set(["name", "description", "group", "training.seed", "resources.priority"]);

const settingsKeys = new WeakMap();

function settingsKey(spec) {
  let key = settingsKeys.get(spec);
  if (key === undefined) {
    key = JSON.stringify(flatten(spec).filter(([name]) => !NOT_COMPARED.has(name) && !name.startsWith("labels.") && !name.startsWith("reporting.")));
    settingsKeys.set(spec, key);
  }
  return key;
}

/** Returns a text that is the same for jobs that fold together; null for a job that folds with none. */
export function foldKey(job, fold) {
  if (fold === "group") return job.group;
  if (fold === "seeds" && job.spec) return `${job.group ?? ""} ${settingsKey(job.spec)}`;
  return null;
}

/** Returns `[{key, jobs}]` in the order of the first job of each; a fold of one job has its id as key. */
export function foldJobs(jobs, fold) {
  const folds = new Map();
  for (const job of jobs) {
    const key = foldKey(job, fold) ?? job.id;
    if (folds.has(key)) folds.get(key).push(job);
    else folds.set(key, [job]);
  }
  return [...folds].map(([key, members]) => ({ key: members.length > 1 ? `fold-${shortHash(key)}` : members[0].id, jobs: members }));
}

/** FNV-1a as text: the keys of open folds are in the address. */
function shortHash(text) {
  let hash = 0x811c9dc5;
  for (let i = 0; i < text.length; i += 1) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  return (hash >>> 0).toString(36);
}

/** The name of a fold: the group, or what the names of its jobs begin with. */
export function foldName(jobs) {
  if (jobs.length === 1) return jobs[0].name;
  const names = jobs.map((job) => job.name);
  let common = names[0];
  for (const name of names) while (!name.startsWith(common)) common = common.slice(0, -1);
  const start = common.replace(/[\s._-]*(s|seed)?[\s._-]*\d*$/i, "");
  return start || jobs[0].group || names[0];
}

/**
 * Returns `{x, mean, low, high, whole}` of lines `[{x, y}]` of numbers: at every x of any line, over the lines that have begun and not ended there.
 * `whole`: whether all lines have a value there. Between its points a line is straight.
 */
export function meanOfLines(lines) {
  const finite = lines.map(({ x, y }) => x.map((each, i) => [toNumber(each), y[i]]).filter(([each, value]) => Number.isFinite(each) && Number.isFinite(value)).sort(([a], [b]) => a - b)).filter((points) => points.length);
  const every = [...new Set(finite.flatMap((points) => points.map(([x]) => x)))].sort((a, b) => a - b);
  const stride = Math.ceil(every.length / MAX_MEAN_POINTS);
  const result = { x: every.filter((_, i) => i % stride === 0 || i === every.length - 1), mean: [], low: [], high: [], whole: [] };
  const places = finite.map(() => 0);
  for (const x of result.x) {
    const values = finite.map((points, line) => {
      while (places[line] < points.length - 1 && points[places[line]][0] < x) places[line] += 1;
      return valueAt(points, places[line], x);
    }).filter((value) => value !== null);
    result.mean.push(values.reduce((sum, value) => sum + value, 0) / values.length);
    result.low.push(Math.min(...values));
    result.high.push(Math.max(...values));
    result.whole.push(values.length === finite.length);
  }
  return result;
}

/** `place`: the first point at x or after it. */
function valueAt(points, place, x) {
  const [at, value] = points[place];
  if (at === x) return value;
  if (at < x || place === 0) return null;
  const [before, earlier] = points[place - 1];
  return earlier + ((value - earlier) * (x - before)) / (at - before);
}
