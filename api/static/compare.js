// Trials side by side: their curves in one chart, and the page again when one of them moves on.
import { onTheme } from "./charts.js";
import { bySeed, chooseAxis, curves, drawCurves, inks, keepAll } from "./curves.js";
import { follow, refresh, soon } from "./live.js";

const root = document.getElementById("compare");
const chart = document.getElementById("chart");
const study = encodeURIComponent(root.dataset.study);
const numbers = root.dataset.trials.split(",");
const measured = new Map(numbers.map((number) => [number, new Map()]));

const read = (number) => keepAll(measured.get(number), `/v1/studies/${study}/trials/${number}/measurements`);

function draw() {
  const colours = inks();
  const traces = numbers.flatMap((number, i) => bySeed(measured.get(number)).map(([seed, attempts], j) => curves(attempts.at(-1), {
    name: `trial ${number}`, more: `, seed ${seed}`, legend: j === 0, opacity: j ? 0.45 : 1, colour: colours[i],
  })));
  if (!traces.length) return;
  document.getElementById("chart-empty")?.remove();
  drawCurves(chart, traces, []);
  chart.dataset.curves = traces.length;
}

const open = () => numbers.filter((number) => root.querySelector(`[data-open="${number}"]`));
const update = soon(async () => {
  await refresh(location.href, ["live"]);
  await Promise.all(open().map(read));
  draw();
}, 500);

chooseAxis(draw);
onTheme(draw);
await Promise.all(numbers.map(read));
draw();
if (open().length) {
  follow(`/v1/studies/${study}/events?after=${root.dataset.seen}`, {
    message: (event) => { if (numbers.includes(String(event.trial))) update(); },
    activity: (news) => { if (news.some((one) => numbers.includes(String(one.trial)))) update(); },
  });
}
