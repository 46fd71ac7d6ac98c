// Tells the user with a notification of the browser that a watched job has ended. Watched jobs are kept in this browser.
import { ApiError, get, withQuery } from "./api.js";
import { announce } from "./dom.js";
import { t } from "./i18n.js";
import { navigate } from "./router.js";
import { FINAL_STATUSES, STATUSES, wordFor } from "./status.js";
import { browserStorage } from "./storage.js";

const STORAGE_KEY = "trainyard-watched";
const ASKED_KEY = "trainyard-notifications-asked";
const CHECK_MS = 15_000; // also in a hidden tab, while a job is watched
const ACTIVE = STATUSES.filter((name) => !FINAL_STATUSES.has(name));

/** Returns the names of the watched jobs by id. */
function read() {
  try {
    return JSON.parse(browserStorage.get(STORAGE_KEY)) ?? {};
  } catch {
    return {};
  }
}

const write = (names) => browserStorage.set(STORAGE_KEY, JSON.stringify(names));

export const canWatch = (job) => !FINAL_STATUSES.has(job.status);
export const isWatched = (job) => job.id in read();

/** Watches jobs, or stops watching them. The first time, the browser asks for permission. */
export async function setWatched(jobs, wanted) {
  const names = read();
  for (const { id, name } of jobs) {
    if (wanted) names[id] = name;
    else delete names[id];
  }
  write(names);
  if (!wanted) return announce(t("You will not be notified"));
  const allowed = await askOnce();
  return announce(allowed ? t("You will be notified when the job ends") : t("The browser shows no notifications. This page will tell you while it is open"));
}

async function askOnce() {
  if (!("Notification" in window)) return false;
  if (Notification.permission === "default" && browserStorage.get(ASKED_KEY) === null) {
    browserStorage.set(ASKED_KEY, "yes");
    await Notification.requestPermission();
  }
  return Notification.permission === "granted";
}

/** Checks the watched jobs every 15 s; sends nothing while none is watched. */
export function watchJobs() {
  setInterval(() => check().catch((error) => error instanceof TypeError && console.warn(error)), CHECK_MS);
}

async function check() {
  const ids = Object.keys(read());
  if (!ids.length) return;
  const active = new Set((await get(withQuery("/jobs", { status: ACTIVE, limit: 100, fields: "summary" }))).data.map((job) => job.id));
  for (const id of ids.filter((each) => !active.has(each))) {
    const job = await get(`/jobs/${id}`).catch((error) => (error instanceof ApiError && error.status === 404 ? null : Promise.reject(error)));
    if (job && canWatch(job)) continue;
    const names = read();
    // Another tab has notified the user.
    if (!(id in names)) continue;
    delete names[id];
    write(names);
    if (job) tell(job);
  }
}

function tell(job) {
  const title = `${job.name} ${wordFor(job.status)}`;
  announce(t("{title}. {summary}", { title, summary: job.summary }));
  if (!("Notification" in window) || Notification.permission !== "granted") return;
  // A notification with the same tag is replaced, so several tabs show one.
  const shown = new Notification(title, { body: job.summary, tag: job.id });
  shown.addEventListener("click", () => (window.focus(), navigate(`/jobs/${job.id}`)));
}
