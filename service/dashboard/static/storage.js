// What the browser keeps: settings for all tabs, drafts and the token for this tab.
// If the browser blocks its storage, or it is full, values are kept in memory until the page is closed.

/** `open` returns the browser's storage; it throws if the browser blocks it. */
function storage(open) {
  const inMemory = new Map();
  return {
    get(key) {
      if (inMemory.has(key)) return inMemory.get(key);
      try {
        return open().getItem(key);
      } catch {
        return null;
      }
    },
    set(key, value) {
      inMemory.delete(key);
      try {
        open().setItem(key, value);
      } catch {
        inMemory.set(key, value);
      }
    },
    remove(key) {
      inMemory.delete(key);
      try {
        open().removeItem(key);
      } catch {
        // Nothing is kept there.
      }
    },
  };
}

export const browserStorage = storage(() => localStorage);
export const tabStorage = storage(() => sessionStorage);
