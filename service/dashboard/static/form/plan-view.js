// Shows a plan: memory, learning rate, size, time, sources and queue position of a run, with warnings.
import { h, setAttr, setText, setVisible, svg, updateList } from "../dom.js";
import { NONE, bytes, compactNumber, count, duration, fewDigits, loss, percent } from "../format.js";
import { t, tn } from "../i18n.js";

const PARTS = ["weights", "gradients", "optimizer", "activations"];
const PART_NAMES = { weights: t("weights"), gradients: t("gradients"), optimizer: t("optimizer state"), activations: t("activations"), copies: t("copies for saving") };
const sumOf = (parts) => parts.reduce((sum, [, size]) => sum + size, 0);

/** Returns [key, bytes] pairs of what is compared with the limit: a rank on its GPU, or all ranks on the host, with the copies that a save is written from. */
function memoryParts({ device, memory_bytes: memory, world_size: ranks, snapshot_bytes: copies }) {
  const onHost = device === "cpu";
  const parts = PARTS.map((name) => [name, (memory?.[name] ?? 0) * (onHost ? ranks ?? 1 : 1)]);
  return [...parts, ["copies", onHost && sumOf(parts) ? copies ?? 0 : 0]].filter(([, size]) => size > 0);
}

/** From this part of the memory on, the service warns that the run may not fit. */
const TIGHT = 0.9;

const partClass = (name) => `part-${name}`;

export class PlanView {
  /** `apply(changes)` is called to use other settings: those with which a run fits, or the largest batch. */
  constructor(none, apply) {
    this.apply = apply;
    this.none = h("p", { class: "muted" }, none);
    this.state = h("p", { class: "muted", role: "status", hidden: true });
    this.warnings = h("ul", { class: "alerts", "aria-label": t("Warnings") });
    this.advice = h("ul", { class: "advice muted", "aria-label": t("Advice") });
    this.memory = new MemoryBar(apply);
    this.facts = h("dl", { class: "facts", hidden: true });
    this.sources = new SourcesTable();
    this.curve = new RateCurve();
    this.heading = h("h2", {}, t("Plan"));
    this.node = h("section", { class: "plan", tabindex: "-1", "aria-label": t("Plan") }, this.heading, this.none, this.state, this.warnings, this.advice, this.memory.node, this.curve.node, this.facts, this.sources.node);
  }

  /** Shows a plan, or none if null. `batchSize`: that of its spec. */
  show(plan, batchSize = null) {
    setVisible(this.none, !plan);
    setVisible(this.facts, plan);
    this.setState("");
    this.stale(false);
    this.curve.show(plan?.learning_rate ?? []);
    updateList(this.warnings, plan?.warnings ?? [], (warning) => warning, () => h("li"), (part, warning) => setText(part, warning));
    updateList(this.advice, plan?.advice ?? [], (advice) => advice, () => h("li"), (part, advice) => setText(part, advice));
    this.memory.show(plan, batchSize);
    this.sources.show(plan?.sources ?? []);
    if (!plan) return;
    updateList(this.facts, planFacts(plan), ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd")), (part, [, value, more]) => {
      setText(part.lastChild, value);
      setAttr(part.lastChild, "title", more);
    });
  }

  /** Shows what keeps the plan from being made again. */
  setState(text) {
    setText(this.state, text);
    setVisible(this.state, text);
  }

  /** Marks the plan as older than the last change of the spec. */
  stale(is) {
    const isOld = is && !this.facts.hidden;
    setText(this.heading, isOld ? t("Plan before the last changes") : t("Plan"));
    this.node.classList.toggle("old", isOld);
  }
}

/** The memory of a rank by part, against that of its device, with settings with which the run would fit and the largest batch. */
class MemoryBar {
  constructor(apply) {
    this.apply = apply;
    this.text = h("p", { class: "fit" });
    this.bar = h("div", { class: "memory-bar", role: "img" });
    this.parts = h("ul", { class: "memory-parts" });
    this.would = h("p", { class: "would", hidden: true }, t("This would fit: "));
    this.useFit = h("button", { type: "button" });
    this.would.append(this.useFit);
    this.batch = h("p", { class: "would", hidden: true });
    this.useBatch = h("button", { type: "button" });
    this.batchText = h("span");
    this.batch.append(this.batchText, this.useBatch);
    this.options = h("tbody");
    const head = [t("Other settings"), t("Memory"), ""].map((label, i) => h("th", { scope: "col", class: i === 1 ? "num" : "" }, label));
    this.more = h("details", { hidden: true }, h("summary", { class: "muted" }, t("Memory with other settings")),
      h("table", {}, h("caption", { class: "visually-hidden" }, t("Memory of each rank with other settings")), h("thead", {}, h("tr", {}, head)), this.options));
    this.node = h("div", { class: "memory", hidden: true }, this.text, this.bar, this.parts, this.would, this.batch, this.more);
  }

  show(plan, batchSize) {
    const parts = plan ? memoryParts(plan) : [];
    const total = sumOf(parts);
    setVisible(this.node, total);
    if (!total) return;
    const limit = plan.memory_limit_bytes;
    const fits = limit === null ? null : total <= limit;
    const where = plan.device === "cpu" ? t("this host, for all ranks") : t("{device}, for each rank", { device: plan.device_name ?? t("the device") });
    const verdict = !fits ? t("✗ Does not fit") : total > TIGHT * limit ? t("? May not fit") : t("✓ Fits");
    const shown = fits === null ? t("Memory of each rank: {size}", { size: bytes(total) }) : t("{verdict}: {part} of {whole} of {where}", { verdict, part: bytes(total), whole: bytes(limit), where });
    setText(this.text, shown);
    this.text.classList.toggle("error", fits === false);
    const scale = Math.max(total, limit ?? 0);
    setAttr(this.bar, "aria-label", `${shown}. ${parts.map(([name, size]) => `${PART_NAMES[name]} ${bytes(size)}`).join(t(", "))}`);
    updateList(this.bar, [...parts, ["limit", fits === false ? limit : 0]], ([name]) => name, ([name]) => h("span", { class: partClass(name) }), (part, [name, size]) => {
      if (name === "limit") part.style.left = `${(100 * size) / scale}%`;
      else part.style.width = `${(100 * size) / scale}%`;
      setVisible(part, size);
    });
    updateList(this.parts, parts, ([name]) => name, ([name]) => h("li", {}, h("span", { class: `key ${partClass(name)}`, "aria-hidden": "true" }), PART_NAMES[name], h("span", { class: "num" })), (part, [, size]) => setText(part.lastChild, bytes(size)));
    this.showFit(plan.settings_that_fit);
    this.showBatch(plan.suggested_batch_size, batchSize);
    this.showOptions(plan.memory_options ?? []);
  }

  /** `changes`: settings with which a run fits that does not, by group and field, or null. */
  showFit(changes) {
    setVisible(this.would, changes);
    if (!changes) return;
    const settings = Object.values(changes).flatMap((fields) => Object.entries(fields)).map(([name, value]) => `${name} ${value}`);
    setText(this.useFit, t("Use {settings}", { settings: settings.join(t(" and ")) }));
    this.useFit.onclick = () => this.apply(changes);
  }

  showBatch(largest, current) {
    setVisible(this.batch, largest);
    if (!largest) return;
    setText(this.batchText, t("Largest batch_size that fits: {n} ", { n: count(largest) }));
    setVisible(this.useBatch, largest !== current);
    setText(this.useBatch, t("Use {settings}", { settings: count(largest) }));
    this.useBatch.onclick = () => this.apply({ training: { batch_size: largest } });
  }

  showOptions(options) {
    setVisible(this.more, options.length > 1);
    const name = (option) => `${option.parallelism}${option.gradient_checkpointing ? ", gradient_checkpointing" : ""}`;
    updateList(this.options, options, name, (option) => h("tr", {}, h("td", {}, name(option)), h("td", { class: "num" }), h("td", {}, h("button", { type: "button", class: "quiet", "aria-label": t("Use {settings}", { settings: name(option) }) }, t("Use")))), (part, option) => {
      const [, size, last] = part.children;
      setText(size, `${bytes(sumOf(Object.entries(option.memory_bytes)))}${option.fits === null ? "" : option.fits ? " ✓" : " ✗"}`);
      setAttr(size, "title", option.fits === false ? t("does not fit") : option.fits ? t("fits") : null);
      last.firstChild.onclick = () => this.apply({ training: { gradient_checkpointing: option.gradient_checkpointing }, resources: { parallelism: option.parallelism } });
    });
  }
}

/** What the run reads of each source. */
class SourcesTable {
  constructor() {
    this.body = h("tbody");
    const head = [[t("Source")], [t("Tokens"), "num"], [t("Share"), "num"], [t("Passes"), "num"]].map(([label, kind = ""]) => h("th", { scope: "col", class: kind }, label));
    this.node = h("div", { class: "plan-sources", hidden: true }, h("table", {}, h("caption", { class: "visually-hidden" }, t("Sources of the corpus")), h("thead", {}, h("tr", {}, head)), this.body));
  }

  show(sources) {
    setVisible(this.node, sources.length);
    updateList(this.body, sources, (source) => source.name, (source) => h("tr", {}, h("th", { scope: "row" }, source.name), ...[0, 1, 2].map(() => h("td", { class: "num" }))), (part, source) => {
      const texts = [compactNumber(source.tokens), source.share === null ? NONE : percent(100 * source.share), source.passes === null ? NONE : fewDigits(Number(source.passes.toPrecision(3)))];
      texts.forEach((text, i) => setText(part.children[i + 1], text));
      setAttr(part, "title", [tn(source.files, "{n} file", "{n} files", { n: count(source.files) }), source.documents === null ? "" : tn(source.documents, "{n} document", "{n} documents", { n: count(source.documents) })].filter(Boolean).join(t(", ")));
    });
  }
}

/** Draws the learning rate over the steps, from 0 on. */
export class RateCurve {
  constructor() {
    this.line = svg("polyline");
    this.caption = h("figcaption", { class: "muted" });
    this.node = h("figure", { class: "rates", hidden: true }, svg("svg", { viewBox: "0 0 300 80", preserveAspectRatio: "none", "aria-hidden": "true" }, this.line), this.caption);
  }

  /** `curve`: [step, rate] pairs. */
  show(curve) {
    setVisible(this.node, curve.length > 1);
    if (curve.length < 2) return;
    const [first, last] = [curve[0], curve.at(-1)];
    const peak = curve.reduce((best, point) => (point[1] > best[1] ? point : best));
    const at = ([step, rate]) => `${(((step - first[0]) / (last[0] - first[0])) * 300).toFixed(1)},${(78 - (rate / peak[1]) * 76).toFixed(1)}`;
    setAttr(this.line, "points", curve.map(at).join(" "));
    setText(this.caption, t("Learning rate: {first} at step {from}, at most {peak}, {last} at step {to}", {
      first: fewDigits(first[1]), from: count(first[0]), peak: fewDigits(peak[1]), last: fewDigits(last[1]), to: count(last[0]) }));
  }
}

/** For a fork: the remaining steps and their range. */
const stepsText = ({ steps, start_step: start }) => (start ? t("{n}, {first} to {last}", { n: count(Math.max(0, steps - start)), first: count(start + 1), last: count(steps) }) : count(steps));

/** Held-out sets that are listed. */
const MAX_SETS = 5;

function planFacts(plan) {
  const parameters = compactNumber(plan.parameters);
  const about = (value) => (plan.estimated ? t("about {value}", { value }) : value);
  return [
    [t("Parameters"), plan.active_parameters === plan.parameters ? parameters : t("{n}, {active} active", { n: parameters, active: compactNumber(plan.active_parameters) })],
    [t("Tokens in the corpus"), plan.tokens === null ? NONE : about(compactNumber(plan.tokens))],
    [t("Steps"), plan.steps === null ? NONE : about(stepsText(plan))], [t("Tokens per step"), compactNumber(plan.tokens_per_step)],
    [t("Ranks"), plan.world_size ? `${plan.world_size} × ${plan.device ?? ""}` : NONE, plan.device_name],
    [t("Checkpoint size"), bytes(plan.checkpoint_bytes)], [t("Disk free"), bytes(plan.disk_free_bytes)],
    [t("Time"), plan.eta_seconds === null ? t("not known yet") : t("about {value}", { value: duration(plan.eta_seconds) }), plan.eta_basis], [t("Expected first loss"), loss(plan.expected_first_loss)],
    ...plan.eval_sets.slice(0, MAX_SETS).map((set) => [t("Held-out: {set}", { set: set.name }), set.tokens === null ? NONE : about(t("{n} tokens", { n: compactNumber(set.tokens) })), tn(set.files, "{n} file", "{n} files", { n: count(set.files) })]),
    [t("Queue"), plan.queue ? t("position {n}", { n: plan.queue.position }) : NONE], [t("Waiting for"), plan.queue?.waiting_for ?? NONE],
  ];
}
