// uPlot with the page's colours, its size from its place, and what it shows in words for those who cannot see it.
import uPlot from "../../vendor/uPlot.mjs";
import { html, useEffect, useRef } from "./ui.js";
import { number } from "./format.js";

const HEIGHT = 180;

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (index) => variable(`--series-${(index % 6) + 1}`);

const DAY_S = 86400;
/** Steps begin with one point: an axis needs more. */
const LEAST_S = 60;
const two = (value) => String(value).padStart(2, "0");

/** The time below a line of the grid: as much of it as tells lines apart. */
function clock(unix_s, between_s) {
  const at = new Date(unix_s * 1000);
  if (between_s >= DAY_S) return at.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  const hour = `${two(at.getHours())}:${two(at.getMinutes())}`;
  return between_s < 60 ? `${hour}:${two(at.getSeconds())}` : hour;
}

/** `now()` gives the newest series: the legend shows their last values while nothing is pointed at. */
function options(element, { series, kind, format, max }, now) {
  const line = variable("--line");
  const text = variable("--text-2");
  const font = `11px ${variable("--font")}`;
  const axis = { stroke: text, font, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 } };
  return {
    width: Math.max(element.clientWidth, 120),
    height: HEIGHT,
    legend: { live: true },
    cursor: { points: { size: 6 } },
    scales: { x: { time: true, ...(kind === "steps" && { range: (_, low, high) => [Math.min(low, high - LEAST_S), high] }) }, y: { range: (_, low, high) => [Math.min(0, low ?? 0), max ?? (high > 0 ? high * 1.08 : 1)] } },
    axes: [{ ...axis, size: 28, values: (_, ticks, __, ___, between_s) => ticks.map((tick) => clock(tick, between_s)) },
      { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => format(tick)) }],
    series: [
      { label: "At", value: (_, at) => (at === null || at === undefined ? "now" : clock(at, 1)) },
      ...series.map((each, index) => ({
        label: each.label,
        stroke: each.colour ? variable(each.colour) : colour(index),
        dash: each.dash,
        width: kind === "stack" || kind === "bars" ? 1 : 1.75,
        fill: kind === "line" || kind === "steps" ? undefined : `${each.colour ? variable(each.colour) : colour(index)}${kind === "area" ? "22" : "99"}`,
        paths: kind === "bars" ? uPlot.paths.bars({ size: [0.7, 40] }) : kind === "steps" ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: false, size: 4, filter: (chart, at) => lone(chart.data[at]) },
        value: (_, value, __, at) => {
          const { values } = now()[index] ?? each;
          const shown = at === null || at === undefined ? values.at(-1) : values[at];
          return shown === null || shown === undefined ? "–" : format(shown);
        },
      })),
    ],
  };
}

/** Where a value has no neighbour: a line needs two, so these are drawn as points. */
function lone(values) {
  const known = (at) => values[at] !== null && values[at] !== undefined;
  return [...values.keys()].filter((at) => known(at) && !known(at - 1) && !known(at + 1));
}

/** Of stacked series each is drawn on top of those after it, so that all of them are seen. */
function stacked(series) {
  const sums = [];
  return [...series].reverse().map((each) => each.values.map((value, at) => (sums[at] = (sums[at] ?? 0) + (value ?? 0)))).reverse();
}

function inWords(title, series, format) {
  const parts = series.map((each) => {
    const known = each.values.filter((value) => value !== null && value !== undefined);
    return known.length ? `${each.label}: now ${format(known.at(-1))}, highest ${format(Math.max(...known))}` : `${each.label}: no data`;
  });
  return `${title}. ${parts.join("; ")}.`;
}

/**
 * A chart over time. `steps`: a value holds until the next one.
 * @param {{title: string, times: number[], series: {label: string, values: (number|null)[], colour?: string, dash?: number[]}[],
 *   kind?: "line"|"steps"|"area"|"stack"|"bars", format?: (value: number) => string, max?: number, empty?: string}} props
 */
export function Chart({ title, times, series, kind = "line", format = number, max, empty = "No data for this time yet." }) {
  const place = useRef(null);
  const chart = useRef(null);
  const newest = useRef(series);
  newest.current = series;
  const shape = JSON.stringify([kind, max, series.map((each) => [each.label, each.colour])]);
  const some = times.length > 0 && series.some((each) => each.values.some((value) => value !== null && value !== undefined));

  useEffect(() => {
    if (!some || !place.current) return undefined;
    const data = [times, ...(kind === "stack" ? stacked(series) : series.map((each) => each.values))];
    const draw = () => {
      chart.current?.destroy();
      chart.current = new uPlot(options(place.current, { title, series, kind, format, max }, () => newest.current), data, place.current);
    };
    draw();
    const sized = new ResizeObserver(() => {
      const width = place.current?.clientWidth;
      if (width && chart.current && Math.abs(width - chart.current.width) > 2) chart.current.setSize({ width, height: HEIGHT });
    });
    sized.observe(place.current);
    const themed = new MutationObserver(draw);
    themed.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", draw);
    return () => {
      sized.disconnect();
      themed.disconnect();
      dark.removeEventListener("change", draw);
      chart.current?.destroy();
      chart.current = null;
    };
  }, [shape, some]);

  useEffect(() => {
    chart.current?.setData([times, ...(kind === "stack" ? stacked(series) : series.map((each) => each.values))]);
  }, [times, series]);

  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    ${some
      ? html`<div ref=${place} role="img" aria-label=${inWords(title, series, format)}></div>`
      : html`<p class="chart-empty">${empty}</p>`}
  </figure>`;
}

/** A line the height of text. */
export function Sparkline({ values, label }) {
  const known = values.map((value) => value ?? 0);
  const highest = Math.max(...known, 1e-9);
  const points = known.map((value, at) => `${(at / Math.max(known.length - 1, 1)) * 100},${20 - (value / highest) * 18}`);
  return html`<svg class="sparkline" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label=${label}>
    <polyline points=${points.join(" ")} /></svg>`;
}
