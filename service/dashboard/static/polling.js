// Polls while the tab is visible, shows the time of the last update, and a banner while the service is unreachable.
import { ServiceUnreachable, connection } from "./api.js";
import { h, setText, setVisible } from "./dom.js";
import { duration, timeOrDateTime } from "./format.js";
import { t } from "./i18n.js";

export const POLL_MS = 2000;

/** Calls `work` at once and every 2 s while the tab is visible, and at once when it becomes visible again. Returns a function that stops it. */
export function poll(work, every = POLL_MS) {
  let timer = null;
  let stopped = false;
  let busy = false;
  let again = false;
  const once = async () => {
    clearTimeout(timer);
    if (stopped || document.hidden) return;
    again = busy;
    if (busy) return;
    busy = true;
    try {
      await work();
      markUpdated();
    } catch (error) {
      if (error.name !== "AbortError" && error.name !== "Error") console.warn(error);
    } finally {
      busy = false;
    }
    // A call that came during this one needs newer data than it returned.
    if (!stopped && !document.hidden) timer = setTimeout(once, again ? 0 : every);
  };
  const onVisibility = () => (document.hidden ? clearTimeout(timer) : once());
  document.addEventListener("visibilitychange", onVisibility);
  once();
  return Object.assign(
    () => {
      stopped = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", onVisibility);
    },
    { now: once },
  );
}

/** Calls `work` until it succeeds once, or until `isCancelled()` is true. */
export async function retryUntilReachable(work, isCancelled) {
  while (!isCancelled()) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof ServiceUnreachable)) throw error;
      await new Promise((done) => setTimeout(done, POLL_MS));
    }
  }
}

/** Returns a function that calls `work` at most every 2 s. */
export function throttle(work, every = POLL_MS) {
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

let updatedAt = null;
let offlineSince = null;

export function markUpdated() {
  updatedAt = Date.now();
  render();
}

/** Shows "updated 2 s ago" in the header, and the grey banner while the service is unreachable. */
export function showConnectionState() {
  setInterval(render, 1000);
  connection.addEventListener("offline", () => {
    offlineSince = Date.now();
    render();
  });
  connection.addEventListener("online", () => {
    offlineSince = null;
    render();
  });
}

function render() {
  const updated = document.getElementById("updated");
  setText(updated, updatedAt === null ? "" : t("updated {duration} ago", { duration: duration((Date.now() - updatedAt) / 1000) }));
  const banner = document.getElementById("offline");
  setVisible(banner, offlineSince !== null);
  if (offlineSince === null) return;
  if (!banner.firstChild) banner.append(h("span"));
  setText(banner.firstChild, updatedAt === null ? t("The service is unreachable; runs continue without it. Retrying.")
    : t("The service is unreachable; runs continue without it. This page shows the state of {time}. Retrying.", { time: timeOrDateTime(updatedAt) }));
}
