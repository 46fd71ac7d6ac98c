// Server-sent events over fetch, because EventSource cannot send a token. Reconnects after the last event id.
import { ApiError, ServiceUnreachable, request } from "./api.js";
import { t } from "./i18n.js";

const SILENCE_TIMEOUT_MS = 40_000; // The service sends a comment every 15 s.
const RETRY_DELAYS_MS = [500, 1000, 2000, 4000, 8000];

/** Opens a stream; `take(kind, data)` is called with each event. Returns a function that closes it. */
export function openEventStream(path, take) {
  const life = { closed: false, abort: null, last: null, tries: 0 };
  readWithRetries(life, path, take);
  return () => {
    life.closed = true;
    life.abort?.abort();
  };
}

async function readWithRetries(life, path, take) {
  while (!life.closed) {
    life.abort = new AbortController();
    try {
      if (await readEvents(life, path, take)) return;
    } catch (error) {
      if (error instanceof ApiError && error.status < 500 && error.status !== 429) return;
      if (!(error instanceof ServiceUnreachable) && error.name !== "AbortError" && !(error instanceof ApiError)) console.warn(error);
    }
    if (!life.closed) await new Promise((done) => setTimeout(done, RETRY_DELAYS_MS[Math.min(life.tries++, RETRY_DELAYS_MS.length - 1)]));
  }
}

/** Returns true after the service has sent the "end" event. */
async function readEvents(life, path, take) {
  const more = life.last ? { "Last-Event-ID": life.last } : {};
  const response = await request(path, { cache: "no-store", signal: life.abort.signal, headers: { Accept: "text/event-stream", ...more } });
  for await (const event of eventsOf(response, () => life.abort.abort())) {
    if (life.closed) return false;
    life.tries = 0;
    if (event.id) life.last = event.id;
    if (event.kind === "comment") continue;
    take(event.kind, event.data);
    if (event.kind === "end") return true;
  }
  return false;
}

/** Sends `body` and calls `take(kind, data)` with each event of the response. Throws if the connection breaks before the "end". */
export async function streamOnce(path, body, take, signal) {
  const headers = { Accept: "text/event-stream", "Content-Type": "application/json" };
  const response = await request(path, { cache: "no-store", method: "POST", body: JSON.stringify(body), headers, signal });
  for await (const event of eventsOf(response, (reader) => reader.cancel())) {
    if (event.kind !== "comment") take(event.kind, event.data);
    if (event.kind === "end") return;
  }
  throw new ServiceUnreachable(t("The connection ended too early"));
}

/** Yields the events of a response, also comments. Calls `onSilence(reader)` if nothing comes for too long. */
async function* eventsOf(response, onSilence) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const timeout = setTimeout(onSilence, SILENCE_TIMEOUT_MS, reader);
    const { done, value } = await reader.read().finally(() => clearTimeout(timeout));
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) yield parseEvent(block) ?? { id: null, kind: "comment" };
  }
}

/** Parses one block of lines to `{id, kind, data}`; null for a comment. */
export function parseEvent(block) {
  const event = { id: null, kind: "message", data: "" };
  let any = false;
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    if (at < 1) continue;
    const [name, value] = [line.slice(0, at), line.slice(at + 2)];
    if (name === "id") event.id = value;
    if (name === "event") event.kind = value;
    if (name === "data") [event.data, any] = [event.data + value, true];
  }
  return any ? { ...event, data: JSON.parse(event.data) } : null;
}
