// When the first words and the first curve were on the screen, in the browser's own list of marks: for those who measure.
const marked = new Set();

/** Marks `name` behind the frame that shows what was just made; once. */
export function mark(name) {
  if (marked.has(name)) return;
  marked.add(name);
  requestAnimationFrame(() => setTimeout(() => performance.mark(name)));
}
