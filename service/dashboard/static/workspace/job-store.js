// The jobs that the workspace knows: all are fetched once with their specs, then only those that may have changed, as summaries.
import { ApiError, get, withQuery } from "../api.js";
import { FINAL_STATUSES, STATUSES } from "../status.js";

const PAGE_SIZE = 100; // the most that the service returns at once
const MAX_JOBS = 3000; // fetched without a filter; of more jobs, those that match a filter are fetched when it is set
const NEWEST = 20;
const MAX_SINGLE = 8; // jobs fetched one by one in one update
const REFRESH_MS = 60_000; // all jobs are fetched again this often: a finished one may get another group
const ACTIVE = STATUSES.filter((name) => !FINAL_STATUSES.has(name));

/** The jobs that are discarded, or those that are not. */
export class JobStore {
  constructor(discarded) {
    this.discarded = discarded;
    this.jobs = new Map();
    this.ids = []; // newest first
    this.outdated = new Set(); // jobs whose spec is unknown, or that have left the list of active ones
    this.loadedAt = null;
    this.isComplete = false;
  }

  /** Returns the jobs, newest first. */
  all() {
    return this.ids.map((id) => this.jobs.get(id));
  }

  /** Brings the jobs up to date. `filter`: parameters of `/jobs` that matter if there are too many jobs; `onPage` is called after each page of a long list. */
  async update(filter, onPage) {
    if (this.loadedAt === null || performance.now() - this.loadedAt > REFRESH_MS) await this.loadAll(onPage);
    else await this.refresh(onPage);
    const wanted = JSON.stringify(filter);
    if (!this.isComplete && wanted !== this.searched && Object.values(filter).some((value) => value?.length)) {
      this.searched = wanted;
      const found = await this.fetchPages({ ...filter, fields: null }, MAX_JOBS, onPage);
      this.ids.push(...found.ids.filter((id) => !this.ids.includes(id)));
    }
    await this.fetchOutdated();
  }

  async loadAll(onPage) {
    const first = this.loadedAt === null;
    const { ids, more } = await this.fetchPages({ fields: first ? null : "summary" }, MAX_JOBS, onPage);
    const listed = new Set(ids);
    // Older than the newest 3,000, and found by a filter: they stay.
    const rest = more ? this.ids.filter((id) => !listed.has(id)) : [];
    this.setIds([...ids, ...rest]);
    [this.loadedAt, this.isComplete] = [performance.now(), !more];
  }

  async fetchPages(query, limit, onPage) {
    const ids = [];
    for (let more = true, after = null; more; after = ids.at(-1)) {
      const page = await this.fetchPage({ ...query, after });
      ids.push(...page.data.map((job) => job.id));
      more = page.has_more;
      if (this.loadedAt === null) this.ids = [...ids];
      onPage();
      if (ids.length >= limit) return { ids, more };
    }
    return { ids, more: false };
  }

  async fetchPage(query) {
    const page = await get(withQuery("/jobs", { limit: PAGE_SIZE, discarded: this.discarded ? "true" : null, ...query }));
    page.data.forEach((job) => this.put(job));
    return page;
  }

  /** Fetches the newest jobs and those that have not ended; a finished job rarely changes. */
  async refresh(onPage) {
    const before = new Set(this.jobs.keys());
    const [newest, active] = await Promise.all([this.fetchPage({ limit: NEWEST, fields: "summary" }), this.fetchPage({ status: ACTIVE, fields: "summary" })]);
    const ids = newest.data.map((job) => job.id);
    if (ids.filter((id) => !before.has(id)).length > MAX_SINGLE) {
      this.loadedAt = null;
      await this.loadAll(onPage);
      return;
    }
    const known = this.ids.indexOf(ids.at(-1));
    const older = newest.has_more ? this.ids.slice(known + 1) : [];
    const listed = new Set(ids);
    this.setIds([...ids, ...older.filter((id) => !listed.has(id))]);
    const isActive = new Set(active.data.map((job) => job.id));
    if (!active.has_more) for (const job of this.jobs.values()) if (!FINAL_STATUSES.has(job.status) && !isActive.has(job.id)) this.outdated.add(job.id);
  }

  setIds(ids) {
    this.ids = ids;
    const listed = new Set(ids);
    for (const id of this.jobs.keys()) if (!listed.has(id)) this.jobs.delete(id);
  }

  /** Keeps the spec and the plan of a job that is fetched without them, until another attempt may have changed them. */
  put(job) {
    const known = this.jobs.get(job.id);
    if (job.spec === undefined && (known?.spec === undefined || known.attempt !== job.attempt)) this.outdated.add(job.id);
    this.jobs.set(job.id, { ...known, ...job });
  }

  async fetchOutdated() {
    const ids = [...this.outdated].slice(0, MAX_SINGLE);
    await Promise.all(ids.map(async (id) => {
      this.outdated.delete(id);
      try {
        const job = await get(`/jobs/${id}`);
        if (job.discarded === this.discarded) this.put(job);
        else this.remove(id);
      } catch (error) {
        if (!(error instanceof ApiError && error.status === 404)) throw error;
        this.remove(id);
      }
    }));
  }

  remove(id) {
    this.jobs.delete(id);
    this.ids = this.ids.filter((other) => other !== id);
  }
}
