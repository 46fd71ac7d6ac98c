// The submit page: a new job from the defaults, like another job, or as a fork. It is planned before it is launched.
import { ApiError, get, getAll, randomKey, sendJson } from "../api.js";
import { announce, h, setAttr, setText, setVisible } from "../dom.js";
import { draftKey } from "../form/draft.js";
import { PlanView } from "../form/plan-view.js";
import { fetchSchemas, formatValue, mergeSpecs } from "../form/schema.js";
import { SpecEditor, SpecForm } from "../form/spec-form.js";
import { count } from "../format.js";
import { t, tNodes, tn } from "../i18n.js";
import { retryUntilReachable } from "../polling.js";
import { getParam, navigate, setParam } from "../router.js";
import { wordFor } from "../status.js";
import { tabStorage } from "../storage.js";

const PLAN_DELAY_MS = 500; // after the last change
const DIAL_DELAY_MS = 150;
const EXAMPLE = { name: "pretrain", data: { data_path: "" } };
const DATA_CHOICES = { keep: t("continue data and schedule as the parent: the same samples in the same steps"), restart: t("restart data and schedule, keep the weights") };

const NOT_IN_TOKENS = ["max_seq_len", "packing", "eval_fraction", "num_workers"];
/** The settings of a corpus that decide its tokens; the others are those of the job that it was first prepared for. */
const tokenFields = (data) => Object.fromEntries(Object.entries(data).filter(([name]) => !NOT_IN_TOKENS.includes(name)));

export const submitPage = { title: t("Submit"), open };

function open(place) {
  const state = { isClosed: false };
  place.append(h("h1", {}, getParam("fork") ? t("Fork") : t("Submit")), h("p", { class: "muted" }, t("Loading the form…")));
  retryUntilReachable(async () => (state.form = buildPage(place, await load())), () => state.isClosed);
  return () => {
    state.isClosed = true;
    state.form?.close();
  };
}

/** Fetches the schemas, and the job to fork or to copy, or the corpus to train on. */
async function load() {
  const id = getParam("fork") ?? getParam("like");
  const corpus = getParam("corpus");
  const source = { schemas: await fetchSchemas(), job: null, corpus: null, steps: [], fork: getParam("fork") !== null };
  if (id === null && corpus === null) return source;
  try {
    if (id === null) source.corpus = await get(`/corpora/${encodeURIComponent(corpus)}`);
    else source.job = await get(`/jobs/${encodeURIComponent(id)}`);
    if (source.fork) source.steps = await fullCheckpointSteps(id);
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 404) throw error;
    source.missing = id === null ? t("There is no corpus {id}.", { id: corpus }) : t("There is no job {id}.", { id });
  }
  return source;
}

async function fullCheckpointSteps(id) {
  const checkpoints = await getAll(`/jobs/${encodeURIComponent(id)}/checkpoints`);
  return checkpoints.filter((checkpoint) => checkpoint.kind === "full").map((checkpoint) => checkpoint.step);
}

/** Returns the form, or null if what it starts from is not there. */
function buildPage(place, source) {
  place.replaceChildren();
  if (!source.missing) return source.job && source.fork ? new ForkForm(place, source) : new SubmitForm(place, source);
  place.append(h("h1", {}, t("Submit")), h("p", {}, source.missing, " ", h("a", { href: "/submit" }, t("Submit a new job"))));
  return null;
}

/** Form of a new job. `ForkForm` overrides what differs for a fork. */
class SubmitForm {
  constructor(place, source) {
    Object.assign(this, source);
    this.form = new SpecForm(source.schemas, this.base(), this.baseName(), () => (this.editor.updateJson(), this.changed()));
    this.editor = new SpecEditor(this.form, this.jsonLabel(), () => this.changed());
    this.plan = new PlanView(t("Size, memory, time and warnings are shown here as you type, once the data is chosen. Nothing is stored until you submit."), (changes) => this.applyChanges(changes));
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.planButton = h("button", { type: "submit" }, t("Plan"));
    this.launchButton = h("button", { type: "button", class: "primary", onclick: () => this.press(true) }, this.verb());
    this.changeCount = h("p", { class: "muted" });
    const startOver = h("button", { type: "button", class: "quiet", onclick: () => this.start(this.initialDraft()) }, t("Start over"));
    const side = h("div", { class: "side" }, h("div", { class: "bar" }, this.planButton, this.launchButton, startOver), this.changeCount, this.error, this.plan.node);
    place.append(h("h1", {}, ...this.title()), h("form", { class: "submit", novalidate: true, onsubmit: (event) => (event.preventDefault(), this.press(false)) },
      h("div", { class: "what" }, this.forkControls(), this.depthControls(), this.editor.node), side));
    const storedDraft = tabStorage.get(this.draftKey());
    this.start(storedDraft ?? this.initialDraft());
  }

  base() {
    return null;
  }

  baseName() {
    return t("default");
  }

  jsonLabel() {
    return t("Job spec as JSON; settings that are left out have their default");
  }

  verb() {
    return t("Submit");
  }

  title() {
    if (this.corpus) return tNodes("Submit a job with the corpus {corpus}", { corpus: h("a", { href: `/data/${this.corpus.id}` }, this.corpus.id) });
    return this.job ? tNodes("Submit a job like {job}", { job: h("a", { href: `/jobs/${this.job.id}` }, this.job.name) }) : [t("Submit")];
  }

  forkControls() {
    return null;
  }

  /** The depth dial: proposes all sizes for a number of layers, each with its reason. The spec is changed only on request. */
  depthControls() {
    const range = { min: "1", step: "1" };
    const dial = h("input", { type: "range", max: "48", value: "12", "aria-label": t("Depth, as a dial"), ...range });
    const depth = h("input", { type: "number", max: "128", value: "12", "aria-label": t("Depth"), ...range });
    const shown = h("div", { "aria-live": "polite" });
    const close = () => shown.replaceChildren();
    let [timer, latest] = [null, 0];
    const propose = async () => {
      const spec = this.editor.peek();
      if (!spec) return;
      const number = (latest += 1);
      const { data_path: path, ...data } = spec.data ?? {};
      try {
        const proposal = await sendJson("POST", "/jobs/proposal", { depth: Number(depth.value), spec: { ...spec, data: path ? { ...data, data_path: path } : data } });
        if (number === latest) shown.replaceChildren(...this.proposalParts(proposal, close));
      } catch (error) {
        if (number !== latest) return;
        const errors = error instanceof ApiError ? error.errors.map((problem) => ({ ...problem, pointer: problem.pointer.replace(/^\/spec/, "") })) : [];
        const isDepth = errors.some(({ pointer }) => pointer === "/depth");
        shown.replaceChildren(h("p", { class: "error" }, isDepth ? t("Depth must be a whole number from 1 to 128.") : error.message));
        if (!isDepth) this.editor.showErrors(errors, { isTyping: true });
      }
    };
    const proposeSoon = () => {
      clearTimeout(timer);
      timer = setTimeout(propose, DIAL_DELAY_MS);
    };
    dial.addEventListener("input", () => ((depth.value = dial.value), proposeSoon()));
    depth.addEventListener("input", () => ((dial.value = depth.value), proposeSoon()));
    return h("div", { class: "depth" }, h("div", { class: "bar" }, h("button", { type: "button", onclick: propose }, t("Propose sizes for a depth of")), dial, depth, h("span", { class: "muted" }, t("layers"))), shown);
  }

  /** `done()` is called when the proposal was used or put away. */
  proposalParts(proposal, done) {
    const changes = {};
    for (const { pointer, value } of proposal.settings) {
      const [group, field] = pointer.slice(1).split("/");
      (changes[group] ??= {})[field] = value;
    }
    const use = () => (done(), this.applyChanges(changes));
    const rows = proposal.settings.map(({ pointer, value, reason, source }) => h("tr", {}, h("th", { scope: "row" }, pointer.split("/").at(-1)), h("td", { class: "num" }, Number.isInteger(value) ? count(value) : formatValue(value)), h("td", { class: "muted" }, reason, source ? ` [${source}]` : "")));
    return [h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("Proposal") }, h("table", {}, h("caption", { class: "visually-hidden" }, t("Proposed settings")), h("tbody", {}, rows))),
      h("div", { class: "bar" }, h("button", { type: "button", class: "primary", onclick: use }, t("Use these values")), h("button", { type: "button", class: "quiet", onclick: done }, t("Close")))];
  }

  draftKey() {
    return draftKey({ like: this.job?.id, corpus: this.corpus?.id });
  }

  initialDraft() {
    if (!this.job && !this.corpus) return JSON.stringify(EXAMPLE, null, 2);
    this.form.setSpec(this.job?.spec ?? { name: EXAMPLE.name, data: tokenFields(this.corpus.spec) });
    return JSON.stringify(this.form.value, null, 2);
  }

  /** Returns path and body of the request that plans or launches. */
  request(spec, launching) {
    return [launching ? "/jobs" : "/jobs/plan", spec];
  }

  start(draft) {
    this.editor.draft = draft;
    this.editor.showErrors([]);
    this.plan.show(null);
    this.changed();
  }

  /** Changes settings, and plans again. */
  applyChanges(changes) {
    const spec = this.editor.read();
    if (!spec) return;
    this.editor.draft = JSON.stringify(mergeSpecs(spec, changes), null, 2);
    this.changed();
    this.press(false);
  }

  /** One idempotency key per draft: pressing again after a lost response does not create a second job. */
  changed() {
    tabStorage.set(this.draftKey(), this.editor.draft);
    this.idempotencyKey = randomKey();
    this.planned = null;
    this.plan.stale(true);
    this.planSoon();
    setText(this.launchButton, this.verb());
    const total = this.form.changed.length;
    const differ = this.job && this.fork ? tn(total, "{n} setting differs from the parent's.", "{n} settings differ from the parent's.", { n: count(total) })
      : tn(total, "{n} setting differs from the defaults.", "{n} settings differ from the defaults.", { n: count(total) });
    setText(this.changeCount, total ? differ : "");
  }

  planSoon() {
    this.stopPlanning();
    this.timer = setTimeout(() => this.planQuietly(), PLAN_DELAY_MS);
  }

  /** A plan that is under way is of the spec before. */
  stopPlanning() {
    clearTimeout(this.timer);
    this.planNumber = (this.planNumber ?? 0) + 1;
  }

  /** Plans what was typed so far. The focus stays, and an older plan stays until there is another one. */
  async planQuietly() {
    const spec = this.editor.peek();
    if (this.busy || !spec || !this.hasData(spec)) return;
    const number = (this.planNumber += 1);
    const isCurrent = () => number === this.planNumber && !this.busy;
    try {
      const plan = await sendJson("POST", ...this.request(spec, false));
      if (!isCurrent()) return;
      this.editor.showErrors([], { isTyping: true });
      this.showError("");
      this.plan.show(plan, this.form.valueAt("training", "batch_size"));
    } catch (error) {
      if (!isCurrent()) return;
      const errors = error instanceof ApiError ? error.errors.map((problem) => this.toFormPointer(problem)) : [];
      this.editor.showErrors(errors, { isTyping: true });
      this.plan.setState(errors.length ? t("Not planned: {problems}", { problems: errors.map((problem) => `${problem.pointer.split("/").at(-1)} ${problem.message}`).join("; ") }) : error.message);
    }
  }

  /** Whether the data is chosen; without it there is nothing to plan. */
  hasData({ data }) {
    return Boolean(data?.data_path?.length || data?.sources?.length);
  }

  close() {
    this.stopPlanning();
  }

  /** Plans, and then launches if requested and the plan has no warning that the user has not seen. */
  async press(launching) {
    const spec = this.editor.read();
    if (!spec || this.busy) return;
    this.stopPlanning();
    this.busy = true;
    for (const button of [this.planButton, this.launchButton]) setAttr(button, "aria-disabled", "true");
    try {
      const seen = this.planned !== null;
      if (!launching || !seen) await this.fetchPlan(spec);
      if (launching && (seen || !this.planned.warnings.length)) await this.send(spec);
      else this.askToConfirm(launching);
    } catch (error) {
      this.handleError(error);
    } finally {
      this.busy = false;
      for (const button of [this.planButton, this.launchButton]) setAttr(button, "aria-disabled", null);
    }
  }

  async fetchPlan(spec) {
    const plan = await sendJson("POST", ...this.request(spec, false));
    this.editor.showErrors([]);
    this.showError("");
    this.plan.show(plan, this.form.valueAt("training", "batch_size"));
    this.planned = plan;
  }

  askToConfirm(launching) {
    const total = this.planned.warnings.length;
    if (total) setText(this.launchButton, tn(total, "{verb} despite the warning", "{verb} despite {n} warnings", { verb: this.verb() }));
    if (launching && total) this.plan.node.focus();
    announce(total ? tn(total, "Planned with {n} warning", "Planned with {n} warnings") : t("Planned without warnings"));
  }

  async send(spec) {
    const job = await sendJson("POST", ...this.request(spec, true), { "Idempotency-Key": this.idempotencyKey });
    tabStorage.remove(this.draftKey());
    announce(`${job.name}: ${wordFor(job.status)}`);
    navigate(`/jobs/${job.id}`);
  }

  handleError(error) {
    const errors = error instanceof ApiError ? error.errors.map((problem) => this.toFormPointer(problem)) : [];
    this.plan.show(null);
    this.showError(errors.length ? tn(errors.length, "One setting is not valid.", "{n} settings are not valid.") : error.message);
    this.editor.showErrors(errors);
  }

  toFormPointer(error) {
    return error;
  }

  showError(message) {
    setVisible(this.error, message);
    setText(this.error, message);
  }
}

/** Form of a fork: only overrides of the parent's spec. */
class ForkForm extends SubmitForm {
  depthControls() {
    return null;
  }

  base() {
    const { spec } = this.job;
    // The same as the service does: a fork starts at the checkpoint and has its own name.
    return mergeSpecs(spec, { name: `${spec.name}-fork-${this.step()}`, training: { from_weight: null }, checkpoint: { from_resume: false } });
  }

  baseName() {
    return t("parent's");
  }

  jsonLabel() {
    return t("Overrides as JSON; settings that are left out are the parent's");
  }

  verb() {
    return t("Fork");
  }

  title() {
    return tNodes("Fork {job}", { job: h("a", { href: `/jobs/${this.job.id}` }, this.job.name) });
  }

  draftKey() {
    return draftKey({ fork: this.job.id });
  }

  initialDraft() {
    return "{}";
  }

  step() {
    const wanted = Number(getParam("step") ?? NaN);
    return this.steps.includes(wanted) ? wanted : (this.steps[0] ?? null);
  }

  forkControls() {
    const step = h("select", { id: "fork-step", onchange: () => (setParam("step", step.value), location.reload()) }, this.steps.map((number) => h("option", { value: number }, count(number))));
    step.value = this.step() ?? "";
    this.dataSelect = h("select", { id: "fork-data", onchange: () => this.changed() }, Object.entries(DATA_CHOICES).map(([value, label]) => h("option", { value }, label)));
    return h("div", { class: "bar from" }, h("label", { for: "fork-step" }, t("From the checkpoint at step")), step, h("label", { for: "fork-data" }, t("and")), this.dataSelect);
  }

  request(spec, launching) {
    return [`/jobs/${this.job.id}/fork${launching ? "" : "/plan"}`, { step: this.step(), data: this.dataSelect.value, overrides: spec }];
  }

  hasData() {
    return true;
  }

  toFormPointer({ pointer, message }) {
    return { pointer: pointer.replace(/^\/overrides(?=\/)/, ""), message };
  }
}
