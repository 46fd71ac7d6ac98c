// Edits a spec as a form or as JSON; both are kept in sync.
import { h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { getParam, setParam } from "../router.js";

const VIEWS = { form: "Form", json: "JSON" };

export class SpecEditor {
  /** `words`: label of the JSON field; `onChange`: called after every change. */
  constructor(form, words, onChange) {
    this.form = form;
    this.onChange = onChange;
    this.json = h("textarea", { id: "spec", rows: "26", spellcheck: "false", class: "mono", "aria-describedby": "json-error", oninput: () => this.onInput() });
    this.jsonError = h("p", { class: "error", id: "json-error", role: "alert", hidden: true });
    this.errors = h("ul", { class: "errors", hidden: true });
    const inside = h("div", { class: "json" }, h("label", { for: "spec" }, words), this.json, this.jsonError);
    this.panels = { form: tabPanel("form", form.node), json: tabPanel("json", inside) };
    this.tabs = Object.entries(VIEWS).map(([view, name]) => this.tab(view, name));
    this.node = h("div", { class: "editor" }, h("div", { role: "tablist", class: "tabs", "aria-label": "Form or JSON" }, this.tabs), this.errors, Object.values(this.panels));
    this.selectView(getParam("view") === "json" ? "json" : "form");
  }

  tab(view, name) {
    const button = h("button", { type: "button", role: "tab", id: `tab-${view}`, "aria-controls": `panel-${view}`, onclick: () => this.selectView(view) }, name);
    button.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      this.selectView(view === "form" ? "json" : "form");
      this.tabs.find((one) => one.tabIndex === 0).focus();
    });
    return button;
  }

  selectView(view) {
    this.view = view;
    setParam("view", view === "form" ? null : view);
    for (const tab of this.tabs) {
      const chosen = tab.id === `tab-${view}`;
      setAttr(tab, "aria-selected", String(chosen));
      setAttr(tab, "tabindex", chosen ? "0" : "-1");
    }
    for (const [name, one] of Object.entries(this.panels)) setVisible(one, name === view);
  }

  /** Updates the form from the JSON if it is valid. */
  onInput() {
    const found = parseSpec(this.json.value);
    this.setError("");
    if (found.spec) this.form.setSpec(found.spec);
    this.onChange();
  }

  /** Updates the JSON from the form. */
  updateJson() {
    this.setError("");
    this.json.value = JSON.stringify(this.form.value, null, 2);
  }

  get draft() {
    return this.json.value;
  }

  set draft(written) {
    this.json.value = written;
    const found = parseSpec(written);
    if (found.spec) this.form.setSpec(found.spec);
  }

  /** Returns the spec, or null after showing an error if it is not complete. */
  read() {
    const { spec, error } = parseSpec(this.json.value);
    if (error) this.setError(error);
    if (error) this.selectView("json");
    const [first] = error ? [] : this.form.invalidFields;
    first?.setError("must not be empty");
    first?.focus();
    return error || first ? null : spec;
  }

  setError(words) {
    setVisible(this.jsonError, words);
    setText(this.jsonError, words);
    setAttr(this.json, "aria-invalid", words ? "true" : null);
  }

  /** Shows errors at their fields and as a list; the first one gets the focus. */
  showErrors(errors, words = "") {
    const withoutField = this.form.showErrors(errors);
    const shown = this.view === "json" ? errors : withoutField;
    setVisible(this.errors, shown.length || (words && !errors.length));
    const items = shown.length ? shown : words && !errors.length ? [{ pointer: "", message: words }] : [];
    updateList(this.errors, items, (one) => `${one.pointer} ${one.message}`, errorItem, (part, one) => {
      setVisible(part.firstChild, one.pointer);
      setText(part.firstChild, one.pointer);
      part.firstChild.onclick = () => this.selectInJson(one.pointer);
      setText(part.lastChild, ` ${one.message}`);
    });
    if (this.view === "form") this.form.fields.find((field) => field.hasError)?.focus();
    setAttr(this.json, "aria-invalid", errors.length ? "true" : null);
  }

  /** Selects the key that a JSON pointer names in the JSON text. */
  selectInJson(pointer) {
    this.selectView("json");
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

const tabPanel = (name, inside) => h("div", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}` }, inside);
const errorItem = () => h("li", {}, h("button", { type: "button", class: "quiet mono" }), h("span"));

/** Returns `{spec}` or `{error}`. */
function parseSpec(written) {
  try {
    const spec = JSON.parse(written);
    return spec !== null && typeof spec === "object" && !Array.isArray(spec) ? { spec } : { error: "A spec is a JSON object: { … }" };
  } catch (error) {
    return { error: `This is not JSON: ${error.message}` };
  }
}
