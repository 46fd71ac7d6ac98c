// Entry point: theme, connection state, routes, and the login form if the service requires a token.
import { connection, token } from "./api.js";
import { h } from "./dom.js";
import { setUpLanguage, t } from "./i18n.js";
import { listenForKeys } from "./keyboard.js";
import { lazy, loadRestLater } from "./lazy.js";
import { watchJobs } from "./notifications.js";
import { showConnectionState } from "./polling.js";
import { addRoute, openPage, startRouter } from "./router.js";
import { setUpTheme } from "./theme.js";

const NAV = [["/", t("Jobs")], ["/compare", t("Compare")], ["/data", t("Data")], ["/system", t("System")], ["/submit", t("Submit")]];

function showLogin() {
  const main = document.getElementById("main");
  if (main.querySelector("#login")) return;
  const field = h("input", { id: "token", type: "password", autocomplete: "current-password", required: true });
  const enter = (event) => {
    event.preventDefault();
    token.set(field.value.trim());
    openPage();
  };
  const error = token.get() ? h("p", { class: "error", id: "token-error" }, t("That token was not accepted.")) : null;
  const note = h("p", { class: "muted" }, t("The service requires a token. It is kept in this tab only."));
  const form = h("form", { id: "login", class: "login", onsubmit: enter }, h("h1", {}, t("Token")), note,
    h("label", { for: "token" }, t("Token")), field, error, h("button", { class: "primary" }, t("Enter")));
  token.set(null);
  main.replaceChildren(form);
  field.focus();
}

document.getElementById("nav").append(...NAV.map(([address, name]) => h("a", { href: address }, name)));
setUpLanguage(document.getElementById("language"));
setUpTheme(document.getElementById("theme"));
showConnectionState();
listenForKeys();
watchJobs();
connection.addEventListener("unauthorized", showLogin);
addRoute("/", lazy(() => import("./pages/jobs.js").then(({ jobsPage }) => jobsPage)));
addRoute("/jobs", lazy(() => import("./pages/jobs.js").then(({ jobsPage }) => jobsPage)));
addRoute("/jobs/:id", lazy(() => import("./pages/job.js").then(({ jobPage }) => jobPage)));
addRoute("/compare", lazy(() => import("./pages/compare.js").then(({ comparePage }) => comparePage)));
addRoute("/data", lazy(() => import("./pages/data.js").then(({ dataPage }) => dataPage)));
addRoute("/data/:id", lazy(() => import("./pages/data.js").then(({ corpusPage }) => corpusPage)));
addRoute("/system", lazy(() => import("./pages/system.js").then(({ systemPage }) => systemPage)));
addRoute("/submit", lazy(() => import("./pages/submit.js").then(({ submitPage }) => submitPage)));
addRoute("/docs", lazy(() => import("./pages/docs.js").then(({ docsPage }) => docsPage)));
startRouter();
loadRestLater();
