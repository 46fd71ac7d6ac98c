// A small form of a few settings: sends what was changed, and shows errors at their fields.
import { ApiError } from "../api.js";
import { h, setAttr, setText, setVisible } from "../dom.js";
import { INVALID } from "./inputs.js";
import { setAt } from "./values.js";

export class SettingsForm {
  /** `send(changes)` sends the changes; `done(response)` is called after success, `leave` when the user discards them. */
  constructor(fields, verb, { send, done, leave }) {
    Object.assign(this, { fields, send, done });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.button = h("button", { class: "primary" }, verb);
    const cancel = h("button", { type: "button", onclick: leave }, "Discard");
    this.node = h("form", { class: "sheet", novalidate: true, onsubmit: (event) => (event.preventDefault(), this.press()) },
      fields.map((field) => field.node), this.error, h("div", { class: "bar" }, this.button, cancel));
    this.node.addEventListener("keydown", (event) => event.key === "Escape" && (event.preventDefault(), leave()));
  }

  get value() {
    return this.fields.filter((field) => field.changed && field.value !== INVALID).reduce((value, field) => setAt(value, field.path, field.value), {});
  }

  async press() {
    const bad = this.fields.find((field) => field.value === INVALID);
    bad?.setError("must not be empty");
    bad?.focus();
    if (bad || this.busy) return;
    this.busy = true;
    setAttr(this.button, "aria-disabled", "true");
    try {
      this.showError("");
      this.done(await this.send(this.value));
    } catch (error) {
      this.handleError(error);
    } finally {
      this.busy = false;
      setAttr(this.button, "aria-disabled", null);
    }
  }

  handleError(error) {
    const withoutField = [];
    for (const field of this.fields) field.setError("");
    for (const one of error instanceof ApiError ? error.errors : []) {
      const field = this.fields.find((other) => other.matchesPointer(one.pointer));
      if (field) field.setError(one.message);
      else withoutField.push(`${one.pointer} ${one.message}`);
    }
    const first = this.fields.find((field) => field.hasError);
    this.showError(withoutField.length ? withoutField.join("; ") : first ? "" : error.message);
    first?.focus();
  }

  showError(words) {
    setVisible(this.error, words);
    setText(this.error, words);
  }
}
