// Server-sent events over fetch: EventSource can send no token. Goes on behind the last event after every cut.
import { Away, Refused, fetched } from "./api.js";

const QUIET_MS = 40_000; // The service says something every 15 s.
const WAITS = [500, 1000, 2000, 4000, 8000];

/** Opens a stream; `take(kind, data)` gets each event. Returns a function that closes it. */
export function follow(path, take) {
  const life = { closed: false, abort: null, last: null, tries: 0 };
  run(life, path, take);
  return () => {
    life.closed = true;
    life.abort?.abort();
  };
}

async function run(life, path, take) {
  while (!life.closed) {
    life.abort = new AbortController();
    try {
      if (await read(life, path, take)) return;
    } catch (error) {
      if (error instanceof Refused && error.status < 500 && error.status !== 429) return;
      if (!(error instanceof Away) && error.name !== "AbortError" && !(error instanceof Refused)) console.warn(error);
    }
    if (!life.closed) await new Promise((done) => setTimeout(done, WAITS[Math.min(life.tries++, WAITS.length - 1)]));
  }
}

/** True once the service says that nothing more will come. */
async function read(life, path, take) {
  const more = life.last ? { "Last-Event-ID": life.last } : {};
  const answer = await fetched(path, { signal: life.abort.signal, headers: { Accept: "text/event-stream", ...more } });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const quiet = setTimeout(() => life.abort.abort(), QUIET_MS);
    const { done, value } = await reader.read().finally(() => clearTimeout(quiet));
    if (done || life.closed) return false;
    life.tries = 0;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = parsed(block);
      if (event === null) continue;
      if (event.id) life.last = event.id;
      take(event.kind, event.data);
      if (event.kind === "end") return true;
    }
  }
}

/** One block of lines as `{id, kind, data}`; null for a comment. */
export function parsed(block) {
  const found = { id: null, kind: "message", data: "" };
  let any = false;
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    if (at < 1) continue;
    const [name, value] = [line.slice(0, at), line.slice(at + 2)];
    if (name === "id") found.id = value;
    if (name === "event") found.kind = value;
    if (name === "data") [found.data, any] = [found.data + value, true];
  }
  return any ? { ...found, data: JSON.parse(found.data) } : null;
}
