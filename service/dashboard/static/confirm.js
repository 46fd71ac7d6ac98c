// A dialog that asks before something is lost.
import { h } from "./dom.js";
import { t } from "./i18n.js";

/** Asks for confirmation in a dialog; the button that changes nothing has the focus. */
export function confirmAction(question, label) {
  return new Promise((done) => {
    const no = h("button", { type: "button", onclick: () => box.close() }, t("Back"));
    const yes = h("button", { type: "button", class: "danger", onclick: () => box.close("yes") }, label);
    const box = h("dialog", { "aria-label": label }, h("p", {}, question), h("div", { class: "bar" }, no, yes));
    box.addEventListener("close", () => (box.remove(), done(box.returnValue === "yes")));
    document.body.append(box);
    box.showModal();
    no.focus();
  });
}
