// Calls the public API. The token stands in a header, never in an address, and lives as long as the tab.
const KEY = "trainyard-token";

/** The service said no: RFC 9457, with `errors` for each field of a bad spec. */
export class Refused extends Error {
  constructor(body, status) {
    super(body.detail ?? `answered ${status}`);
    this.status = status;
    this.code = body.code ?? "unknown";
    this.errors = body.errors ?? [];
    this.body = body;
  }
}

/** Nobody answered, or who did is no service of ours. */
export class Away extends Error {}

/** "lost" and "found" as the service goes and comes, "token" where it wants one. */
export const connection = new EventTarget();
let lost = false;

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export function headers(more = {}) {
  const given = token.get();
  return { Accept: "application/json", ...(given ? { Authorization: `Bearer ${given}` } : {}), ...more };
}

/** A raw answer that is not a refusal. */
export async function fetched(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", credentials: "omit", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    noticed(true);
    throw new Away("The service does not answer");
  }
  if (answer.status === 502 || answer.status === 504) {
    noticed(true);
    throw new Away("The service does not answer");
  }
  noticed(false);
  if (answer.status === 401) connection.dispatchEvent(new Event("token"));
  if (!answer.ok) throw new Refused(await answer.json().catch(() => ({})), answer.status);
  return answer;
}

export const get = async (path, options) => (await fetched(path, options)).json();

/** A change; `body` is JSON. */
export async function send(method, path, body, more = {}) {
  const options = { method, headers: { ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...more } };
  if (body !== undefined) options.body = JSON.stringify(body);
  const answer = await fetched(path, options);
  return answer.status === 204 ? null : answer.json();
}

/** A path with a query; what is null is left out, lists repeat their name. */
export function query(path, given) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(given)) {
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") parts.append(name, one);
  }
  return parts.size ? `${path}?${parts}` : path;
}

function noticed(gone) {
  if (gone === lost) return;
  lost = gone;
  connection.dispatchEvent(new Event(gone ? "lost" : "found"));
}
