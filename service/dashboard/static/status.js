// A status is shown as a glyph and a word, never by color alone.
import { h, setAttr, setText } from "./dom.js";
import { t } from "./i18n.js";

const GLYPHS = {
  queued: "…", preparing: "▤", starting: "▷", running: "▶", pausing: "◫", paused: "❚❚", cancelling: "◫", cancelled: "■",
  interrupted: "↯", succeeded: "✓", failed: "✗",
};
const CORPUS_GLYPHS = { ready: "✓", stopped: "■" };
/** The words that are shown for values of the API: statuses, triggers and outcomes of attempts, phases, and reasons. A value without a word is shown as it is. */
const WORDS = {
  queued: t("queued"), preparing: t("preparing"), starting: t("starting"), running: t("running"), pausing: t("pausing"), paused: t("paused"), cancelling: t("cancelling"), cancelled: t("cancelled"),
  interrupted: t("interrupted"), succeeded: t("succeeded"), failed: t("failed"), ready: t("ready"), stopped: t("stopped"), pending: t("pending"),
  submit: t("submit"), resume: t("resume"), restart: t("restart"), preemption: t("preemption"), completed: t("completed"), crashed: t("crashed"), killed: t("killed"),
  loading: t("loading"), preparing_data: t("preparing data"), compiling: t("compiling"), training: t("training"), evaluating: t("evaluating"), saving: t("saving"),
  user: t("user"), spec_invalid: t("spec invalid"), data_invalid: t("data invalid"), checkpoint_invalid: t("checkpoint invalid"), out_of_memory: t("out of memory"), host_out_of_memory: t("host out of memory"),
  disk_full: t("disk full"), diverged: t("diverged"), silent_corruption: t("silent corruption"), worker_crashed: t("worker crashed"), hung: t("hung"), host_restarted: t("host restarted"), agent_lost: t("agent lost"),
  launch_failed: t("launch failed"), max_restarts: t("max restarts"), terminated: t("terminated"), preempted: t("preempted"), time_limit: t("time limit"), node_lost: t("node lost"), limit: t("limit"), unknown: t("unknown"),
};
export const wordFor = (value) => WORDS[value] ?? value?.replaceAll("_", " ");
export const STATUSES = Object.keys(GLYPHS);
export const FINAL_STATUSES = new Set(["succeeded", "failed", "cancelled"]);

export function statusBadge() {
  return h("span", { class: "status" }, h("span", { class: "glyph", "aria-hidden": "true" }), h("span"));
}

export function showStatus(node, status) {
  setAttr(node, "class", `status ${status}`);
  setText(node.firstChild, GLYPHS[status] ?? CORPUS_GLYPHS[status] ?? "?");
  setText(node.lastChild, wordFor(status));
}
