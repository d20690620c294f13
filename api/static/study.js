// A study's page: its charts, the trials to compare, and everything kept live.
import { colour, config, decades, layout, onTheme, spread } from "./charts.js";
import { follow, refresh, share, shared, soon } from "./live.js";

const root = document.getElementById("study");
const name = encodeURIComponent(root.dataset.study);
const cap = Number(root.dataset.cap);
const AXES = { trials: "complete trials", gpu_seconds: "GPU-seconds" };
let axis = shared("axis", "trials");
if (!(axis in AXES)) axis = "trials";

const drawn = () => JSON.parse(document.getElementById("drawn").textContent);

function open(click) {
  const number = click.points[0]?.customdata;
  if (number !== undefined) location.assign(`/studies/${name}/trials/${number}`);
}

function plot(id, traces, extra) {
  const chart = document.getElementById(id);
  chart.querySelector(".empty")?.remove();
  Plotly.react(chart, traces, layout(extra), config);
  chart.removeAllListeners?.("plotly_click");
  chart.on("plotly_click", open);
}

function points(columns, marker, label, keep = () => true) {
  const chosen = columns.number.map((_, i) => i).filter(keep);
  const of = (column) => chosen.map((i) => columns[column][i]);
  return {
    type: "scatter", mode: "markers", name: label, x: of("bytes"), y: of("bpb"), customdata: of("number"),
    text: of("seeds").map((seeds) => (seeds > 1 ? `mean of ${seeds} seeds` : "one seed")),
    hovertemplate: `<b>trial %{customdata}</b> ${label}<br>%{y:.4f} BPB, %{text}<br>%{x:,} bytes<extra></extra>`,
    marker: { size: chosen.length > 100 ? 6 : 10, line: { width: chosen.length > 100 ? 0.5 : 1.5, color: colour("card") }, ...marker },
  };
}

/** The range of scores: a few diverged trials must not press all others flat. How many lie above it is said. */
function scores(all) {
  const sorted = [...all].sort((a, b) => a - b);
  const [low, high, top] = [sorted[0], sorted[Math.floor((sorted.length - 1) * 0.95)], sorted.at(-1)];
  const limit = sorted.length > 10 && top - low > 2.5 * (high - low) && high > low ? low + 1.5 * (high - low) : top;
  return { range: spread([low, limit], 0.06), above: sorted.filter((bpb) => bpb > limit).length };
}

function drawBytes({ fits, over, front }) {
  const sizes = [...fits.bytes, ...over.bytes];
  if (!sizes.length) return;
  const best = fits.bpb.reduce((least, bpb, i) => (least === null || bpb < fits.bpb[least] ? i : least), null);
  const [edge, leader] = [new Set(front.number), fits.number[best]];
  const [least, most] = [Math.min(...sizes), Math.max(cap, ...sizes)];
  const wide = cap / least > 5;
  const x = wide ? { type: "log", range: [Math.log10(least * 0.85), Math.log10(most * 1.12)], ...decades(least, most) } : { range: spread([least, most], 0.06), tickformat: "~s" };
  const { range, above } = scores([...fits.bpb, ...over.bpb]);
  const words = (text, place) => ({ text, showarrow: false, yref: "paper", y: 1, yanchor: "top", font: { color: colour("warn") }, ...place });
  plot("chart", [
    { type: "scatter", mode: "lines", x: front.bytes, y: front.bpb, line: { shape: "hv", color: colour("accent"), width: 1.5 }, opacity: 0.6, hoverinfo: "skip" },
    points(over, { color: colour("warn"), symbol: "x" }, "misses a cap"),
    points(fits, { color: colour("soft"), opacity: 0.75 }, "", (i) => !edge.has(fits.number[i]) && i !== best),
    points(front, { color: colour("accent") }, "in the Pareto set", (i) => front.number[i] !== leader),
    points(fits, { color: colour("accent"), size: 14 }, "is the best", (i) => i === best),
  ], {
    xaxis: { title: { text: "artifact bytes (model and code)" }, ...x },
    yaxis: { title: { text: "BPB" }, tickformat: ".4~f", range },
    shapes: [{ type: "line", x0: cap, x1: cap, y0: 0, y1: 1, yref: "paper", line: { color: colour("warn"), width: 1.5, dash: "dash" } }],
    annotations: [
      words(`cap ${cap.toLocaleString("en")}`, { x: wide ? Math.log10(cap) : cap, xanchor: "right", xshift: -5 }),
      ...(above ? [words(`${above} above`, { xref: "paper", x: 0, xanchor: "left", xshift: 4 })] : []),
    ],
  });
}

function drawCourse({ course, ...whole }) {
  document.querySelectorAll("#axis button").forEach((button) => button.setAttribute("aria-pressed", button.value === axis));
  if (!course.number.length) return;
  const [first, last] = [course[axis][0], Math.max(whole[axis], course[axis].at(-1))];
  const log = first > 0 && last / first > 100;
  const ticks = axis === "trials" && last < 10 ? { dtick: 1 } : { tickformat: last < 1000 ? "" : "~s" }; // no half trials, and no "500m"
  plot("course", [
    { type: "scatter", mode: "lines", x: [...course[axis], last], y: [...course.bpb, course.bpb.at(-1)], line: { shape: "hv", color: colour("accent"), width: 2 }, hoverinfo: "skip" },
    {
      type: "scatter", mode: "markers", x: course[axis], y: course.bpb, customdata: course.number, marker: { size: 8, color: colour("accent"), line: { width: 1.5, color: colour("card") } },
      hovertemplate: `<b>trial %{customdata}</b><br>%{y:.4f} BPB by its first seed<br>after %{x:,} ${axis === "trials" ? "trials" : "GPU-seconds"}<extra></extra>`,
    },
  ], {
    xaxis: { title: { text: AXES[axis] }, ...(log ? { type: "log", ...decades(first, last) } : { rangemode: "tozero", ...ticks }) },
    yaxis: { title: { text: "BPB" }, tickformat: ".4~f", nticks: 6, range: spread(course.bpb, 0.06) },
    uirevision: axis,
  });
}

function draw() {
  const data = drawn();
  if (!data) return;
  drawBytes(data);
  drawCourse(data);
}

/** What the gangs do now, put into the rows that are there. One that has no row is asked for once: of many, some have none. */
const met = new Set();
function showActivity(gangs) {
  for (const gang of gangs) {
    const row = root.querySelector(`[data-attempt="${gang.attempt_id}"]`);
    if (!row) {
      if (!met.has(gang.attempt_id)) update();
      met.add(gang.attempt_id);
      continue;
    }
    row.querySelector("[data-phase]").textContent = gang.phase;
    if (gang.metrics.fraction !== undefined) row.querySelector("progress").value = gang.metrics.fraction;
    const loss = gang.metrics.val_bpb !== undefined ? ` · ${gang.metrics.val_bpb.toFixed(3)} BPB` : gang.metrics.train_loss !== undefined ? ` · loss ${gang.metrics.train_loss.toFixed(3)}` : "";
    row.querySelector("[data-score]").textContent = gang.step === null ? "" : `step ${gang.step}${loss}`;
  }
}

let later;
const update = soon(async () => {
  await refresh(`/studies/${name}/live`, ["live-head", "live"]);
  draw();
  // What is reckoned seldom may be from before this event: it is asked for once more, when it will be new.
  const again = Number(document.getElementById("drawn").dataset.again);
  clearTimeout(later);
  if (again) later = setTimeout(update, 1000 * again + 50);
});

document.getElementById("axis").hidden = false;
document.getElementById("axis").addEventListener("click", (event) => {
  if (!event.target.value) return;
  axis = event.target.value;
  share("axis", axis, "trials");
  draw();
});

// Two to five trials side by side.
const chosen = () => [...root.querySelectorAll("[name=trials]:checked")].map((box) => box.value);
function offer() {
  const button = root.querySelector("#compare button");
  if (!button) return;
  const count = chosen().length;
  button.disabled = count < 2 || count > 5;
  const words = count ? `Compare ${count}` : "Compare";
  if (button.textContent !== words) button.textContent = words;
}
root.addEventListener("change", offer);
root.addEventListener("submit", (event) => {
  if (event.target.id !== "compare") return;
  event.preventDefault();
  location.assign(`/studies/${name}/compare?trials=${chosen().join(",")}`);
});
document.addEventListener("refreshed", offer);

// One question at a time, and Escape takes it back.
document.addEventListener("click", (event) => {
  for (const other of root.querySelectorAll("details.confirm[open]")) if (!other.contains(event.target)) other.open = false;
});
document.addEventListener("keydown", (event) => {
  const open = event.key === "Escape" && root.querySelector("details.confirm[open]");
  if (open) { open.open = false; open.querySelector("summary").focus(); }
});

draw();
offer();
onTheme(draw);
if (Number(document.getElementById("drawn").dataset.again)) update();
follow(`/v1/studies/${name}/events?after=${root.dataset.seen}`, { message: update, activity: showActivity });
