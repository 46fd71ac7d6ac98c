// The data pages: the corpora with their state, and what one of them holds.
import { ApiError, get, nullIfNotFound } from "../api.js";
import { createTable, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { NONE, ago, bytes, compactNumber, count, dateTime, duration, fewDigits, percent } from "../format.js";
import { t, tn } from "../i18n.js";
import { markUpdated, poll } from "../polling.js";
import { showStatus, statusBadge } from "../status.js";

const COLUMNS = [[t("Corpus")], [t("State")], [t("Documents"), "num"], [t("Tokens"), "num"], [t("Bytes per token"), "num"], [t("Used by")], [t("Actions")]];
const MAX_NAMED = 2; // jobs of a corpus that the list names
const FILES = [[t("File")], [t("Size"), "num"], [t("Documents"), "num"], [t("Tokens"), "num"], [t("Bad"), "num"]];
const LENGTHS = [[t("Tokens of a document"), "num"], [t("Documents"), "num"], [t("Share")]];
const BAD = [[t("File")], [t("Line"), "num"], [t("Reason")]];
const USERS = [[t("Job")], [t("Status")], [t("Owner")], [t("Step"), "num"], [t("Submitted")]];
const MAX_OLDER = 20; // jobs fetched one by one in a poll
const PAGE_SIZE = 50;
const IDLE_MS = 10_000; // The list has all reports, so it is fetched less often while nothing is being prepared.
const isGoing = (corpus) => ["queued", "preparing"].includes(corpus.status);
const COMMAND = "trainyard corpus build PATH";

export const dataPage = { title: t("Data"), open: openList };
export const corpusPage = { title: t("Corpus"), open: openCorpus };

/** The jobs that corpora name, by id: one request for the newest of them, because a list of corpora has ids only. */
const fetchJobs = async () => new Map((await get("/jobs?limit=100&fields=summary")).data.map((job) => [job.id, job]));

/** Whether a job waits for its corpus. */
const waitsForCorpus = (job) => job?.status === "preparing";

const listed = (paths) => [paths ?? []].flat();

/** The files of a corpus as [name of the source or "", path] pairs. */
function pathsOf(spec) {
  if (spec.sources) return spec.sources.flatMap((source) => listed(source.path).map((path) => [source.name, path]));
  return listed(spec.data_path).map((path) => ["", path]);
}

/** A name for a corpus: its path, or its sources. */
function nameOf({ spec }) {
  if (spec.sources) return spec.sources.map((source) => source.name).join(", ");
  const [first, ...rest] = listed(spec.data_path);
  return rest.length ? t("{path} and {n} more", { path: first, n: count(rest.length) }) : first;
}

function progressText({ progress, message }) {
  if (!progress?.total_bytes) return message ?? "";
  const done = t("{part} of {whole}", { part: bytes(progress.done_bytes), whole: bytes(progress.total_bytes) });
  const rate = progress.bytes_per_second ? `${bytes(progress.bytes_per_second)}/s` : "";
  const left = progress.eta_seconds === null ? "" : t("{duration} left", { duration: duration(progress.eta_seconds) });
  return [done, rate, left].filter(Boolean).join(t(", "));
}

class Progress {
  constructor() {
    this.meter = h("progress", { class: "meter", max: "100" });
    this.text = h("span", { class: "status-detail" });
    this.node = h("div", { class: "corpus-progress" }, this.meter, this.text);
  }

  update(corpus) {
    const going = isGoing(corpus);
    setVisible(this.node, going || ["failed", "stopped"].includes(corpus.status));
    setVisible(this.meter, going && corpus.progress?.percent !== null && corpus.progress !== null);
    setAttr(this.meter, "value", corpus.progress?.percent ?? 0);
    setAttr(this.meter, "aria-label", t("Progress of {name}", { name: nameOf(corpus) }));
    setText(this.text, going ? progressText(corpus) : corpus.message);
  }
}

function openList(place) {
  const table = createTable(COLUMNS, t("Corpora"));
  table.node.classList.add("stack");
  const total = h("span", { class: "muted" });
  const empty = h("div", { class: "empty", hidden: true }, h("h2", {}, t("No corpus yet")),
    h("p", {}, t("The files of a job are tokenized when it is submitted, before it gets devices. To tokenize a corpus without a job:")),
    h("div", { class: "command" }, h("pre", { tabindex: "0" }, COMMAND)));
  place.append(h("div", { class: "title-row" }, h("h1", {}, t("Data")), total),
    h("p", { class: "muted" }, t("Each corpus is tokenized once, on CPUs, for all jobs with the same files and tokenizer.")), empty, h("section", {}, table.node));
  let idleUntil = 0;
  return poll(async () => {
    if (Date.now() < idleUntil) return;
    const [{ data, has_more: more }, jobs] = await Promise.all([get(`/corpora?limit=${PAGE_SIZE}`), fetchJobs()]);
    idleUntil = data.some(isGoing) ? 0 : Date.now() + IDLE_MS;
    setText(total, tn(data.length, "{n} corpus", "{n} corpora", { n: `${count(data.length)}${more ? "+" : ""}` }));
    setVisible(empty, !data.length);
    setVisible(table.node, data.length);
    updateList(table.body, data, (corpus) => corpus.id, corpusRow, (row, corpus) => updateRow(row, corpus, jobs));
  });
}

function corpusRow() {
  const cells = { name: h("a", { class: "name" }), id: h("code"), made: h("span"), status: statusBadge(), progress: new Progress(),
    documents: h("td", { class: "num", "data-name": t("Documents").toLowerCase() }), tokens: h("td", { class: "num", "data-name": t("Tokens").toLowerCase() }), fit: h("td", { class: "num", "data-name": t("Bytes per token").toLowerCase() }), jobs: h("ul", { class: "plain" }), start: h("a", { class: "button" }, t("Start a run")) };
  return Object.assign(h("tr", {}, h("td", {}, cells.name, h("span", { class: "job-meta" }, cells.id, cells.made)), h("td", { class: "whole" }, cells.status, cells.progress.node),
    cells.documents, cells.tokens, cells.fit, h("td", { class: "whole" }, cells.jobs), h("td", { class: "row-actions" }, cells.start)), { inside: cells });
}

function updateRow(row, corpus, jobs) {
  const { inside: cells } = row;
  const { report } = corpus;
  setAttr(cells.name, "href", `/data/${corpus.id}`);
  setText(cells.name, nameOf(corpus));
  setText(cells.id, corpus.id);
  setText(cells.made, ago(corpus.created_at));
  setAttr(cells.made, "title", dateTime(corpus.created_at));
  showStatus(cells.status, corpus.status);
  cells.progress.update(corpus);
  const numbers = [[cells.documents, count(report?.documents)], [cells.tokens, compactNumber(report?.tokens)], [cells.fit, fewDigits(report?.bytes_per_token)]];
  setAttr(cells.start, "href", `/submit?corpus=${encodeURIComponent(corpus.id)}`);
  setAttr(cells.start, "aria-label", t("Start a run from {corpus}", { corpus: nameOf(corpus) }));
  updateUsers(cells.jobs, corpus.jobs, jobs);
  for (const [cell, text] of numbers) {
    setText(cell, text);
    cell.classList.toggle("empty-cell", text === NONE);
  }
}

/** Names the newest jobs of a corpus, with those that wait for it first, and counts the others. */
function updateUsers(list, ids, jobs) {
  const order = [...ids].sort((a, b) => waitsForCorpus(jobs.get(b)) - waitsForCorpus(jobs.get(a)));
  const more = ids.length - MAX_NAMED;
  updateList(list, [...order.slice(0, MAX_NAMED), ...(more > 0 ? [""] : [])], (id) => id, (id) => h("li", {}, id === "" ? h("span", { class: "muted" }) : h("a", { href: `/jobs/${id}` }), " ", h("span", { class: "muted" })), (part, id) => {
    setText(part.firstChild, id === "" ? t("and {n} more", { n: count(more) }) : jobs.get(id)?.name ?? id);
    setText(part.lastChild, waitsForCorpus(jobs.get(id)) ? t("waits for it") : "");
  });
}

function openCorpus(place, { id }) {
  const page = new CorpusPage(place, id);
  return page.poller;
}

class CorpusPage {
  constructor(place, id) {
    this.address = `/corpora/${encodeURIComponent(id)}`;
    this.id = id;
    this.name = h("h1", {}, id);
    this.status = statusBadge();
    this.progress = new Progress();
    this.paths = h("ul", { class: "plain" });
    this.hint = h("p", { class: "error", hidden: true });
    this.note = h("p", { class: "sentence", hidden: true });
    this.facts = h("dl", { class: "facts short" });
    this.users = createTable(USERS, t("Jobs that use the corpus"));
    this.users.node.classList.add("stack");
    this.noJobs = h("p", { class: "muted" }, t("No job."));
    this.sources = h("div");
    this.start = h("a", { class: "button primary", href: `/submit?corpus=${encodeURIComponent(id)}` }, t("Start a run from it"));
    this.body = h("div", {}, h("section", {}, h("h2", {}, t("Files")), this.paths), h("section", { hidden: true }, h("h2", {}, t("Together")), this.facts),
      this.sources, h("section", {}, h("h2", {}, t("Used by")), this.users.node, this.noJobs));
    place.append(h("p", { class: "muted" }, h("a", { href: "/data" }, t("Data"))), h("div", { class: "head" }, h("div", { class: "job-title" }, this.name, this.status, h("code", { class: "muted" }, id)),
      this.start), this.note, this.progress.node, this.hint, this.body);
    this.poller = poll(() => this.load());
  }

  async load() {
    try {
      const [corpus, jobs] = await Promise.all([get(this.address), fetchJobs()]);
      await this.fetchOlder(corpus.jobs, jobs);
      this.draw(corpus, jobs);
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 404) throw error;
      setText(this.note, t("There is no such corpus."));
      setVisible(this.note, true);
      for (const part of [this.body, this.start, this.status]) setVisible(part, false);
      this.poller();
      markUpdated();
    }
  }

  /** Fetches the jobs that are too old for the list, once each; null: it was deleted. */
  async fetchOlder(ids, jobs) {
    this.older ??= new Map();
    const unknown = ids.filter((id) => !jobs.has(id) && !this.older.has(id)).slice(0, MAX_OLDER);
    await Promise.all(unknown.map(async (id) => this.older.set(id, await get(`/jobs/${encodeURIComponent(id)}`).catch(nullIfNotFound))));
    for (const id of ids) if (!jobs.has(id) && this.older.get(id)) jobs.set(id, this.older.get(id));
  }

  draw(corpus, jobs) {
    document.title = `${nameOf(corpus)} · Trainyard`;
    setText(this.name, nameOf(corpus));
    showStatus(this.status, corpus.status);
    this.progress.update(corpus);
    setText(this.hint, corpus.error?.hint);
    setVisible(this.hint, corpus.error?.hint);
    const gone = corpus.status === "ready" && !corpus.cached ? t("Its tokens are not in the cache any more: the next job prepares it again.") : "";
    const unknown = corpus.status === "ready" && corpus.cached && !corpus.report ? t("An older release tokenized it, so it has no report.") : "";
    setText(this.note, gone || unknown);
    setVisible(this.note, gone || unknown);
    updateList(this.paths, pathsOf(corpus.spec), ([source, path]) => `${source} ${path}`, ([source, path]) => h("li", {}, source ? `${source}: ` : "", h("code", { class: "wrap" }, path)));
    updateList(this.users.body, corpus.jobs, (job) => job, userRow, (row, job) => updateUserRow(row, job, jobs.get(job)));
    setVisible(this.users.node, corpus.jobs.length);
    setVisible(this.noJobs, !corpus.jobs.length);
    this.drawReport(corpus);
  }

  drawReport({ report, spec }) {
    // The report does not change, so a selection in it is kept.
    const text = JSON.stringify(report);
    if (text === this.drawn) return;
    this.drawn = text;
    const sources = report?.sources ?? [];
    setVisible(this.facts.parentNode, sources.length > 1);
    fillFacts(this.facts, report ? corpusFacts(report) : []);
    this.sources.replaceChildren(...sources.map((source) => sourceSection(source, sources.length > 1, spec.tokenizer_path)));
  }
}

function userRow(id) {
  const cells = { name: h("a", { class: "name", href: `/jobs/${id}` }), status: statusBadge(), detail: h("span", { class: "status-detail" }), owner: h("td", { "data-name": t("Owner").toLowerCase() }), step: h("td", { class: "num", "data-name": t("Step").toLowerCase() }), made: h("td", { "data-name": t("Submitted").toLowerCase() }) };
  return Object.assign(h("tr", {}, h("td", {}, cells.name), h("td", { class: "whole" }, cells.status, cells.detail), cells.owner, cells.step, cells.made), { inside: cells });
}

/** `job`: null if it was deleted. */
function updateUserRow({ inside: cells }, id, job) {
  setText(cells.name, job?.name ?? id);
  setVisible(cells.status, job);
  if (job) showStatus(cells.status, job.status);
  setText(cells.detail, job ? (waitsForCorpus(job) ? t("waits for this corpus") : "") : t("deleted"));
  setText(cells.owner, job?.owner ?? NONE);
  setText(cells.step, job?.progress ? count(job.progress.step) : NONE);
  setText(cells.made, job ? ago(job.created_at) : NONE);
  setAttr(cells.made, "title", job ? dateTime(job.created_at) : null);
}

const share = (value) => (value > 0 && value < 0.001 ? t("below 0.1 %") : value === 0 ? "0 %" : percent(100 * (value ?? NaN)));

function corpusFacts(report) {
  return [[t("Files"), count(report.files)], [t("Size"), bytes(report.bytes)], [t("Documents"), count(report.documents)], [t("Tokens"), count(report.tokens)],
    [t("Bad documents"), count(report.bad_documents)], [t("Bytes per token"), fewDigits(report.bytes_per_token)], [t("Bytes of characters without a token"), share(report.single_byte_share)]];
}

function fillFacts(list, facts) {
  list.replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function sourceFacts(source, tokenizer) {
  const special = source.special_tokens ? [[t("Special tokens in the texts"), t("{n} in {texts} texts", { n: count(source.special_tokens), texts: count(source.special_texts) })]] : [];
  return [[t("Files"), count(source.files)], [t("Size"), bytes(source.bytes)], [t("Documents"), count(source.documents)], [t("Copies of an earlier document"), count(source.duplicates)],
    [t("Tokens"), count(source.tokens)], [t("Tokenizer"), tokenizer], [t("Bytes per token"), fewDigits(source.bytes_per_token)],
    [t("Bytes of characters without a token"), share(source.single_byte_share)], [t("Tokens that occur"), t("{n} of {all}", { n: count(source.vocab_used), all: count(source.vocab_size) })], ...special];
}

function sourceSection(source, several, tokenizer) {
  const facts = h("dl", { class: "facts" });
  fillFacts(facts, sourceFacts(source, tokenizer));
  const parts = [h("div", { class: "source-numbers" }, h("div", {}, h("h3", {}, t("Contents")), facts), lengthsPart(source)), badPart(source), samplesPart(source), filesPart(source)];
  return h("section", { class: "source" }, h("h2", {}, several ? t("Source {name}", { name: source.name }) : t("Contents and fit")), ...parts.filter(Boolean));
}

function rowsOf(table, rows) {
  table.body.append(...rows.map((cells) => h("tr", {}, ...cells)));
  return table.node;
}

const number = (text) => h("td", { class: "num" }, text);

function lengthsPart(source) {
  const most = Math.max(...source.lengths.map((bucket) => bucket.documents));
  const label = ({ min, max }) => (min === max ? count(min) : t("{low} to {high}", { low: count(min), high: count(max) }));
  const table = createTable(LENGTHS, t("Lengths of the documents of {name}", { name: source.name }));
  const bar = (bucket) => h("progress", { class: "meter bar-of-table", max: most, value: bucket.documents, "aria-label": t("Documents of {range} tokens", { range: label(bucket) }) });
  return h("div", {}, h("h3", {}, t("Lengths")), rowsOf(table, source.lengths.map((bucket) => [number(label(bucket)), number(count(bucket.documents)), h("td", { class: "bar-cell" }, bar(bucket))])));
}

function badPart(source) {
  if (!source.bad_documents) return null;
  const rest = source.bad_documents - source.bad.length;
  const rows = source.bad.map((bad) => [h("td", {}, h("code", { class: "wrap" }, bad.file)), number(count(bad.line)), h("td", {}, bad.reason)]);
  return h("div", {}, h("h3", {}, t("Bad documents: {n} left out", { n: count(source.bad_documents) })), rowsOf(createTable(BAD, t("Bad documents of {name}", { name: source.name })), rows),
    rest > 0 && h("p", { class: "muted" }, t("And {n} more.", { n: count(rest) })));
}

function samplesPart(source) {
  const sample = (one) => h("figure", { class: "document" }, h("figcaption", { class: "muted" }, h("code", { class: "wrap" }, one.file), tn(one.tokens, ", document {document}, {n} token", ", document {document}, {n} tokens", { document: count(one.document), n: count(one.tokens) })),
    h("pre", { tabindex: "0" }, one.text, one.truncated && "…"));
  return h("div", {}, h("h3", {}, t("Samples")), h("div", { class: "documents" }, source.samples.map(sample)));
}

function filesPart(source) {
  if (source.files < 2) return null;
  const rest = source.files - source.listed.length;
  const rows = source.listed.map((file) => [h("td", {}, h("code", { class: "wrap" }, file.file)), number(bytes(file.bytes)), number(count(file.documents)), number(count(file.tokens)), number(count(file.bad_documents))]);
  return h("details", {}, h("summary", {}, t("{n} files", { n: count(source.files) })), rowsOf(createTable(FILES, t("Files of {name}", { name: source.name })), rows), rest > 0 && h("p", { class: "muted" }, t("And {n} more.", { n: count(rest) })));
}
