// URLs and pages. A page is `{title, open(place, params)}`; `place` is an empty element, and `open` returns a function that closes it.
// Its modules are loaded when it is opened first, so that the first page waits only for its own.
import { h } from "./dom.js";
import { t } from "./i18n.js";

const routes = [];
let closePage = () => {};

/** Adds a page for a pattern such as `/jobs/:id`. `load()` returns a promise of it. */
export function addRoute(pattern, load) {
  const names = [...pattern.matchAll(/:(\w+)/g)].map((match) => match[1]);
  routes.push({ names, match: new RegExp(`^${pattern.replace(/:\w+/g, "([^/]+)")}/?$`), load });
}

export function startRouter() {
  addEventListener("popstate", openPage);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href]");
    const plain = !event.defaultPrevented && event.button === 0 && !event.metaKey && !event.ctrlKey && !event.shiftKey;
    if (!link || !plain || link.origin !== location.origin || link.target || link.hasAttribute("download")) return;
    if (!findRoute(link.pathname) || link.getAttribute("href").startsWith("#")) return;
    event.preventDefault();
    navigate(link.pathname + link.search);
  });
  openPage();
}

export function navigate(address) {
  history.pushState(null, "", address);
  openPage();
  document.getElementById("main").focus({ preventScroll: true });
  scrollTo(0, 0);
}

/** Closes the current page and opens the one for the URL. */
export function openPage() {
  closePage();
  const main = document.getElementById("main");
  const place = h("div", { class: "page" });
  main.replaceChildren(place);
  const match = findRoute(location.pathname);
  for (const link of document.querySelectorAll("#nav a")) {
    if (link.pathname === location.pathname) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  closePage = match ? openWhenLoaded(match, place) : () => {};
  if (match) return;
  document.title = `${t("Not found")} · Trainyard`;
  place.append(h("h1", {}, t("Not found")), h("p", {}, h("a", { href: "/" }, t("To the jobs"))));
}

/** Returns a function that closes the page, also one that is not loaded yet. */
function openWhenLoaded({ load, params }, place) {
  let close = () => {};
  let isClosed = false;
  const open = (page) => {
    if (isClosed) return;
    document.title = `${page.title} · Trainyard`;
    close = page.open(place, params) ?? close;
  };
  const fail = () => place.append(h("p", { class: "error", role: "alert" }, t("This page could not be loaded.")), h("button", { type: "button", onclick: () => location.reload() }, t("Load again")));
  load().then(open, fail);
  return () => {
    isClosed = true;
    close();
  };
}

/** Sets a query parameter of the URL without a history entry; null removes it. */
export function setParam(name, value) {
  const address = new URL(location.href);
  if (value === null || value === undefined || value === "") address.searchParams.delete(name);
  else address.searchParams.set(name, value);
  if (address.href !== location.href) history.replaceState(null, "", address);
}

/** Sets all values of a query parameter. */
export function setParams(name, values) {
  const address = new URL(location.href);
  address.searchParams.delete(name);
  for (const value of values) address.searchParams.append(name, value);
  if (address.href !== location.href) history.replaceState(null, "", address);
}

export const getParams = (name) => new URLSearchParams(location.search).getAll(name);
export const getParam = (name) => new URLSearchParams(location.search).get(name);

function findRoute(path) {
  for (const route of routes) {
    const match = route.match.exec(path);
    if (match) return { ...route, params: Object.fromEntries(route.names.map((name, i) => [name, decodeURIComponent(match[i + 1])])) };
  }
  return null;
}
