// A status is a glyph and a word, never a colour alone.
import { attr, h, text } from "./dom.js";

const GLYPHS = {
  queued: "…", starting: "▷", running: "▶", pausing: "◫", paused: "❚❚", cancelling: "◫", cancelled: "■",
  interrupted: "↯", succeeded: "✓", failed: "✗",
};
export const STATUSES = Object.keys(GLYPHS);
export const OVER = new Set(["succeeded", "failed", "cancelled"]);

export function badge() {
  return h("span", { class: "status" }, h("span", { class: "glyph", "aria-hidden": "true" }), h("span"));
}

export function showStatus(node, status) {
  attr(node, "class", `status ${status}`);
  text(node.firstChild, GLYPHS[status] ?? "?");
  text(node.lastChild, status);
}
