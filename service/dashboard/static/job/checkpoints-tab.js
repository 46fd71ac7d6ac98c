// The checkpoints of a job, what may be made of one, and what was exported: with its path, to be copied.
import { fetched, get, send, token } from "../api.js";
import { attr, copy, h, list, say, show, table, text } from "../dom.js";
import { ago, bytes, count, exact, loss } from "../format.js";
import { go } from "../router.js";
import { Listing, cell, moved, tried } from "./list-tab.js";

const FORMATS = { hf: "Hugging Face", minimind: "MiniMind" };
const COLUMNS = [["Step", "num"], ["Kind"], ["Loss", "num"], ["Size", "num"], ["Saved"], ["sha256"], ["Do"]];
const EXPORTED = [["Step", "num"], ["Format"], ["Size", "num"], ["Path"], ["Files"]];

export class Checkpoints extends Listing {
  constructor(place, address) {
    super(place, address, { path: "/checkpoints", caption: "Checkpoints, newest first", none: "No checkpoint yet.", mark: moved, columns: COLUMNS, row: checkpointRow });
    this.exported = table(EXPORTED, "Exports");
    this.exported.node.classList.add("stack");
    this.exports = h("section", { hidden: true }, h("h2", {}, "Exports"), this.exported.node);
    place.append(this.exports);
  }

  async update(job) {
    const mark = this.mark(job);
    await Promise.all([super.update(job), mark === this.exportsMark ? null : this.updateExports(mark)]);
  }

  async updateExports(mark = this.exportsMark) {
    this.exportsMark = mark;
    try {
      const { data } = await get(`${this.address}/exports`);
      show(this.exports, data.length);
      list(this.exported.body, data, (one) => one.id, (one) => exportRow(one, this));
    } catch {
      this.exportsMark = null;
    }
  }
}

function checkpointRow(one, listing) {
  const at = `${listing.address}/checkpoints/${one.step}`;
  const doing = [
    act(listing, "Download", () => download(at, "model.safetensors")),
    ...Object.entries(FORMATS).map(([format, words]) => act(listing, `Export ${words}`, () => made(listing, at, format))),
    act(listing, "Fork from here", () => go(`/submit?fork=${encodeURIComponent(one.job_id)}&step=${one.step}`)),
  ];
  return h("tr", {}, cell(count(one.step), "num"), cell(one.kind), cell(loss(one.loss), "num"), cell(bytes(one.bytes), "num"),
    cell(ago(one.created_at), "", exact(one.created_at)), h("td", {}, h("code", { title: one.sha256 }, one.sha256.slice(0, 12))),
    h("td", { class: "doing" }, one.kind === "full" ? doing : doing.slice(0, 1)));
}

/** A button that is busy until its work is done. */
function act(listing, name, work) {
  const press = async () => {
    if (button.hasAttribute("aria-disabled")) return;
    attr(button, "aria-disabled", "true");
    text(button, `${name} …`);
    await tried(listing, work);
    attr(button, "aria-disabled", null);
    text(button, name);
  };
  const button = h("button", { type: "button", onclick: press }, name);
  return button;
}

async function made(listing, at, format) {
  const { path } = await send("POST", `${at}/export`, { format });
  say(`Exported to ${path}`);
  await listing.updateExports();
}

function exportRow(one, listing) {
  const files = one.files.map((file) =>
    act(listing, file.name, () => download(`${listing.address}/exports/${one.step}/${one.format}`, file.name)));
  const path = h("td", { class: "whole" }, h("code", {}, one.path), " ", h("button", { type: "button", class: "quiet", "aria-label": `Copy the path of ${one.id}`, onclick: () => copy(one.path, "Path") }, "copy"));
  return h("tr", {}, cell(count(one.step), "num"), cell(FORMATS[one.format] ?? one.format), cell(bytes(one.bytes), "num"), path, h("td", { class: "doing" }, files));
}

/** Straight to the disk where no token is needed; else with the token in a header, so by way of memory. */
async function download(place, name) {
  const path = `${place}/files/${encodeURIComponent(name)}`;
  if (!token.get()) return h("a", { href: path, download: name }).click();
  const blob = await (await fetched(path, { headers: { Accept: "*/*" } })).blob();
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
