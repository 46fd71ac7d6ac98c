// A status is shown as a glyph and a word, never by color alone.
import { h, setAttr, setText } from "./dom.js";

const GLYPHS = {
  queued: "…", preparing: "▤", starting: "▷", running: "▶", pausing: "◫", paused: "❚❚", cancelling: "◫", cancelled: "■",
  interrupted: "↯", succeeded: "✓", failed: "✗",
};
const CORPUS_GLYPHS = { ready: "✓", stopped: "■" };
export const STATUSES = Object.keys(GLYPHS);
export const FINAL_STATUSES = new Set(["succeeded", "failed", "cancelled"]);

export function statusBadge() {
  return h("span", { class: "status" }, h("span", { class: "glyph", "aria-hidden": "true" }), h("span"));
}

export function showStatus(node, status) {
  setAttr(node, "class", `status ${status}`);
  setText(node.firstChild, GLYPHS[status] ?? CORPUS_GLYPHS[status] ?? "?");
  setText(node.lastChild, status);
}
