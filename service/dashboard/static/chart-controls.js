// The selects above the charts: x axis and smoothing. Both are kept in the URL.
import { AXES, HALF_LIVES } from "./chart-data.js";
import { h } from "./dom.js";
import { getParam, setParam } from "./router.js";

const DEFAULT_HALF_LIFE = 50;

/** Returns the axis and half-life of the URL, or the defaults. */
export function chartSettings(defaultAxis) {
  const half = Number(getParam("smooth") ?? DEFAULT_HALF_LIFE);
  return { axis: getParam("x") in AXES ? getParam("x") : defaultAxis, half: HALF_LIVES.includes(half) ? half : DEFAULT_HALF_LIFE };
}

/** Creates both selects; `onAxis` and `onHalf` are called with a new choice. `defaultAxis` is the default axis, which the URL leaves out. */
export function chartControls({ axis, half }, defaultAxis, onAxis, onHalf, ...more) {
  const along = h("select", { id: "axis" }, Object.entries(AXES).map(([key, name]) => h("option", { value: key }, name)));
  const smooth = h("select", { id: "smooth" }, HALF_LIVES.map((steps) => h("option", { value: steps }, steps ? `half-life ${steps} steps` : "none")));
  along.value = axis;
  smooth.value = half;
  along.addEventListener("change", () => {
    setParam("x", along.value === defaultAxis ? null : along.value);
    onAxis(along.value);
  });
  smooth.addEventListener("change", () => {
    setParam("smooth", Number(smooth.value) === DEFAULT_HALF_LIFE ? null : smooth.value);
    onHalf(Number(smooth.value));
  });
  const pair = (id, words, choice) => h("span", { class: "choice" }, h("label", { for: id }, words), choice);
  return h("div", { class: "bar" }, pair("axis", "X axis", along), pair("smooth", "Smoothing", smooth), ...more);
}
