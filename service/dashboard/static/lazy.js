// Modules that are loaded when they are needed, or when the first page has been open for a while.
// Then every page opens at once, also while the service is down and after an upgrade, when the old files are gone.
const REST_AFTER_MS = 4000;
const loaders = [];

/** Returns a function that calls `load`, an `import()`, once; again after a failure. */
export function lazy(load) {
  let loaded = null;
  const once = () => (loaded ??= load().catch((error) => {
    loaded = null;
    throw error;
  }));
  loaders.push(once);
  return once;
}

/** Loads everything that is still missing, in idle time while the page is visible. A failure is shown when the module is needed. */
export function loadRestLater() {
  const idle = window.requestIdleCallback ?? setTimeout;
  // Modules that are loaded here may add others to the list.
  setTimeout(() => idle(async () => {
    for (const load of loaders) {
      await untilVisible();
      await load().catch(() => {});
    }
  }), REST_AFTER_MS);
}

function untilVisible() {
  return new Promise((resolve) => {
    const check = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
    check();
  });
}
