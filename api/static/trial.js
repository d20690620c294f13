// A trial's page: the curves of its seeds beside the best other trial's as they grow, and the rest when its state changes.
import { colour, onTheme } from "./charts.js";
import { bySeed, chooseAxis, curves, dash, drawCurves, inks, keep, keepAll } from "./curves.js";
import { follow, refresh, say, soon } from "./live.js";

const { study, trial, rival, rivalIs } = document.getElementById("trial").dataset;
const chart = document.getElementById("chart");
const trials = `/v1/studies/${encodeURIComponent(study)}/trials`;
const MOST_LINES = 2000;
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
    traces.push(curves(points, { name: `seed ${seed}`, more, legend: last, opacity: last ? 1 : 0.35, colour: colours[i % colours.length], dash: dash(i) }));
  }));
  drawCurves(chart, traces, scores());
  chart.dataset.points = [...own.values()].reduce((total, points) => total + points.length, 0);
  chart.dataset.others = other.size;
}

/** The final scores, on all of the text: lines that the curves are not held against without saying so. */
function scores() {
  const { bpb, before } = document.querySelector("#live-head [data-bpb]")?.dataset ?? {};
  const line = (score, words, ink, stroke) => ({ y: Number(score), ink: colour(ink), dash: stroke, text: `${Number(score).toFixed(4)} ${words}` });
  return bpb ? [line(bpb, "from the artifact", "accent", "solid"), line(before, "before quantisation", "soft", "dash")] : [];
}

async function readRival() {
  await keepAll(other, `${trials}/${rival}/measurements`);
  drawSoon();
}

const update = soon(async () => {
  await refresh(`/studies/${encodeURIComponent(study)}/trials/${trial}/live`, ["live-head", "live"]);
  draw();
});

/** Lines that come are added below; who reads at the end stays there. */
const log = document.getElementById("log");
let attempt = [...log.querySelectorAll("[data-attempt]")].at(-1)?.dataset.attempt;

function write(lines) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
  document.getElementById("log-card").hidden = false;
  for (const said of lines) {
    if (String(said.attempt_id) !== attempt) {
      attempt = String(said.attempt_id);
      const head = Object.assign(document.createElement("b"), { textContent: nameOf(attempt) });
      log.append(head);
    }
    const line = document.createElement("span");
    const at = Object.assign(document.createElement("i"), { textContent: said.elapsed_seconds.toFixed(1).padStart(7) });
    line.append(at, ` ${said.line}\n`);
    log.append(line);
  }
  while (log.childElementCount > MOST_LINES) log.firstElementChild.remove();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function nameOf(attempt) {
  const lane = document.querySelector(`.timeline [data-key="${attempt}"]`);
  return lane?.dataset.name ?? "the next attempt";
}

function followLog() {
  const lines = follow(`${trials}/${trial}/logs/stream?after=${log.dataset.after}`, {
    message: write,
    end: () => lines.close(),
  });
}

chooseAxis(draw);
onTheme(draw);
log.scrollTop = log.scrollHeight;
if (rival) readRival();
if (document.querySelector("[data-live]")) followLog();
const source = follow(`${trials}/${trial}/measurements/stream`, {
  message: (measurements) => { keep(own, measurements); drawSoon(); },
  state: update,
  end: () => {
    source.close();
    say("done", "ended");
    update();
  },
});
