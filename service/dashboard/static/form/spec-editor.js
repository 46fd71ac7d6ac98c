// A spec as a form and as JSON, one behind the other: what is changed in one stands in the other.
import { attr, h, list, show, text } from "../dom.js";
import { keep, kept } from "../router.js";

const VIEWS = { form: "Form", json: "JSON" };

export class Editor {
  /** `words` says what the JSON holds; `told` is called with every change. */
  constructor(form, words, told) {
    this.form = form;
    this.told = told;
    this.json = h("textarea", { id: "spec", rows: "26", spellcheck: "false", class: "mono", "aria-describedby": "json-wrong", oninput: () => this.typed() });
    this.broken = h("p", { class: "wrong", id: "json-wrong", role: "alert", hidden: true });
    this.errors = h("ul", { class: "errors", hidden: true });
    const inside = h("div", { class: "json" }, h("label", { for: "spec" }, words), this.json, this.broken);
    this.panels = { form: panel("form", form.node), json: panel("json", inside) };
    this.tabs = Object.entries(VIEWS).map(([view, name]) => this.tab(view, name));
    this.node = h("div", { class: "editor" }, h("div", { role: "tablist", class: "tabs", "aria-label": "Form or JSON" }, this.tabs), this.errors, Object.values(this.panels));
    this.turn(kept("view") === "json" ? "json" : "form");
  }

  tab(view, name) {
    const button = h("button", { type: "button", role: "tab", id: `tab-${view}`, "aria-controls": `panel-${view}`, onclick: () => this.turn(view) }, name);
    button.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      this.turn(view === "form" ? "json" : "form");
      this.tabs.find((one) => one.tabIndex === 0).focus();
    });
    return button;
  }

  turn(view) {
    this.view = view;
    keep("view", view === "form" ? null : view);
    for (const tab of this.tabs) {
      const chosen = tab.id === `tab-${view}`;
      attr(tab, "aria-selected", String(chosen));
      attr(tab, "tabindex", chosen ? "0" : "-1");
    }
    for (const [name, one] of Object.entries(this.panels)) show(one, name === view);
  }

  /** JSON was typed: the form follows as soon as it is whole. */
  typed() {
    const found = parsed(this.json.value);
    this.complain("");
    if (found.spec) this.form.fill(found.spec);
    this.told();
  }

  /** The form was changed: the JSON follows. */
  follow() {
    this.complain("");
    this.json.value = JSON.stringify(this.form.value, null, 2);
  }

  get draft() {
    return this.json.value;
  }

  set draft(written) {
    this.json.value = written;
    const found = parsed(written);
    if (found.spec) this.form.fill(found.spec);
  }

  /** The spec to be sent, null where there is none yet; then that is said. */
  read() {
    const { spec, wrong } = parsed(this.json.value);
    if (wrong) this.complain(wrong);
    if (wrong) this.turn("json");
    const [first] = wrong ? [] : this.form.unfinished;
    first?.complain("must be filled in");
    first?.focus();
    return wrong || first ? null : spec;
  }

  complain(words) {
    show(this.broken, words);
    text(this.broken, words);
    attr(this.json, "aria-invalid", words ? "true" : null);
  }

  /** Mistakes, at their fields and as a list; the first of them gets the focus. */
  refuse(errors, words = "") {
    const homeless = this.form.refuse(errors);
    const shown = this.view === "json" ? errors : homeless;
    show(this.errors, shown.length || (words && !errors.length));
    const items = shown.length ? shown : words && !errors.length ? [{ pointer: "", message: words }] : [];
    list(this.errors, items, (one) => `${one.pointer} ${one.message}`, mistake, (part, one) => {
      show(part.firstChild, one.pointer);
      text(part.firstChild, one.pointer);
      part.firstChild.onclick = () => this.point(one.pointer);
      text(part.lastChild, ` ${one.message}`);
    });
    if (this.view === "form") this.form.fields.find((field) => field.complains)?.focus();
    attr(this.json, "aria-invalid", errors.length ? "true" : null);
  }

  /** Selects the key that a pointer names, where it is written. */
  point(pointer) {
    this.turn("json");
    let place = 0;
    for (const name of pointer.split("/").slice(1)) {
      const found = this.json.value.indexOf(JSON.stringify(name), place);
      if (found < 0) break;
      place = found + 1;
      this.json.setSelectionRange(found, found + name.length + 2);
    }
    this.json.focus();
  }
}

const panel = (name, inside) => h("div", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}` }, inside);
const mistake = () => h("li", {}, h("button", { type: "button", class: "quiet mono" }), h("span"));

/** `{spec}` or `{wrong}`. */
function parsed(written) {
  try {
    const spec = JSON.parse(written);
    return spec !== null && typeof spec === "object" && !Array.isArray(spec) ? { spec } : { wrong: "A spec is a JSON object: { … }" };
  } catch (error) {
    return { wrong: `This is not JSON: ${error.message}` };
  }
}
