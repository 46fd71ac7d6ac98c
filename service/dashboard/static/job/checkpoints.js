// The checkpoints of a job, and what may be made of one.
import { fetched, send } from "../api.js";
import { h, say } from "../dom.js";
import { ago, bytes, exact, loss } from "../format.js";
import { go } from "../router.js";
import { Listing, cell, moved, tried } from "./listing.js";

export class Checkpoints extends Listing {
  constructor(place, address) {
    super(place, address, {
      path: "/checkpoints", caption: "Checkpoints, newest first", none: "No checkpoint yet.", mark: moved,
      columns: [["Step", "num"], ["Kind"], ["Loss", "num"], ["Size", "num"], ["Saved"], ["sha256"], ["Do"]], row: checkpointRow,
    });
  }
}

function checkpointRow(one, listing) {
  const at = `${listing.address}/checkpoints/${one.step}`;
  const act = (name, work) => h("button", { type: "button", onclick: () => tried(listing, work) }, name);
  const name = `step-${one.step}.safetensors`;
  const doing = [
    act("Download", () => download(`${at}/files/model.safetensors`, name)),
    act("Export HF", async () => say(`Exported to ${(await send("POST", `${at}/export`, { format: "hf" })).path}`)),
    act("Fork from here", () => go(`/submit?fork=${encodeURIComponent(one.job_id)}&step=${one.step}`)),
  ];
  return h("tr", {}, cell(one.step.toLocaleString("en-US"), "num"), cell(one.kind), cell(loss(one.loss), "num"), cell(bytes(one.bytes), "num"),
    cell(ago(one.created_at), "", exact(one.created_at)), h("td", {}, h("code", { title: one.sha256 }, one.sha256.slice(0, 12))),
    h("td", { class: "doing" }, one.kind === "full" ? doing : "–"));
}

/** With the token in a header, so by way of memory. */
async function download(path, name) {
  const blob = await (await fetched(path, { headers: { Accept: "*/*" } })).blob();
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
