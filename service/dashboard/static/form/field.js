// One setting of a form: label, input, unit, help, reset button and error.
import { h, setAttr, setText, setVisible } from "../dom.js";
import { INVALID, createInput } from "./inputs.js";
import { jsonPointer, rangeText } from "./schema.js";
import { formatValue, isEqual } from "./values.js";

const WIDE_KINDS = new Set(["texts", "pairs", "json"]);
const ROW_KINDS = new Set(["texts", "pairs"]);
const WIDE_TEXT_LENGTH = 500; // Longer texts are paths, which need a wide input.
const NOT_A_NUMBER = "must be a number";
let fieldCount = 0;

export class Field {
  /** `base`: the unchanged value; `from`: where it comes from, "default" or a job. */
  constructor(described, base, from, onChange) {
    Object.assign(this, described, { base, from, onChange, words: described.help });
    const id = `field-${++fieldCount}-${described.name}`;
    this.input = createInput(described, id, () => this.onInput());
    this.help = h("p", { class: "help", id: `${id}-help` });
    this.error = h("p", { class: "error", id: `${id}-error`, hidden: true });
    this.resetButton = h("button", { type: "button", class: "quiet reset", hidden: true, onclick: () => this.reset() }, "↺");
    setAttr(this.input.control, "aria-describedby", `${id}-help ${id}-error`);
    const wide = WIDE_KINDS.has(described.kind) || (described.kind === "text" && described.maxLength > WIDE_TEXT_LENGTH);
    // Each row has its own label, and the button that adds a row has its text.
    const named = ROW_KINDS.has(described.kind) ? ["span", { class: "mono" }] : ["label", { for: id, class: "mono" }];
    const label = h(...named, described.name, described.required ? h("span", { class: "required-mark" }, " required") : null);
    this.unit = described.unit ? h("span", { class: "unit" }, described.unit) : null;
    this.node = h("div", { class: `field${wide ? " wide" : ""}` }, label, h("div", { class: "entry" }, this.input.node, this.unit, this.resetButton), this.help, this.error);
    this.node.addEventListener("focusout", (event) => this.node.contains(event.relatedTarget) || this.restoreIfEmpty());
    this.show(base);
  }

  /** Shows a value. If the input cannot hold it, it is kept until the user types. */
  show(value) {
    this.foreign = this.input.set(value) ? undefined : { value };
    if (this.foreign) this.input.set(this.base);
    this.setError(this.foreign ? "the JSON has a value of another type here" : "");
    this.refresh();
  }

  /** The value, or INVALID. */
  get value() {
    return this.foreign ? this.foreign.value : this.input.get();
  }

  get changed() {
    return !isEqual(this.value, this.base);
  }

  onInput() {
    this.foreign = undefined;
    this.setError(this.value === INVALID && this.input.control.validity?.badInput ? NOT_A_NUMBER : "");
    this.refresh();
    this.onChange(this);
  }

  /** An unchanged field is not sent, so an emptied required field gets its base value back. */
  restoreIfEmpty() {
    if (this.value === INVALID && !this.input.control.validity?.badInput) this.show(this.base);
  }

  reset() {
    this.show(this.base);
    this.input.control.focus();
    this.onChange(this);
  }

  refresh() {
    const { changed } = this;
    this.node.classList.toggle("changed", changed);
    setVisible(this.resetButton, changed);
    const baseText = formatValue(this.base === "" ? null : this.base);
    setAttr(this.resetButton, "aria-label", `Back to ${baseText}: ${this.name}`);
    setAttr(this.resetButton, "title", `back to ${baseText}`);
    const limits = this.choices ? "" : rangeText(this);
    const was = changed && !(this.required && this.base === "") ? `${this.from} ${baseText}` : "";
    setText(this.help, [this.words, limits, was].filter(Boolean).join(" · "));
  }

  /** Shows an error; "" removes it. */
  setError(words) {
    setText(this.error, words);
    setVisible(this.error, words);
    setAttr(this.input.control, "aria-invalid", words ? "true" : null);
    this.node.classList.toggle("invalid", Boolean(words));
  }

  get hasError() {
    return !this.error.hidden;
  }

  /** Whether an RFC 6901 pointer points to this setting or into it, also by an alias. */
  matchesPointer(place) {
    const names = [this.pointer, ...this.aliases.map((alias) => jsonPointer([...this.path.slice(0, -1), alias]))];
    return names.some((one) => place === one || place.startsWith(`${one}/`));
  }

  focus() {
    this.input.control.focus();
  }
}
