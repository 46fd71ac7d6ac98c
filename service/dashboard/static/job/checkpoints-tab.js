// Checkpoints of a job with download, export and fork, and the list of exports.
import { get, request, sendJson, token } from "../api.js";
import { announce, copyText, createTable, h, setAttr, setText, setVisible, updateList } from "../dom.js";
import { ago, bytes, count, dateTime, loss } from "../format.js";
import { navigate } from "../router.js";
import { ListTab, cell, changeMark, runAction } from "./list-tab.js";

const FORMATS = { hf: "Hugging Face", minimind: "MiniMind" };
const COLUMNS = [["Step", "num"], ["Kind"], ["Loss", "num"], ["Size", "num"], ["Saved"], ["sha256"], ["Actions"]];
const EXPORT_COLUMNS = [["Step", "num"], ["Format"], ["Size", "num"], ["Path"], ["Files"]];

export class CheckpointsTab extends ListTab {
  constructor(place, address) {
    super(place, address, { path: "/checkpoints", caption: "Checkpoints, newest first", none: "No checkpoint yet.", mark: changeMark, columns: COLUMNS, row: checkpointRow });
    this.exported = createTable(EXPORT_COLUMNS, "Exports");
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
      setVisible(this.exports, data.length);
      updateList(this.exported.body, data, (one) => one.id, (one) => exportRow(one, this));
    } catch {
      this.exportsMark = null;
    }
  }
}

function checkpointRow(one, listing) {
  const at = `${listing.address}/checkpoints/${one.step}`;
  const doing = [
    busyButton(listing, "Download", () => download(at, "model.safetensors")),
    ...Object.entries(FORMATS).map(([format, words]) => busyButton(listing, `Export ${words}`, () => exportCheckpoint(listing, at, format))),
    busyButton(listing, "Fork from here", () => navigate(`/submit?fork=${encodeURIComponent(one.job_id)}&step=${one.step}`)),
  ];
  return h("tr", {}, cell(count(one.step), "num"), cell(one.kind), cell(loss(one.loss), "num"), cell(bytes(one.bytes), "num"),
    cell(ago(one.created_at), "", dateTime(one.created_at)), h("td", {}, h("code", { title: one.sha256 }, one.sha256.slice(0, 12))),
    h("td", { class: "row-actions" }, one.kind === "full" ? doing : doing.slice(0, 1)));
}

/** Creates a button that is disabled while its action runs. */
function busyButton(listing, name, work) {
  const press = async () => {
    if (button.hasAttribute("aria-disabled")) return;
    setAttr(button, "aria-disabled", "true");
    setText(button, `${name} …`);
    await runAction(listing, work);
    setAttr(button, "aria-disabled", null);
    setText(button, name);
  };
  const button = h("button", { type: "button", onclick: press }, name);
  return button;
}

async function exportCheckpoint(listing, at, format) {
  const { path } = await sendJson("POST", `${at}/export`, { format });
  announce(`Exported to ${path}`);
  await listing.updateExports();
}

function exportRow(one, listing) {
  const files = one.files.map((file) =>
    busyButton(listing, file.name, () => download(`${listing.address}/exports/${one.step}/${one.format}`, file.name)));
  const path = h("td", { class: "whole" }, h("code", {}, one.path), " ", h("button", { type: "button", class: "quiet", "aria-label": `Copy the path of ${one.id}`, onclick: () => copyText(one.path, "Path") }, "copy"));
  return h("tr", {}, cell(count(one.step), "num"), cell(FORMATS[one.format] ?? one.format), cell(bytes(one.bytes), "num"), path, h("td", { class: "row-actions" }, files));
}

/** Without a token the browser streams to disk. A token must be sent in a header, so the file is loaded into memory first. */
async function download(place, name) {
  const path = `${place}/files/${encodeURIComponent(name)}`;
  if (!token.get()) return h("a", { href: path, download: name }).click();
  const blob = await (await request(path, { headers: { Accept: "*/*" } })).blob();
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
