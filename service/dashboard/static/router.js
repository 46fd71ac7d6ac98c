// Addresses and pages. A page is `{title, open(place, params) -> close}`; `place` is an empty element of its own.
import { h } from "./dom.js";

const routes = [];
let close = () => {};

/** Adds a page at a pattern such as `/jobs/:id`. */
export function page(pattern, made) {
  const names = [...pattern.matchAll(/:(\w+)/g)].map((match) => match[1]);
  routes.push({ names, match: new RegExp(`^${pattern.replace(/:\w+/g, "([^/]+)")}/?$`), made });
}

export function start() {
  addEventListener("popstate", open);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href]");
    const plain = !event.defaultPrevented && event.button === 0 && !event.metaKey && !event.ctrlKey && !event.shiftKey;
    if (!link || !plain || link.origin !== location.origin || link.target || link.hasAttribute("download")) return;
    if (!find(link.pathname) || link.getAttribute("href").startsWith("#")) return;
    event.preventDefault();
    go(link.pathname + link.search);
  });
  open();
}

export function go(address) {
  history.pushState(null, "", address);
  open();
  document.getElementById("main").focus({ preventScroll: true });
  scrollTo(0, 0);
}

/** Opens what the address names, anew. */
export function open() {
  close();
  const main = document.getElementById("main");
  const place = h("div", { class: "page" });
  main.replaceChildren(place);
  const found = find(location.pathname);
  for (const link of document.querySelectorAll("#nav a")) {
    if (link.pathname === location.pathname) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = found ? `${found.made.title} · Trainyard` : "Not found · Trainyard";
  if (found) close = found.made.open(place, found.params) ?? (() => {});
  else place.append(h("h1", {}, "Not found"), h("p", {}, h("a", { href: "/" }, "To the jobs")));
}

/** A part of the address's query that the page keeps its state in; null removes it. */
export function keep(name, value) {
  const address = new URL(location.href);
  if (value === null || value === undefined || value === "") address.searchParams.delete(name);
  else address.searchParams.set(name, value);
  if (address.href !== location.href) history.replaceState(null, "", address);
}

/** The same for a part that may stand several times. */
export function keepAll(name, values) {
  const address = new URL(location.href);
  address.searchParams.delete(name);
  for (const value of values) address.searchParams.append(name, value);
  if (address.href !== location.href) history.replaceState(null, "", address);
}

export const keptAll = (name) => new URLSearchParams(location.search).getAll(name);
export const kept = (name) => new URLSearchParams(location.search).get(name);

function find(path) {
  for (const route of routes) {
    const match = route.match.exec(path);
    if (match) return { ...route, params: Object.fromEntries(route.names.map((name, i) => [name, decodeURIComponent(match[i + 1])])) };
  }
  return null;
}
