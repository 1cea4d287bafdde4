"use strict";
// Draws the figures of the page, each when it comes into view, in the colors of the page's theme.
const page = JSON.parse(document.getElementById("figures").textContent);
// What several figures share is stored once. Each gets objects of its own, as Plotly writes into them; lists of numbers are shared.
const whole = (value) => {
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value)) return value.some((each) => typeof each === "object") ? value.map(whole) : value;
  if ("shared" in value) return whole(page.shared[value.shared]);
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, whole(each)]));
};
const figures = page.figures.map(() => null);
const figure = (plot) => figures[plot.dataset.figure] ??= whole(page.figures[plot.dataset.figure]);
const plots = [...document.querySelectorAll(".plot")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const touched = matchMedia("(pointer: coarse)").matches;
const filter = document.getElementById("filter");
const config = {
  responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

const holds = (name) => name.toLowerCase().includes(filter ? filter.value.trim().toLowerCase() : "");

function theme() {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const axis = { gridcolor: color("grid"), linecolor: color("rule"), zerolinecolor: color("rule"), automargin: true };
  const legend = { font: { color: color("ink"), size: 10 } };
  return { layout: {
    font: { color: color("soft"), family: "system-ui, sans-serif", size: 11 },
    paper_bgcolor: "rgba(0, 0, 0, 0)", plot_bgcolor: "rgba(0, 0, 0, 0)", modebar: { bgcolor: "rgba(0, 0, 0, 0)", color: color("soft"), activecolor: color("ink") },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("rule"), font: { color: color("ink") }, namelength: -1 },
    margin: { l: 44, r: 10, t: 26, b: 38 }, dragmode: touched ? false : "zoom", legend, xaxis: axis, yaxis: axis,
  } };
}

// A heat map in the chosen order, without the rows that the filter leaves out.
function shown(plot) {
  const { data, layout, rows, orders } = figure(plot);
  if (!rows.length) return { data, layout };
  const labels = data[0].y, kept = labels.filter((_, row) => holds(rows[row]));
  const chosen = plot.closest("figure").querySelector("[data-order]");
  const place = new Map((chosen ? orders[chosen.value] : labels).map((label, at) => [label, at]));
  const order = labels.map((_, row) => row).filter((row) => holds(rows[row]))
    .sort((one, other) => place.get(labels[one]) - place.get(labels[other]));
  const heat = { ...data[0], y: order.map((row) => labels[row]), z: order.map((row) => data[0].z[row]) };
  const lines = data.slice(1).map((line) => {
    const points = line.y.map((_, at) => at).filter((at) => kept.includes(line.y[at - at % 3]));
    return { ...line, x: points.map((at) => line.x[at]), y: points.map((at) => line.y[at]) };
  });
  const yaxis = { ...layout.yaxis, categoryorder: "array", categoryarray: heat.y, range: [heat.y.length - 0.5, -0.5] };
  const height = Math.min(layout.height, 120 + 26 * order.length);
  plot.style.height = `${height}px`;
  return { data: [heat, ...lines], layout: { ...layout, yaxis, height } };
}

function draw(plot) {
  const { data, layout } = shown(plot);
  const logarithmic = plot.closest("figure").querySelector("[data-logarithmic]");
  const axes = Object.keys(layout).filter((name) => name.startsWith("yaxis") && !layout[name].overlaying);
  const typed = !logarithmic ? {} : Object.fromEntries(
    axes.map((name) => [name, { ...layout[name], type: logarithmic.checked ? "log" : "linear" }]));
  const isNew = !plot.dataset.drawn;
  plot.dataset.drawn = "yes";
  if (isNew) plot.replaceChildren();
  // Where nothing hovers the buttons above the axes are always there: the legend makes room for them.
  const below = touched && layout.legend ? { legend: { ...layout.legend, yref: "container", y: 0, yanchor: "bottom" } } : {};
  Plotly.react(plot, data, { ...layout, ...typed, ...below, template: theme() }, config);
  if (isNew) plot.on("plotly_click", ({ points }) => {
    const event = points.map((point) => point.customdata).find((target) => typeof target === "string");
    if (event) location.hash = event;
  });
}

const redraw = () => plots.filter((plot) => plot.dataset.drawn).forEach(draw);
const inView = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !target.dataset.drawn) draw(target);
  }
}, { rootMargin: "400px" });
plots.forEach((plot) => inView.observe(plot));
dark.addEventListener("change", redraw);
addEventListener("beforeprint", () => plots.filter((plot) => plot.checkVisibility()).forEach(draw));
for (const control of document.querySelectorAll("[data-order], [data-logarithmic]")) {
  control.addEventListener("change", () => draw(control.closest("figure").querySelector(".plot")));
}
filter?.addEventListener("input", () => {
  for (const each of document.querySelectorAll("[data-layer]")) each.hidden = !holds(each.dataset.layer);
  if (filter.value) document.querySelectorAll("details:has(.card)").forEach((fold) => { fold.open = true; });
  plots.filter((plot) => plot.dataset.drawn && figure(plot).rows.length).forEach(draw);
});
