// What every page shares: following a stream, swapping in what changed, times that tick, and charts in the page's colours.

const badge = document.getElementById("link");

/** Follow server-sent events. `handlers` maps an event's name to a function of its data. Returns the source. */
export function follow(url, handlers) {
  const source = new EventSource(url);
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data), event));
  }
  source.addEventListener("open", () => say("live", "live"));
  source.addEventListener("error", () => say("lost", source.readyState === EventSource.CLOSED ? "disconnected" : "reconnecting"));
  // A page that is left must not keep one of the browser's few connections to this server.
  window.addEventListener("pagehide", () => source.close());
  return source;
}

export function say(kind, words) {
  badge.hidden = false;
  badge.className = `link ${kind}`;
  badge.textContent = words;
}

/** A function that runs `work` soon, once for many calls, and never twice at the same time. */
export function soon(work, wait = 150) {
  let due = false;
  let busy = false;
  return async function run() {
    due = true;
    if (busy) return;
    busy = true;
    while (due) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      due = false;
      await work();
    }
    busy = false;
  };
}

/** Replace the elements of these ids by those of the page at `url`, keeping the reader's focus and open details. */
export async function refresh(url, ids) {
  const answer = await fetch(url);
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const id of ids) {
    const old = document.getElementById(id);
    const now = fresh.getElementById(id);
    if (!old || !now || old.innerHTML === now.innerHTML) continue;
    const focused = old.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const open = [...old.querySelectorAll("details")].map((details) => details.open);
    old.replaceChildren(...now.childNodes);
    [...old.querySelectorAll("details")].forEach((details, i) => { details.open = open[i] ?? false; });
    if (focused) old.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  }
  tick();
}

const UNITS = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

function tick() {
  for (const time of document.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    const seconds = (at - Date.now()) / 1000;
    const [size, unit] = UNITS.find(([size]) => Math.abs(seconds) >= size) ?? [1, "second"];
    time.title = at.toLocaleString();
    time.textContent = Math.abs(seconds) < 5 ? "just now" : relative.format(Math.round(seconds / size), unit);
  }
  for (const time of document.querySelectorAll("time[data-since]")) {
    const seconds = Math.max(0, (Date.now() - new Date(time.dataset.since)) / 1000);
    const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([size]) => seconds >= 2 * size) ?? [1, "s"];
    time.textContent = `${Math.floor(seconds / size)} ${unit}`;
  }
}

tick();
setInterval(tick, 1000);

/** A colour of the style sheet. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Call `draw` when the reader's device changes between light and dark. */
export function onTheme(draw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

/** A layout in the page's colours and type, for Plotly. */
export function layout(extra) {
  const axis = { gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, ticks: "outside", tickcolor: colour("line"), automargin: true };
  return {
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("soft") },
    margin: { l: 56, r: 16, t: 12, b: 44 },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), family: getComputedStyle(document.body).fontFamily } },
    showlegend: false,
    ...extra,
    xaxis: { ...axis, ...extra.xaxis },
    yaxis: { ...axis, ...extra.yaxis },
    ...(extra.yaxis2 ? { yaxis2: { ...axis, ...extra.yaxis2 } } : {}),
  };
}

export const config = { responsive: true, displaylogo: false, displayModeBar: false };
