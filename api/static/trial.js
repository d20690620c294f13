// A trial's page: its curve as it grows, and the rest when its state changes.
import { colour, config, layout, onTheme } from "./charts.js";
import { follow, refresh, say, soon } from "./live.js";

const root = document.getElementById("trial");
const chart = document.getElementById("chart");
const study = encodeURIComponent(root.dataset.study);
const here = `trials/${root.dataset.trial}`;
const attempts = new Map();
let drawing = false;

function take(measurements) {
  for (const said of measurements) {
    const points = attempts.get(said.attempt_id) ?? attempts.set(said.attempt_id, []).get(said.attempt_id);
    if (!points.length || points.at(-1).number < said.number) points.push(said);
  }
  if (!drawing) {
    drawing = true;
    requestAnimationFrame(() => { drawing = false; draw(); });
  }
}

function curve(points, metric, axis, shown, mode) {
  const has = points.filter((point) => metric in point.metrics);
  return {
    type: "scatter", mode, yaxis: axis, name: metric, opacity: shown.opacity,
    x: has.map((point) => point.step), y: has.map((point) => point.metrics[metric]),
    text: has.map((point) => `${point.elapsed_seconds.toFixed(1)} s`),
    hovertemplate: `attempt ${shown.attempt}, step %{x}<br>%{y:.4f} ${metric === "val_bpb" ? "BPB" : "nats"}<br>%{text}<extra></extra>`,
    line: { color: shown.colour, width: 2 }, marker: { size: 7, color: shown.colour },
  };
}

function draw() {
  const drawn = [...attempts.values()].filter((points) => points.length);
  if (!drawn.length) return;
  document.getElementById("chart-empty")?.remove();
  const traces = drawn.flatMap((points, i) => {
    const latest = i === drawn.length - 1;
    const shown = { attempt: i + 1, opacity: latest ? 1 : 0.4 };
    return [
      curve(points, "val_bpb", "y2", { ...shown, colour: colour("accent") }, "lines+markers"),
      curve(points, "train_loss", "y", { ...shown, colour: colour("second") }, "lines"),
    ];
  });
  const score = document.querySelector("#live-head [data-bpb]")?.dataset.bpb;
  Plotly.react(chart, traces, layout({
    grid: { rows: 2, columns: 1 },
    shapes: score ? [{ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y2", y0: Number(score), y1: Number(score), line: { color: colour("accent"), width: 1.2, dash: "dot" } }] : [],
    annotations: score ? [{ xref: "paper", x: 0, yref: "y2", y: Number(score), text: `${Number(score).toFixed(4)} from the artifact`, showarrow: false, xanchor: "left", yanchor: "bottom", xshift: 4, font: { color: colour("accent") } }] : [],
    xaxis: { title: { text: "step" }, anchor: "y", rangemode: "tozero" },
    yaxis: { title: { text: "train loss (nats)" }, domain: [0, 0.46] },
    yaxis2: { title: { text: "BPB" }, domain: [0.54, 1], anchor: "x" },
  }), config);
  chart.dataset.points = drawn.reduce((total, points) => total + points.length, 0);
}

const update = soon(async () => {
  await refresh(`/studies/${study}/${here}/live`, ["live-head", "live"]);
  draw();
});

onTheme(draw);
const source = follow(`/v1/studies/${study}/${here}/measurements/stream`, {
  message: take,
  state: update,
  end: () => {
    source.close();
    say("done", "ended");
    update();
  },
});
