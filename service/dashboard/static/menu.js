// A button that opens a list of actions. An action that is not possible stays in the list, with the reason.
import { h, setAttr, setVisible } from "./dom.js";

/** `actions(at)` returns what to list: [{label, press, why, danger}], or `{heading}` above the next ones; `at`: see `open`; `why`: the reason if it is not possible. `name`: for screen readers, if the label is a sign. */
export class Menu {
  constructor(label, actions, { name = null, quiet = false } = {}) {
    this.actions = actions;
    this.button = h("button", { type: "button", class: quiet ? "quiet" : "", "aria-expanded": "false", "aria-label": name, title: name, onclick: () => this.toggle() }, label);
    this.list = h("div", { class: "menu-list", role: "group", "aria-label": name ?? label, hidden: true });
    this.node = h("span", { class: "menu" }, this.button, this.list);
    this.node.addEventListener("keydown", (event) => this.onKey(event));
    this.onOutside = (event) => !this.node.contains(event.target) && this.close();
    this.onMove = () => (this.node.isConnected ? this.place() : this.close());
  }

  toggle() {
    if (this.list.hidden) this.open();
    else this.close();
  }

  /** Opens the list at the button, or at a place in the window, {x, y}. */
  open(at = null) {
    this.at = at;
    this.list.replaceChildren(...this.actions(at).map((action) => this.item(action)));
    setVisible(this.list, true);
    setAttr(this.button, "aria-expanded", "true");
    this.place();
    document.addEventListener("pointerdown", this.onOutside);
    addEventListener("scroll", this.onMove, true);
    addEventListener("resize", this.onMove);
    this.list.querySelector("button")?.focus({ preventScroll: true });
  }

  /** The list is fixed in the window, because a table that scrolls would clip it. */
  place() {
    const { offsetWidth: width, offsetHeight: height } = this.list;
    const button = this.button.getBoundingClientRect();
    const below = button.bottom + 2 + height <= innerHeight ? button.bottom + 2 : button.top - 2 - height;
    const { x, y } = this.at ?? { x: button.right - width, y: below };
    this.list.style.left = `${Math.max(4, Math.min(x, document.documentElement.clientWidth - width - 4))}px`;
    this.list.style.top = `${Math.max(4, Math.min(y, innerHeight - height - 4))}px`;
  }

  item({ heading, label, press, why = null, danger = false }) {
    if (heading) return h("span", { class: "menu-heading" }, heading);
    const run = () => {
      if (why) return;
      this.close();
      this.button.focus();
      press();
    };
    return h("button", { type: "button", class: danger ? "danger" : "", "aria-disabled": why ? "true" : null, onclick: run }, label, why ? h("small", {}, why) : null);
  }

  onKey(event) {
    if (this.list.hidden) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      this.close();
      this.button.focus();
    }
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const items = [...this.list.querySelectorAll("button")];
    items[(items.indexOf(document.activeElement) + by + items.length) % items.length]?.focus();
  }

  close() {
    document.removeEventListener("pointerdown", this.onOutside);
    removeEventListener("scroll", this.onMove, true);
    removeEventListener("resize", this.onMove);
    setVisible(this.list, false);
    setAttr(this.button, "aria-expanded", "false");
  }
}
