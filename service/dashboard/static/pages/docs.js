// The page of the API: Swagger UI, from the service itself, with the token of this tab.
import { ServiceUnreachable, requestHeaders } from "../api.js";
import { h } from "../dom.js";
import { fetchOpenApi } from "../form/schema.js";
import { t } from "../i18n.js";

const MISSING = t("This page needs Swagger UI, which is not installed where the service runs. The document itself is at /openapi.json.");
let libraryPromise = null;

export const docsPage = { title: t("API"), open };

function open(place) {
  let isOpen = true;
  const node = h("div", { id: "swagger-ui", lang: "en" });
  place.append(node);
  Promise.all([fetchOpenApi(), loadLibrary()])
    .then(([spec, SwaggerUI]) => isOpen && SwaggerUI({ spec, domNode: node, deepLinking: true, validatorUrl: null, requestInterceptor: addToken }))
    .catch((error) => isOpen && node.replaceChildren(h("p", { class: "error" }, error instanceof ServiceUnreachable || error.status ? error.message : MISSING)));
  return () => (isOpen = false);
}

/** Adds the token of this tab, unless the user has entered another one. */
function addToken(request) {
  const { Authorization } = requestHeaders();
  if (Authorization) request.headers.Authorization ??= Authorization;
  return request;
}

function loadLibrary() {
  libraryPromise ??= new Promise((done, failed) => {
    const [script, style] = ["swagger-script", "swagger-style"].map((name) => document.querySelector(`meta[name=${name}]`).content);
    if (!script || !style) throw new Error(MISSING);
    document.head.append(
      h("link", { rel: "stylesheet", href: style }),
      h("script", { src: script, onload: () => done(window.SwaggerUIBundle), onerror: () => ((libraryPromise = null), failed(new Error(MISSING))) }),
    );
  });
  return libraryPromise;
}
