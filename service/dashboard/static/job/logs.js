// A rank's log as it is written: the newest part of it, with a search in what is shown.
import { get, query } from "../api.js";
import { h, text } from "../dom.js";
import { keep, kept } from "../router.js";

const TAIL = 500;
const KEPT = 400_000;

export class Logs {
  constructor(place, address) {
    this.address = address;
    this.rank = h("input", { id: "rank", size: "6", value: kept("rank") ?? "0", title: "a rank's number, or agent" });
    this.search = h("input", { id: "grep", type: "search", placeholder: "Lines with" });
    this.follow = h("input", { id: "follow", type: "checkbox", checked: true });
    this.note = h("span", { class: "muted", role: "status" });
    this.box = h("pre", { class: "log", tabindex: "0", "aria-label": "Log" });
    this.all = "";
    place.append(h("div", { class: "bar" }, h("label", { for: "rank" }, "Rank"), this.rank, this.search, h("label", { for: "follow" }, "Follow"), this.follow, this.note), this.box);
    this.search.addEventListener("input", () => this.draw());
    this.rank.addEventListener("change", () => {
      keep("rank", this.rank.value);
      Object.assign(this, { all: "", offset: null });
      this.update(this.job);
    });
  }

  async update(job) {
    this.job = job;
    if (this.busy || !job.attempt) return this.tell(job.attempt ? "" : "Not launched yet.");
    this.busy = true;
    try {
      if (this.attempt !== job.attempt) Object.assign(this, { attempt: job.attempt, all: "", offset: null });
      const from = this.offset === null || this.offset === undefined ? { tail: TAIL } : { offset: this.offset };
      const found = await get(query(`${this.address}/logs`, { rank: this.rank.value, attempt: job.attempt, limit: 1 << 18, ...from }));
      this.offset = found.next_offset;
      this.tell("");
      if (found.data || !this.all) {
        this.all = (this.all + found.data).slice(-KEPT);
        this.draw();
      }
    } catch (error) {
      this.tell(error.message);
    } finally {
      this.busy = false;
    }
  }

  tell(words) {
    text(this.note, words);
  }

  draw() {
    const wanted = this.search.value.toLowerCase();
    const shown = wanted ? this.all.split("\n").filter((line) => line.toLowerCase().includes(wanted)).join("\n") : this.all;
    text(this.box, shown);
    if (this.follow.checked) this.box.scrollTop = this.box.scrollHeight;
  }
}
