// Shows a plan: memory, learning rate, size, time, sources and queue position of a run, with warnings.
import { h, setAttr, setText, setVisible, svg, updateList } from "../dom.js";
import { NONE, bytes, compactNumber, count, duration, fewDigits, loss, percent } from "../format.js";

const PARTS = ["weights", "gradients", "optimizer", "activations"];
const sumOf = (parts) => parts.reduce((sum, [, size]) => sum + size, 0);

/** Returns [name, bytes] pairs of what is compared with the limit: a rank on its GPU, or all ranks on the host, with the copies that a save is written from. */
function memoryParts({ device, memory_bytes: memory, world_size: ranks, snapshot_bytes: copies }) {
  const onHost = device === "cpu";
  const parts = PARTS.map((name) => [name, (memory?.[name] ?? 0) * (onHost ? ranks ?? 1 : 1)]);
  return [...parts, ["copies for saving", onHost && sumOf(parts) ? copies ?? 0 : 0]].filter(([, size]) => size > 0);
}

/** From this part of the memory on, the service warns that the run may not fit. */
const TIGHT = 0.9;

const partClass = (name) => `part-${name.split(" ")[0]}`;

export class PlanView {
  /** `apply(changes)` is called to use other settings: those with which a run fits, or the largest batch. */
  constructor(none, apply) {
    this.apply = apply;
    this.none = h("p", { class: "muted" }, none);
    this.state = h("p", { class: "muted", role: "status", hidden: true });
    this.warnings = h("ul", { class: "alerts", "aria-label": "Warnings" });
    this.memory = new MemoryBar(apply);
    this.facts = h("dl", { class: "facts", hidden: true });
    this.sources = new SourcesTable();
    this.curve = new RateCurve();
    this.heading = h("h2", {}, "Plan");
    this.node = h("section", { class: "plan", tabindex: "-1", "aria-label": "Plan" }, this.heading, this.none, this.state, this.warnings, this.memory.node, this.curve.node, this.facts, this.sources.node);
  }

  /** Shows a plan, or none if null. `batchSize`: that of its spec. */
  show(plan, batchSize = null) {
    setVisible(this.none, !plan);
    setVisible(this.facts, plan);
    this.setState("");
    this.stale(false);
    this.curve.show(plan?.learning_rate ?? []);
    updateList(this.warnings, plan?.warnings ?? [], (warning) => warning, () => h("li"), (part, warning) => setText(part, warning));
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
    setText(this.heading, isOld ? "Plan before the last changes" : "Plan");
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
    this.would = h("p", { class: "would", hidden: true }, "This would fit: ");
    this.useFit = h("button", { type: "button" });
    this.would.append(this.useFit);
    this.batch = h("p", { class: "would", hidden: true });
    this.useBatch = h("button", { type: "button" });
    this.batchText = h("span");
    this.batch.append(this.batchText, this.useBatch);
    this.options = h("tbody");
    const head = ["Other settings", "Memory", ""].map((label, i) => h("th", { scope: "col", class: i === 1 ? "num" : "" }, label));
    this.more = h("details", { hidden: true }, h("summary", { class: "muted" }, "Memory with other settings"),
      h("table", {}, h("caption", { class: "visually-hidden" }, "Memory of each rank with other settings"), h("thead", {}, h("tr", {}, head)), this.options));
    this.node = h("div", { class: "memory", hidden: true }, this.text, this.bar, this.parts, this.would, this.batch, this.more);
  }

  show(plan, batchSize) {
    const parts = plan ? memoryParts(plan) : [];
    const total = sumOf(parts);
    setVisible(this.node, total);
    if (!total) return;
    const limit = plan.memory_limit_bytes;
    const fits = limit === null ? null : total <= limit;
    const where = plan.device === "cpu" ? "this host, for all ranks" : `${plan.device_name ?? "the device"}, for each rank`;
    const verdict = !fits ? "✗ Does not fit" : total > TIGHT * limit ? "? May not fit" : "✓ Fits";
    const shown = fits === null ? `Memory of each rank: ${bytes(total)}` : `${verdict}: ${bytes(total)} of ${bytes(limit)} of ${where}`;
    setText(this.text, shown);
    this.text.classList.toggle("error", fits === false);
    const scale = Math.max(total, limit ?? 0);
    setAttr(this.bar, "aria-label", `${shown}. ${parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", ")}`);
    updateList(this.bar, [...parts, ["limit", fits === false ? limit : 0]], ([name]) => name, ([name]) => h("span", { class: partClass(name) }), (part, [name, size]) => {
      if (name === "limit") part.style.left = `${(100 * size) / scale}%`;
      else part.style.width = `${(100 * size) / scale}%`;
      setVisible(part, size);
    });
    updateList(this.parts, parts, ([name]) => name, ([name]) => h("li", {}, h("span", { class: `key ${partClass(name)}`, "aria-hidden": "true" }), name, h("span", { class: "num" })), (part, [, size]) => setText(part.lastChild, bytes(size)));
    this.showFit(plan.settings_that_fit);
    this.showBatch(plan.suggested_batch_size, batchSize);
    this.showOptions(plan.memory_options ?? []);
  }

  /** `changes`: settings with which a run fits that does not, by group and field, or null. */
  showFit(changes) {
    setVisible(this.would, changes);
    if (!changes) return;
    const settings = Object.values(changes).flatMap((fields) => Object.entries(fields)).map(([name, value]) => `${name} ${value}`);
    setText(this.useFit, `Use ${settings.join(" and ")}`);
    this.useFit.onclick = () => this.apply(changes);
  }

  showBatch(largest, current) {
    setVisible(this.batch, largest);
    if (!largest) return;
    setText(this.batchText, `Largest batch_size that fits: ${count(largest)} `);
    setVisible(this.useBatch, largest !== current);
    setText(this.useBatch, `Use ${count(largest)}`);
    this.useBatch.onclick = () => this.apply({ training: { batch_size: largest } });
  }

  showOptions(options) {
    setVisible(this.more, options.length > 1);
    const name = (option) => `${option.parallelism}${option.gradient_checkpointing ? ", gradient_checkpointing" : ""}`;
    updateList(this.options, options, name, (option) => h("tr", {}, h("td", {}, name(option)), h("td", { class: "num" }), h("td", {}, h("button", { type: "button", class: "quiet", "aria-label": `Use ${name(option)}` }, "Use"))), (part, option) => {
      const [, size, last] = part.children;
      setText(size, `${bytes(sumOf(Object.entries(option.memory_bytes)))}${option.fits === null ? "" : option.fits ? " ✓" : " ✗"}`);
      setAttr(size, "title", option.fits === false ? "does not fit" : option.fits ? "fits" : null);
      last.firstChild.onclick = () => this.apply({ training: { gradient_checkpointing: option.gradient_checkpointing }, resources: { parallelism: option.parallelism } });
    });
  }
}

/** What the run reads of each source. */
class SourcesTable {
  constructor() {
    this.body = h("tbody");
    const head = [["Source"], ["Tokens", "num"], ["Share", "num"], ["Passes", "num"]].map(([label, kind = ""]) => h("th", { scope: "col", class: kind }, label));
    this.node = h("div", { class: "plan-sources", hidden: true }, h("table", {}, h("caption", { class: "visually-hidden" }, "Sources of the corpus"), h("thead", {}, h("tr", {}, head)), this.body));
  }

  show(sources) {
    setVisible(this.node, sources.length);
    updateList(this.body, sources, (source) => source.name, (source) => h("tr", {}, h("th", { scope: "row" }, source.name), ...[0, 1, 2].map(() => h("td", { class: "num" }))), (part, source) => {
      const texts = [compactNumber(source.tokens), source.share === null ? NONE : percent(100 * source.share), source.passes === null ? NONE : fewDigits(Number(source.passes.toPrecision(3)))];
      texts.forEach((text, i) => setText(part.children[i + 1], text));
      setAttr(part, "title", `${count(source.files)} ${source.files === 1 ? "file" : "files"}${source.documents === null ? "" : `, ${count(source.documents)} documents`}`);
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
    setText(this.caption, `Learning rate: ${fewDigits(first[1])} at step ${count(first[0])}, at most ${fewDigits(peak[1])}, ${fewDigits(last[1])} at step ${count(last[0])}`);
  }
}

/** For a fork: the remaining steps and their range. */
const stepsText = ({ steps, start_step: start }) => (start ? `${count(Math.max(0, steps - start))}, ${count(start + 1)} to ${count(steps)}` : count(steps));

/** Held-out sets that are listed. */
const MAX_SETS = 5;

function planFacts(plan) {
  const active = plan.active_parameters === plan.parameters ? "" : `, ${compactNumber(plan.active_parameters)} active`;
  const about = plan.estimated ? "about " : "";
  return [
    ["Parameters", `${compactNumber(plan.parameters)}${active}`], ["Tokens in the corpus", plan.tokens === null ? NONE : `${about}${compactNumber(plan.tokens)}`],
    ["Steps", plan.steps === null ? NONE : `${about}${stepsText(plan)}`], ["Tokens per step", compactNumber(plan.tokens_per_step)],
    ["Ranks", plan.world_size ? `${plan.world_size} × ${plan.device ?? ""}` : NONE, plan.device_name],
    ["Checkpoint size", bytes(plan.checkpoint_bytes)], ["Disk free", bytes(plan.disk_free_bytes)],
    ["Time", plan.eta_seconds === null ? "not known yet" : `about ${duration(plan.eta_seconds)}`, plan.eta_basis], ["Expected first loss", loss(plan.expected_first_loss)],
    ...plan.eval_sets.slice(0, MAX_SETS).map((set) => [`Held-out: ${set.name}`, set.tokens === null ? NONE : `${about}${compactNumber(set.tokens)} tokens`, `${count(set.files)} ${set.files === 1 ? "file" : "files"}`]),
    ["Queue", plan.queue ? `position ${plan.queue.position}` : NONE], ["Waiting for", plan.queue?.waiting_for ?? NONE],
  ];
}
