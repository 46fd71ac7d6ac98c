// Client of the public API. The token is sent in a header, never in a URL, and is kept as long as the tab.
import { t } from "./i18n.js";
import { tabStorage } from "./storage.js";
const STORAGE_KEY = "trainyard-token";

/** An error response (RFC 9457), with `errors` for each invalid field of a request. */
export class ApiError extends Error {
  constructor(body, status) {
    super(body.detail ?? t("HTTP status {status}", { status }));
    this.status = status;
    this.code = body.code ?? "unknown";
    this.errors = body.errors ?? [];
    this.body = body;
  }
}

/** No response, or one from a proxy in front of the service. */
export class ServiceUnreachable extends Error {}

/** Events: "offline" and "online" when the connection changes, "unauthorized" when the service requires a token. */
export const connection = new EventTarget();
let isOffline = false;

export const token = {
  get: () => tabStorage.get(STORAGE_KEY),
  set: (value) => (value ? tabStorage.set(STORAGE_KEY, value) : tabStorage.remove(STORAGE_KEY)),
};

export function requestHeaders(more = {}) {
  const given = token.get();
  return { Accept: "application/json", ...(given ? { Authorization: `Bearer ${given}` } : {}), ...more };
}

/** Returns the response; throws ApiError or ServiceUnreachable. */
export async function request(path, options = {}) {
  const sentWith = token.get();
  let response;
  try {
    response = await fetch(path, { cache: "no-cache", credentials: "omit", ...options, headers: requestHeaders(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    setOffline(true);
    throw new ServiceUnreachable(t("The service does not answer"));
  }
  if (response.status === 502 || response.status === 504) {
    setOffline(true);
    throw new ServiceUnreachable(t("The service does not answer"));
  }
  setOffline(false);
  // A late response to a request with an earlier token says nothing about the present one.
  if (response.status === 401 && token.get() === sentWith) connection.dispatchEvent(new Event("unauthorized"));
  if (!response.ok) throw new ApiError(await response.json().catch(() => ({})), response.status);
  return response;
}

export const get = async (path, options) => (await request(path, options)).json();

/** Returns at least `most` entries of a list, if there are so many, from the one after the id `after`. Reads page by page. */
export async function getAll(path, { most = 1000, after = null } = {}) {
  const items = [];
  for (let more = true; more && items.length < most; ) {
    const page = await get(withQuery(path, { limit: 100, after: items.at(-1)?.id ?? after }));
    items.push(...page.data);
    more = page.has_more;
  }
  return items;
}

/** For `catch`: returns null if the requested object does not exist (404), and throws all other errors. */
export function nullIfNotFound(error) {
  if (error instanceof ApiError && error.status === 404) return null;
  throw error;
}

/** Sends a request with a JSON body and returns the JSON response. */
export async function sendJson(method, path, body, more = {}) {
  const options = { method, headers: { ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...more } };
  if (body !== undefined) options.body = JSON.stringify(body);
  const response = await request(path, options);
  return response.status === 204 ? null : response.json();
}

/** Returns a new idempotency key. `crypto.randomUUID` exists only on pages with https or of the same host. */
export const randomKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** Adds query parameters to a path; empty values are left out, lists repeat the name. */
export function withQuery(path, given) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(given)) {
    for (const item of [value].flat()) if (item !== null && item !== undefined && item !== "") parts.append(name, item);
  }
  return parts.size ? `${path}?${parts}` : path;
}

function setOffline(offline) {
  if (offline === isOffline) return;
  isOffline = offline;
  connection.dispatchEvent(new Event(offline ? "offline" : "online"));
}
