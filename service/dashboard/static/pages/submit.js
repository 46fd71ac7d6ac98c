// A new job: from the defaults, like another job, or as a fork of one. Planned first, then launched.
import { Refused, get, query, send } from "../api.js";
import { attr, h, say, show, text } from "../dom.js";
import { draftKey } from "../form/drafts.js";
import { Editor } from "../form/spec-editor.js";
import { SpecForm } from "../form/spec-form.js";
import { PlanView } from "../form/plan-view.js";
import { schemas } from "../form/schema.js";
import { merged } from "../form/values.js";
import { count } from "../format.js";
import { untilDone } from "../polling.js";
import { go, keep, kept } from "../router.js";

const EXAMPLE = { name: "pretrain", data: { data_path: "" } };
const DATA = { keep: "go on as the parent would: the same samples in the same steps", restart: "begin data and schedule anew, with the weights" };

export const submit = { title: "Submit", open };

function open(place) {
  const state = { gone: false };
  place.append(h("h1", {}, kept("fork") ? "Fork" : "Submit"), h("p", { class: "muted" }, "The form is made from the service's schema…"));
  untilDone(async () => build(place, await load()), () => state.gone);
  return () => (state.gone = true);
}

/** What the page is made of: the schemas, and the job that is forked or followed. */
async function load() {
  const id = kept("fork") ?? kept("like");
  const found = { schemas: await schemas(), job: null, steps: [], fork: kept("fork") !== null };
  if (id === null) return found;
  try {
    found.job = await get(`/jobs/${encodeURIComponent(id)}`);
    if (found.fork) found.steps = await steps(id);
  } catch (error) {
    if (!(error instanceof Refused) || error.status !== 404) throw error;
    found.missing = id;
  }
  return found;
}

async function steps(id) {
  const { data } = await get(query(`/jobs/${encodeURIComponent(id)}/checkpoints`, { limit: 100 }));
  return data.filter((one) => one.kind === "full").map((one) => one.step);
}

function build(place, found) {
  place.replaceChildren();
  if (found.missing) place.append(h("h1", {}, "Submit"), h("p", {}, `There is no job ${found.missing}. `, h("a", { href: "/submit" }, "A new one")));
  else if (found.job && found.fork) new Fork(place, found);
  else new Submission(place, found);
}

/** A new job. What differs in a fork stands in methods of their own. */
class Submission {
  constructor(place, found) {
    Object.assign(this, found);
    this.form = new SpecForm(found.schemas, this.base(), this.whose(), () => (this.editor.follow(), this.changed()));
    this.editor = new Editor(this.form, this.words(), () => this.changed());
    this.plan = new PlanView("Plan it to see size, memory, time, and what to know before. Nothing is stored before you submit.");
    this.wrong = h("p", { class: "wrong", role: "alert", hidden: true });
    this.look = h("button", { type: "submit" }, "Plan");
    this.launch = h("button", { type: "button", class: "primary", onclick: () => this.press(true) }, this.verb());
    this.many = h("p", { class: "muted" });
    const anew = h("button", { type: "button", class: "quiet", onclick: () => this.start(this.first()) }, "Start over");
    const side = h("div", { class: "side" }, h("div", { class: "bar" }, this.look, this.launch, anew), this.many, this.wrong, this.plan.node);
    place.append(h("h1", {}, ...this.title()), h("form", { class: "submit", novalidate: true, onsubmit: (event) => (event.preventDefault(), this.press(false)) },
      h("div", { class: "what" }, this.extra(), this.editor.node), side));
    const kept_ = sessionStorage.getItem(this.draftKey());
    this.start(kept_ ?? this.first());
  }

  base() {
    return null;
  }

  whose() {
    return "default";
  }

  words() {
    return "Job spec, JSON; what is left out is as by default";
  }

  verb() {
    return "Submit";
  }

  title() {
    return this.job ? ["Submit a job like ", h("a", { href: `/jobs/${this.job.id}` }, this.job.name)] : ["Submit"];
  }

  extra() {
    return null;
  }

  draftKey() {
    return draftKey({ like: this.job?.id });
  }

  first() {
    if (!this.job) return JSON.stringify(EXAMPLE, null, 2);
    this.form.fill(this.job.spec);
    return JSON.stringify(this.form.value, null, 2);
  }

  /** What is sent where, for a plan and for a launch. */
  request(spec, launching) {
    return [launching ? "/jobs" : "/jobs/plan", spec];
  }

  start(draft) {
    this.editor.draft = draft;
    this.editor.refuse([]);
    this.plan.show(null);
    this.changed();
  }

  /** One key a draft: a second press of the button after a lost answer is the same job. */
  changed() {
    sessionStorage.setItem(this.draftKey(), this.editor.draft);
    this.key = crypto.randomUUID();
    this.planned = null;
    this.plan.stale(true);
    text(this.launch, this.verb());
    const many = this.form.changed.length;
    text(this.many, many ? `${count(many)} ${many === 1 ? "setting differs" : "settings differ"} from ${this.job && this.fork ? "the parent's" : "the defaults"}.` : "");
  }

  /** Plans; a launch goes on from there at once where the plan has no warning that was not seen. */
  async press(launching) {
    const spec = this.editor.read();
    if (!spec || this.busy) return;
    this.busy = true;
    for (const button of [this.look, this.launch]) attr(button, "aria-disabled", "true");
    try {
      const seen = this.planned !== null;
      if (!launching || !seen) await this.lookAhead(spec);
      if (launching && (seen || !this.planned.warnings.length)) await this.send(spec);
      else this.asks(launching);
    } catch (error) {
      this.refused(error);
    } finally {
      this.busy = false;
      for (const button of [this.look, this.launch]) attr(button, "aria-disabled", null);
    }
  }

  async lookAhead(spec) {
    const plan = await send("POST", ...this.request(spec, false));
    this.editor.refuse([]);
    this.tell("");
    this.plan.show(plan);
    this.planned = plan;
  }

  asks(launching) {
    const many = this.planned.warnings.length;
    if (many) text(this.launch, `${this.verb()} in spite of ${many === 1 ? "the warning" : `${many} warnings`}`);
    if (launching && many) this.plan.node.focus();
    say(many ? `Planned, with ${many} ${many === 1 ? "warning" : "warnings"}` : "Planned, without a warning");
  }

  async send(spec) {
    const job = await send("POST", ...this.request(spec, true), { "Idempotency-Key": this.key });
    sessionStorage.removeItem(this.draftKey());
    say(`${job.name}: ${job.status}`);
    go(`/jobs/${job.id}`);
  }

  refused(error) {
    const errors = error instanceof Refused ? error.errors.map((one) => this.placed(one)) : [];
    this.plan.show(null);
    this.tell(errors.length ? `${errors.length === 1 ? "One setting is" : `${errors.length} settings are`} not right yet.` : error.message);
    this.editor.refuse(errors);
  }

  placed(error) {
    return error;
  }

  tell(words) {
    show(this.wrong, words);
    text(this.wrong, words);
  }
}

/** A new job from a checkpoint of another one: only what it is to have otherwise. */
class Fork extends Submission {
  base() {
    const { spec } = this.job;
    // As the service makes it: a fork begins at the checkpoint, and has a name of its own.
    return merged(spec, { name: `${spec.name}-fork-${this.step()}`, training: { from_weight: null }, checkpoint: { from_resume: false } });
  }

  whose() {
    return "parent's";
  }

  words() {
    return "Overrides, JSON; what is left out is as in the parent";
  }

  verb() {
    return "Fork";
  }

  title() {
    return ["Fork ", h("a", { href: `/jobs/${this.job.id}` }, this.job.name)];
  }

  draftKey() {
    return draftKey({ fork: this.job.id });
  }

  first() {
    return "{}";
  }

  step() {
    const wanted = Number(kept("step") ?? NaN);
    return this.steps.includes(wanted) ? wanted : (this.steps[0] ?? null);
  }

  extra() {
    const step = h("select", { id: "fork-step", onchange: () => (keep("step", step.value), location.reload()) }, this.steps.map((one) => h("option", { value: one }, count(one))));
    step.value = this.step() ?? "";
    this.data = h("select", { id: "fork-data", onchange: () => this.changed() }, Object.entries(DATA).map(([value, words]) => h("option", { value }, words)));
    return h("div", { class: "bar from" }, h("label", { for: "fork-step" }, "From the checkpoint of step"), step, h("label", { for: "fork-data" }, "and"), this.data);
  }

  request(spec, launching) {
    return [`/jobs/${this.job.id}/fork${launching ? "" : "/plan"}`, { step: this.step(), data: this.data.value, overrides: spec }];
  }

  placed({ pointer, message }) {
    return { pointer: pointer.replace(/^\/overrides(?=\/)/, ""), message };
  }
}
