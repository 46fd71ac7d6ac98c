// A few settings in a form of their own: what was changed, sent, and refused where it stands.
import { Refused } from "../api.js";
import { attr, h, show, text } from "../dom.js";
import { BAD } from "./inputs.js";
import { put } from "./values.js";

export class Sheet {
  /** `send(changes)` does it; `done(answer)` is told once it is done, `leave` once it is given up. */
  constructor(fields, verb, { send, done, leave }) {
    Object.assign(this, { fields, send, done });
    this.wrong = h("p", { class: "wrong", role: "alert", hidden: true });
    this.button = h("button", { class: "primary" }, verb);
    const cancel = h("button", { type: "button", onclick: leave }, "Leave it");
    this.node = h("form", { class: "sheet", novalidate: true, onsubmit: (event) => (event.preventDefault(), this.press()) },
      fields.map((field) => field.node), this.wrong, h("div", { class: "bar" }, this.button, cancel));
    this.node.addEventListener("keydown", (event) => event.key === "Escape" && (event.preventDefault(), leave()));
  }

  get value() {
    return this.fields.filter((field) => field.changed && field.value !== BAD).reduce((value, field) => put(value, field.path, field.value), {});
  }

  async press() {
    const bad = this.fields.find((field) => field.value === BAD);
    bad?.complain("must be filled in");
    bad?.focus();
    if (bad || this.busy) return;
    this.busy = true;
    attr(this.button, "aria-disabled", "true");
    try {
      this.tell("");
      this.done(await this.send(this.value));
    } catch (error) {
      this.refused(error);
    } finally {
      this.busy = false;
      attr(this.button, "aria-disabled", null);
    }
  }

  refused(error) {
    const homeless = [];
    for (const field of this.fields) field.complain("");
    for (const one of error instanceof Refused ? error.errors : []) {
      const field = this.fields.find((other) => other.named(one.pointer));
      if (field) field.complain(one.message);
      else homeless.push(`${one.pointer} ${one.message}`);
    }
    const first = this.fields.find((field) => field.complains);
    this.tell(homeless.length ? homeless.join("; ") : first ? "" : error.message);
    first?.focus();
  }

  tell(words) {
    show(this.wrong, words);
    text(this.wrong, words);
  }
}
