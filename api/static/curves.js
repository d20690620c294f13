// What the charts of trials' curves share: BPB above, training loss below, over steps or seconds, one line an attempt.
import { colour, config, layout } from "./charts.js";
import { share, shared } from "./live.js";

const AXES = { step: "step", seconds: "seconds of training" };
let across = shared("x", "step") in AXES ? shared("x", "step") : "step";

/** Add measurements to `attempts`, by the attempt's id; one that came before is no news. */
export function keep(attempts, measurements) {
  for (const said of measurements) {
    const points = attempts.get(said.attempt_id) ?? attempts.set(said.attempt_id, []).get(said.attempt_id);
    if (!points.length || points.at(-1).number < said.number) points.push(said);
  }
}

/** Keep all that a trial's attempts measured, page by page. */
export async function keepAll(attempts, path) {
  let next = null;
  do {
    const answer = await fetch(next === null ? path : `${path}?cursor=${next}`);
    if (!answer.ok) return;
    const page = await answer.json();
    keep(attempts, page.items);
    next = page.next;
  } while (next !== null);
}

/** Of attempts by id: [seed, its attempts, the last of them last]. */
export function bySeed(attempts) {
  const seeds = new Map();
  for (const points of attempts.values()) {
    if (points.length) seeds.set(points[0].seed, [...(seeds.get(points[0].seed) ?? []), points]);
  }
  return [...seeds];
}

/** Both curves of one attempt. `shown`: name, more (said on hovering), colour, and where they differ opacity, dash, legend. */
export function curves(points, shown) {
  const name = shown.name;
  const named = points.some((point) => "val_bpb" in point.metrics) ? "val_bpb" : "train_loss"; // the legend's line
  return [["val_bpb", "y2", "lines+markers"], ["train_loss", "y", "lines"]].map(([metric, axis, mode]) => {
    const has = points.filter((point) => metric in point.metrics);
    return {
      type: "scatter", mode, yaxis: axis, name, legendgroup: name, opacity: shown.opacity ?? 1,
      showlegend: (shown.legend ?? true) && metric === named,
      x: has.map((point) => (across === "step" ? point.step : point.elapsed_seconds)), y: has.map((point) => point.metrics[metric]),
      text: has.map((point) => (across === "step" ? `${point.elapsed_seconds.toFixed(1)} s` : `step ${point.step}`)),
      hovertemplate: `${name}${shown.more ?? ""}<br>%{y:.4f} ${metric === "val_bpb" ? "BPB" : "nats"}<br>${across} %{x}, %{text}<extra></extra>`,
      line: { color: shown.colour, width: shown.dash ? 1.5 : 2, dash: shown.dash }, marker: { size: 6, color: shown.colour },
    };
  });
}

/** Draw them in one chart of two panels. `scores`: lines across the upper one, the highest named above it, others below. */
export function drawCurves(chart, traces, scores) {
  const top = Math.max(...scores.map(({ y }) => y));
  const line = { xref: "paper", x0: 0, x1: 1, yref: "y2", type: "line" };
  const label = { xref: "paper", x: 0, yref: "y2", showarrow: false, xanchor: "left", xshift: 4 };
  Plotly.react(chart, traces.flat(), layout({
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    margin: { l: 56, r: 16, t: 34, b: 44 },
    shapes: scores.map(({ y, ink, dash }) => ({ ...line, y0: y, y1: y, line: { color: ink, width: 1.2, dash } })),
    annotations: scores.map(({ y, ink, text }) => ({ ...label, y, text, yanchor: y === top ? "bottom" : "top", font: { color: ink } })),
    xaxis: { title: { text: AXES[across] }, anchor: "y", rangemode: "tozero" },
    yaxis: { title: { text: "train loss (nats)" }, domain: [0, 0.46] },
    yaxis2: { title: { text: "BPB" }, domain: [0.54, 1], anchor: "x" },
  }), config);
}

/** The dash of the line of this place, where its colour has been used by others before it. */
export function dash(place) {
  return [undefined, "dash", "dashdot", "longdash"][Math.floor(place / inks().length) % 4];
}

/** Colours of lines in one chart, first to last. */
export function inks() {
  return ["accent", "second", "pruned", "failed", "cancelled"].map(colour);
}

/** The buttons of #across choose the axis, which is a part of the address; each choice draws again. */
export function chooseAxis(draw) {
  const buttons = [...document.querySelectorAll("#across button")];
  const mark = () => buttons.forEach((button) => button.setAttribute("aria-pressed", button.value === across));
  for (const button of buttons) {
    button.addEventListener("click", () => {
      across = button.value;
      share("x", across, "step");
      mark();
      draw();
    });
  }
  mark();
}
