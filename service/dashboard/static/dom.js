// Creates and updates elements. Text is always set as text: nothing here parses HTML.
import { t } from "./i18n.js";

/** Creates an element; `props` are attributes, `on*` listeners, `class`, or boolean attributes such as `hidden`. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) setProp(node, name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function setProp(node, name, value) {
  if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
  else if (typeof value === "boolean") node.toggleAttribute(name, value);
  else if (value !== null && value !== undefined) setAttr(node, name, value);
}

/** Sets an attribute only if it differs, to avoid needless rendering. */
export function setAttr(node, name, value) {
  if (value === null || value === undefined) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Sets the text only if it differs, so that a selection in it is kept. */
export function setText(node, value) {
  const wanted = value ?? "";
  if (node.textContent !== String(wanted)) node.textContent = wanted;
  return node;
}

/** Shows or hides an element. */
export function setVisible(node, wanted) {
  if (node.hidden === Boolean(wanted)) node.hidden = !wanted;
}

/** Reconciles the children of `parent` with `items` by key; existing children are updated in place and keep the focus. */
export function updateList(parent, items, key, create, update = () => {}) {
  const known = (parent.known ??= new Map());
  const wanted = new Set(items.map(key));
  for (const [name, part] of known) {
    if (!wanted.has(name)) {
      part.remove();
      known.delete(name);
    }
  }
  let place = parent.firstChild;
  for (const item of items) {
    const name = key(item);
    let part = known.get(name);
    if (!part) known.set(name, (part = create(item)));
    update(part, item);
    if (part === place) place = place.nextSibling;
    else parent.insertBefore(part, place);
  }
}

/** Creates a table; `columns` are [label, class] pairs. */
export function createTable(columns, caption) {
  const body = h("tbody");
  const head = h("tr", {}, columns.map(([label, kind = ""]) => h("th", { scope: "col", class: kind }, label)));
  const whole = h("table", {}, h("caption", { class: "visually-hidden" }, caption), h("thead", {}, head), body);
  return { node: h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, whole), body };
}

/** Shows a message for a few seconds, also to screen readers. */
export function announce(message) {
  const toast = document.getElementById("toast");
  toast.textContent = message;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (toast.textContent = ""), 6000);
}

export async function copyText(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    announce(t("{what} copied", { what }));
  } catch {
    announce(t("The browser blocked copying. Select the text instead."));
  }
}

const markedNames = new Set();

/** Sets the performance mark `name` once, after the next frame is painted. The benchmark reads it. */
export function markPaint(name) {
  if (markedNames.has(name)) return;
  markedNames.add(name);
  requestAnimationFrame(() => setTimeout(() => performance.mark(name)));
}
