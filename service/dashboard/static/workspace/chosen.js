// The jobs whose curves are drawn: `jobs=a,,b` in the address. The place of a job is its slot, so its color stays when another one is removed.
import { getParam, setParam } from "../router.js";

/** Returns the ids by slot; an empty text is a free slot. */
export function chosenSlots() {
  const slots = (getParam("jobs") ?? "").split(",").map((id) => id.trim());
  while (slots.length && slots.at(-1) === "") slots.pop();
  return slots.map((id, i) => (slots.indexOf(id) === i ? id : ""));
}

/** Adds jobs in the free slots, or removes them. */
export function setChosen(ids, wanted) {
  const slots = chosenSlots();
  for (const id of ids) {
    const at = slots.indexOf(id);
    if (at >= 0 && !wanted) slots[at] = "";
    if (at >= 0 || !wanted) continue;
    const free = slots.indexOf("");
    slots[free < 0 ? slots.length : free] = id;
  }
  while (slots.length && slots.at(-1) === "") slots.pop();
  setParam("jobs", slots.join(","));
}
