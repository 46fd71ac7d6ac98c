// One setting in a form: its name, what it is typed into, unit, help, whether it was changed, and what is wrong with it.
import { attr, h, show, text } from "../dom.js";
import { BAD, inputFor } from "./inputs.js";
import { pointer, range } from "./schema.js";
import { same, written } from "./values.js";

const WIDE = new Set(["texts", "pairs", "json"]);
const ROWS = new Set(["texts", "pairs"]);
const LONG = 500; // Texts that may be longer than this are paths, and paths need room.
const NO_NUMBER = "must be a number";
let made = 0;

export class Field {
  /** `base`: the value that counts as unchanged; `from`: whose that is, "default" or a job's. */
  constructor(described, base, from, told) {
    Object.assign(this, described, { base, from, told, words: described.help });
    const id = `field-${++made}-${described.name}`;
    this.input = inputFor(described, id, () => this.typed());
    this.help = h("p", { class: "help", id: `${id}-help` });
    this.wrong = h("p", { class: "wrong", id: `${id}-wrong`, hidden: true });
    this.back = h("button", { type: "button", class: "quiet back", hidden: true, onclick: () => this.reset() }, "↺");
    attr(this.input.control, "aria-describedby", `${id}-help ${id}-wrong`);
    const wide = WIDE.has(described.kind) || (described.kind === "text" && described.longest > LONG);
    // Rows that come and go have names of their own; the button that adds one has its words.
    const named = ROWS.has(described.kind) ? ["span", { class: "mono" }] : ["label", { for: id, class: "mono" }];
    const label = h(...named, described.name, described.required ? h("span", { class: "needed" }, " required") : null);
    this.unit = described.unit ? h("span", { class: "unit" }, described.unit) : null;
    this.node = h("div", { class: `field${wide ? " wide" : ""}` }, label, h("div", { class: "entry" }, this.input.node, this.unit, this.back), this.help, this.wrong);
    this.node.addEventListener("focusout", (event) => this.node.contains(event.relatedTarget) || this.settle());
    this.show(base);
  }

  /** Shows a value; one that the input cannot hold is kept as it is until something is typed. */
  show(value) {
    this.foreign = this.input.set(value) ? undefined : { value };
    if (this.foreign) this.input.set(this.base);
    this.complain(this.foreign ? "the JSON holds a value of another kind here" : "");
    this.mark();
  }

  /** The value, BAD where there is none. */
  get value() {
    return this.foreign ? this.foreign.value : this.input.get();
  }

  get changed() {
    return !same(this.value, this.base);
  }

  typed() {
    this.foreign = undefined;
    this.complain(this.value === BAD && this.input.control.validity?.badInput ? NO_NUMBER : "");
    this.mark();
    this.told(this);
  }

  /** What is unchanged counts as left out, so an emptied field that must hold something goes back. */
  settle() {
    if (this.value === BAD && !this.input.control.validity?.badInput) this.show(this.base);
  }

  reset() {
    this.show(this.base);
    this.input.control.focus();
    this.told(this);
  }

  mark() {
    const { changed } = this;
    this.node.classList.toggle("changed", changed);
    show(this.back, changed);
    const usual = written(this.base === "" ? null : this.base);
    attr(this.back, "aria-label", `Back to ${usual}: ${this.name}`);
    attr(this.back, "title", `back to ${usual}`);
    const limits = this.choices ? "" : range(this);
    const was = changed && !(this.required && this.base === "") ? `${this.from} ${usual}` : "";
    text(this.help, [this.words, limits, was].filter(Boolean).join(" · "));
  }

  /** Says what is wrong, "" for nothing. */
  complain(words) {
    text(this.wrong, words);
    show(this.wrong, words);
    attr(this.input.control, "aria-invalid", words ? "true" : null);
    this.node.classList.toggle("refused", Boolean(words));
  }

  get complains() {
    return !this.wrong.hidden;
  }

  /** Whether an RFC 6901 pointer leads here, or into what is here; also by another name of this setting. */
  named(place) {
    const names = [this.pointer, ...this.aliases.map((alias) => pointer([...this.path.slice(0, -1), alias]))];
    return names.some((one) => place === one || place.startsWith(`${one}/`));
  }

  focus() {
    this.input.control.focus();
  }
}
