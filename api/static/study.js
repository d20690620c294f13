// A study's page: the chart of BPB against bytes, and everything else kept live.
import { colour, config, layout, onTheme } from "./charts.js";
import { follow, refresh, soon } from "./live.js";

const root = document.getElementById("study");
const chart = document.getElementById("chart");
const name = encodeURIComponent(root.dataset.study);
const cap = Number(root.dataset.cap);
let rows = JSON.parse(document.getElementById("rows").textContent);

async function load() {
  const answer = await fetch(`/v1/studies/${name}/leaderboard?limit=500`);
  if (answer.ok) rows = (await answer.json()).rows;
  draw();
}

/** The mean of a trial's seeds, or what a trial without a rank scored. */
const bpb = (row) => row.mean_bpb ?? row.val_bpb;

/** Of the trials that fit, those that no smaller one beats, by bytes. */
function front() {
  const best = [];
  for (const row of rows.filter((row) => row.rank !== null).sort((a, b) => a.artifact_bytes - b.artifact_bytes || bpb(a) - bpb(b))) {
    if (!best.length || bpb(row) < bpb(best.at(-1))) best.push(row);
  }
  return best;
}

function points(chosen, marker, label) {
  return {
    type: "scatter", mode: "markers", name: label,
    x: chosen.map((row) => row.artifact_bytes), y: chosen.map(bpb),
    customdata: chosen.map((row) => [row.number, row.tying_map.join(" "), row.lora_rank, row.val_bpb_prequant]),
    hovertemplate: "<b>trial %{customdata[0]}</b><br>%{y:.4f} BPB (%{customdata[3]:.4f} before)<br>%{x:,} bytes<br>tying %{customdata[1]}<br>LoRA %{customdata[2]}<extra></extra>",
    marker: { size: 10, line: { width: 1.5, color: colour("card") }, ...marker },
  };
}

function draw() {
  if (!rows.length) return;
  document.getElementById("chart-empty")?.remove();
  const fits = rows.filter((row) => row.rank !== null);
  const over = rows.filter((row) => row.rank === null);
  const sizes = rows.map((row) => row.artifact_bytes);
  const wide = cap / Math.min(...sizes) > 5;
  const edge = front();
  const x = wide
    ? { type: "log", range: [Math.log10(Math.min(...sizes) * 0.85), Math.log10(Math.max(cap, ...sizes) * 1.12)], ...decades(Math.min(...sizes), Math.max(cap, ...sizes)) }
    : { range: spread([...sizes, cap], 0.06), tickformat: "~s" };
  const traces = [
    { type: "scatter", mode: "lines", x: edge.map((row) => row.artifact_bytes), y: edge.map(bpb), line: { shape: "hv", color: colour("accent"), width: 1.5 }, opacity: 0.55, hoverinfo: "skip" },
    points(over, { color: colour("warn"), symbol: "x" }, "over the cap"),
    points(fits.slice(1), { color: colour("soft"), opacity: 0.9 }, "fits"),
    points(fits.slice(0, 1), { color: colour("accent"), size: 14 }, "best"),
  ];
  Plotly.react(chart, traces, layout({
    xaxis: { title: { text: "artifact bytes (model and code)" }, ...x },
    yaxis: { title: { text: "BPB" }, tickformat: ".3f" },
    shapes: [{ type: "line", x0: cap, x1: cap, y0: 0, y1: 1, yref: "paper", line: { color: colour("warn"), width: 1.5, dash: "dash" } }],
    annotations: [{ x: wide ? Math.log10(cap) : cap, y: 1, yref: "paper", text: `cap ${cap.toLocaleString("en")}`, showarrow: false, xanchor: "right", yanchor: "top", xshift: -5, font: { color: colour("warn") } }],
  }), config);
  chart.removeAllListeners?.("plotly_click");
  chart.on("plotly_click", (click) => {
    const number = click.points[0]?.customdata?.[0];
    if (number !== undefined) location.assign(`/studies/${name}/trials/${number}`);
  });
}

/** Ticks at 1, 2 and 5 of each power of ten, each with its own whole label. */
function decades(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) ticks.push(...[1, 2, 5].map((digit) => digit * 10 ** power));
  const label = (bytes) => (bytes >= 1e6 ? `${bytes / 1e6}M` : bytes >= 1e3 ? `${bytes / 1e3}k` : `${bytes}`);
  return { tickvals: ticks, ticktext: ticks.map(label) };
}

function spread(values, share) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low || high) * share;
  return [low - room, high + room];
}

/** What the gangs do now, put into the rows that are there. */
function showActivity(gangs) {
  for (const gang of gangs) {
    const row = root.querySelector(`[data-trial="${gang.trial}"]`);
    if (!row) { update(); continue; }
    row.querySelector("[data-phase]").textContent = gang.phase;
    if (gang.metrics.fraction !== undefined) row.querySelector("progress").value = gang.metrics.fraction;
    const loss = gang.metrics.val_bpb !== undefined ? ` · ${gang.metrics.val_bpb.toFixed(3)} BPB` : gang.metrics.train_loss !== undefined ? ` · loss ${gang.metrics.train_loss.toFixed(3)}` : "";
    row.querySelector("[data-score]").textContent = gang.step === null ? "" : `step ${gang.step}${loss}`;
  }
}

const update = soon(async () => {
  await Promise.all([refresh(`/studies/${name}/live`, ["live-head", "live"]), load()]);
});

draw();
onTheme(draw);
follow(`/v1/studies/${name}/events?after=${root.dataset.seen}`, { message: update, activity: showActivity });
