// The page's heartbeat: looks again while it is seen, says how fresh it is, and keeps what it has when the service is away.
import { Away, connection } from "./api.js";
import { h, show, text } from "./dom.js";
import { clock, duration } from "./format.js";

export const BEAT_MS = 2000;

/** Calls `look` at once and every 2 s while the tab is seen; coming back looks at once. Returns a stop. */
export function beat(look, every = BEAT_MS) {
  let timer = null;
  let ended = false;
  let busy = false;
  let again = false;
  const once = async () => {
    clearTimeout(timer);
    if (ended || document.hidden) return;
    again = busy;
    if (busy) return;
    busy = true;
    try {
      await look();
      freshNow();
    } catch (error) {
      if (error.name !== "AbortError" && error.name !== "Error") console.warn(error);
    } finally {
      busy = false;
    }
    // Who asked meanwhile wants what is there now, not what was asked for before.
    if (!ended && !document.hidden) timer = setTimeout(once, again ? 0 : every);
  };
  const turned = () => (document.hidden ? clearTimeout(timer) : once());
  document.addEventListener("visibilitychange", turned);
  once();
  return Object.assign(
    () => {
      ended = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", turned);
    },
    { now: once },
  );
}

/** Calls `work` until it was done once, unless `gone` says that nobody waits any more. */
export async function untilDone(work, gone) {
  while (!gone()) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof Away)) throw error;
      await new Promise((done) => setTimeout(done, BEAT_MS));
    }
  }
}

/** Calls `work` now or later, never more often than every 2 s. */
export function atMost(work, every = BEAT_MS) {
  let last = 0;
  let timer = null;
  const call = () => {
    if (timer !== null) return;
    timer = setTimeout(() => {
      timer = null;
      last = performance.now();
      requestAnimationFrame(work);
    }, Math.max(0, last + every - performance.now()));
  };
  call.stop = () => clearTimeout(timer);
  return call;
}

let freshAt = null;
let lostAt = null;

export function freshNow() {
  freshAt = Date.now();
  tell();
}

/** "updated 2 s ago" in the head, and the grey banner while the service is away. */
export function watchFreshness() {
  setInterval(tell, 1000);
  connection.addEventListener("lost", () => {
    lostAt = Date.now();
    tell();
  });
  connection.addEventListener("found", () => {
    lostAt = null;
    tell();
  });
}

function tell() {
  const fresh = document.getElementById("fresh");
  text(fresh, freshAt === null ? "" : `updated ${duration((Date.now() - freshAt) / 1000)} ago`);
  const away = document.getElementById("away");
  show(away, lostAt !== null);
  if (lostAt === null) return;
  const since = freshAt === null ? "" : ` What you see is from ${clock(freshAt)}.`;
  if (!away.firstChild) away.append(h("span"));
  text(away.firstChild, `The service is away; runs go on without it.${since} Trying again.`);
}
