// What stands above the curves: along which axis, and how smooth. Both stay in the address.
import { h } from "./dom.js";
import { keep, kept } from "./router.js";
import { AXES, HALF_LIVES } from "./chart-data.js";

const SMOOTH = 50;

/** The chosen axis and half-life in steps; what the address does not know is as by default. */
export function chosenView(usual) {
  const half = Number(kept("smooth") ?? SMOOTH);
  return { axis: kept("x") in AXES ? kept("x") : usual, half: HALF_LIVES.includes(half) ? half : SMOOTH };
}

/** Two selects; `onAxis` and `onHalf` are told what was chosen. `usual` is the axis that the address leaves out. */
export function controls({ axis, half }, usual, onAxis, onHalf, ...more) {
  const along = h("select", { id: "axis" }, Object.entries(AXES).map(([key, name]) => h("option", { value: key }, name)));
  const smooth = h("select", { id: "smooth" }, HALF_LIVES.map((steps) => h("option", { value: steps }, steps ? `half-life ${steps} steps` : "none")));
  along.value = axis;
  smooth.value = half;
  along.addEventListener("change", () => {
    keep("x", along.value === usual ? null : along.value);
    onAxis(along.value);
  });
  smooth.addEventListener("change", () => {
    keep("smooth", Number(smooth.value) === SMOOTH ? null : smooth.value);
    onHalf(Number(smooth.value));
  });
  const pair = (id, words, choice) => h("span", { class: "choice" }, h("label", { for: id }, words), choice);
  return h("div", { class: "bar" }, pair("axis", "Along", along), pair("smooth", "Smoothing", smooth), ...more);
}
