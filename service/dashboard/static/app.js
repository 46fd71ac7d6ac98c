// Begins: theme, freshness, pages, and the login where the service wants a token.
import { connection, token } from "./api.js";
import { h } from "./dom.js";
import { watchFreshness } from "./polling.js";
import { compare } from "./pages/compare.js";
import { job } from "./pages/job.js";
import { jobs } from "./pages/jobs.js";
import { submit } from "./pages/submit.js";
import { system } from "./pages/system.js";
import { open, page, start } from "./router.js";
import { setUp } from "./theme.js";

const NAV = [["/", "Jobs"], ["/compare", "Compare"], ["/system", "System"], ["/submit", "Submit"]];

function login() {
  const main = document.getElementById("main");
  if (main.querySelector("#login")) return;
  const field = h("input", { id: "token", type: "password", autocomplete: "current-password", required: true });
  const enter = (event) => {
    event.preventDefault();
    token.set(field.value.trim());
    open();
  };
  const wrong = token.get() ? h("p", { class: "wrong", id: "token-wrong" }, "That token was not accepted.") : null;
  const words = h("p", { class: "muted" }, "The service wants a token. It stays in this tab only.");
  const form = h("form", { id: "login", class: "login", onsubmit: enter }, h("h1", {}, "Token"), words,
    h("label", { for: "token" }, "Token"), field, wrong, h("button", { class: "primary" }, "Enter"));
  token.set(null);
  main.replaceChildren(form);
  field.focus();
}

document.getElementById("nav").append(...NAV.map(([address, name]) => h("a", { href: address }, name)));
setUp(document.getElementById("theme"));
watchFreshness();
connection.addEventListener("token", login);
page("/", jobs);
page("/jobs", jobs);
page("/jobs/:id", job);
page("/compare", compare);
page("/system", system);
page("/submit", submit);
start();
