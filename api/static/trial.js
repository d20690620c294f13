// A trial's page: the curves of its seeds beside the best other trial's as they grow, and the rest when its state changes.
import { colour, onTheme } from "./charts.js";
import { bySeed, chooseAxis, curves, drawCurves, inks, keep } from "./curves.js";
import { follow, refresh, say, soon } from "./live.js";

const { study, trial, rival, rivalIs } = document.getElementById("trial").dataset;
const chart = document.getElementById("chart");
const trials = `/v1/studies/${encodeURIComponent(study)}/trials`;
const own = new Map(); // attempt id -> its measurements
const other = new Map();
let drawing = false;

function drawSoon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; draw(); });
}

function draw() {
  if (!own.size) return;
  document.getElementById("chart-empty")?.remove();
  const colours = inks();
  const traces = bySeed(other).map(([, attempts], i) => curves(attempts.at(-1), {
    name: `trial ${rival}, ${rivalIs}`, legend: i === 0, opacity: 0.75, colour: colour("soft"), dash: "dot",
  }));
  bySeed(own).forEach(([seed, attempts], i) => attempts.forEach((points, j) => {
    const last = j === attempts.length - 1;
    const more = attempts.length > 1 ? `, attempt ${j + 1}` : "";
    traces.push(curves(points, { name: `seed ${seed}`, more, legend: last, opacity: last ? 1 : 0.35, colour: colours[i % colours.length] }));
  }));
  const score = Number(document.querySelector("#live-head [data-bpb]")?.dataset.bpb);
  drawCurves(chart, traces, score ? [{ y: score, ink: colour("accent"), text: `${score.toFixed(4)} from the artifact` }] : []);
  chart.dataset.points = [...own.values()].reduce((total, points) => total + points.length, 0);
  chart.dataset.others = other.size;
}

async function readRival() {
  const answer = await fetch(`${trials}/${rival}/measurements`);
  if (answer.ok) keep(other, (await answer.json()).items);
  drawSoon();
}

const update = soon(async () => {
  await refresh(`/studies/${encodeURIComponent(study)}/trials/${trial}/live`, ["live-head", "live"]);
  draw();
});

chooseAxis(draw);
onTheme(draw);
if (rival) readRival();
const source = follow(`${trials}/${trial}/measurements/stream`, {
  message: (measurements) => { keep(own, measurements); drawSoon(); },
  state: update,
  end: () => {
    source.close();
    say("done", "ended");
    update();
  },
});
