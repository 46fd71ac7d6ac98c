// Makes and changes elements. Text only ever goes in as text: nothing here reads HTML.

/** An element; `props` are attributes, `on*` listeners, `class`, or `hidden`/`disabled` switches. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) set(node, name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function set(node, name, value) {
  if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
  else if (typeof value === "boolean") node.toggleAttribute(name, value);
  else if (value !== null && value !== undefined) attr(node, name, value);
}

/** Sets an attribute only where it differs, so that nothing is drawn again for nothing. */
export function attr(node, name, value) {
  if (value === null || value === undefined) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Sets the text only where it differs: a selection in it stays. */
export function text(node, value) {
  const wanted = value ?? "";
  if (node.textContent !== String(wanted)) node.textContent = wanted;
  return node;
}

/** Shows or hides. */
export function show(node, wanted) {
  if (node.hidden === Boolean(wanted)) node.hidden = !wanted;
}

/** Brings the children of `parent` in line with `items` by key; what stays is changed in place and keeps its focus. */
export function list(parent, items, key, create, update = () => {}) {
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

/** A table's head and body; `columns` are [label, class] pairs. */
export function table(columns, caption) {
  const body = h("tbody");
  const head = h("tr", {}, columns.map(([label, kind = ""]) => h("th", { scope: "col", class: kind }, label)));
  const whole = h("table", {}, h("caption", { class: "unseen" }, caption), h("thead", {}, head), body);
  return { node: h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, whole), body };
}

/** Says something once, also to those who cannot see the page. */
export function say(words) {
  const place = document.getElementById("said");
  place.textContent = words;
  clearTimeout(place.timer);
  place.timer = setTimeout(() => (place.textContent = ""), 6000);
}

export async function copy(words, what) {
  try {
    await navigator.clipboard.writeText(words);
    say(`${what} copied`);
  } catch {
    say("The browser did not let us copy: select the text instead");
  }
}

const marked = new Set();

/** Marks `name` behind the frame that shows what was just made; once. */
export function mark(name) {
  if (marked.has(name)) return;
  marked.add(name);
  requestAnimationFrame(() => setTimeout(() => performance.mark(name)));
}
