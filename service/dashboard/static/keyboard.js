// Single-key shortcuts of the pages, and the dialog that lists them. They can be switched off, because some input methods send single keys.
import { h } from "./dom.js";
import { t } from "./i18n.js";
import { browserStorage } from "./storage.js";

const STORAGE_KEY = "trainyard-shortcuts";
const SEARCH = { key: "/", does: t("search this page"), run: () => [...document.querySelectorAll("#main input[type=search]")].find((field) => field.checkVisibility())?.focus() };
const HELP = { key: "?", does: t("show the keys"), run: showKeys };
let ofPage = [];

const isOn = () => browserStorage.get(STORAGE_KEY) !== "off";

/** Adds the shortcuts of a page, `[{key, does, run}]`; `run` may return false if there was nothing to do. Returns a function that removes them. */
export function addShortcuts(list) {
  ofPage = list;
  return () => (ofPage = ofPage === list ? [] : ofPage);
}

export function listenForKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (document.querySelector("dialog[open]") || isTyping(event.target)) return;
    const found = [...ofPage, SEARCH, HELP].find((shortcut) => shortcut.key === event.key);
    // The dialog can always be opened: in it the keys are switched on again.
    if (!found || !(isOn() || found === HELP)) return;
    if (found.run() !== false) event.preventDefault();
  });
}

/** Whether keys belong to the element: a text field, or a list that jumps to a letter. */
function isTyping(node) {
  return node.closest?.("textarea, select, [contenteditable]") || (node.tagName === "INPUT" && !["checkbox", "radio", "button"].includes(node.type));
}

function showKeys() {
  const rows = [...ofPage, SEARCH, HELP].map(({ key, does }) => h("tr", {}, h("th", { scope: "row" }, h("kbd", {}, key)), h("td", {}, does)));
  const on = h("input", { type: "checkbox", onchange: () => browserStorage.set(STORAGE_KEY, on.checked ? "on" : "off") });
  on.checked = isOn();
  const close = h("button", { type: "button", onclick: () => box.close() }, t("Close"));
  const box = h("dialog", { class: "keys", "aria-labelledby": "keys-title" }, h("h2", { id: "keys-title" }, t("Keys")), h("table", {}, h("tbody", {}, rows)),
    h("p", {}, h("label", {}, on, " ", t("Use single keys"))), h("div", { class: "bar" }, close));
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
}
