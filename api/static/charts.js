// What every chart shares: the page's colours and type, in the light and in the dark, for Plotly.

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
    uirevision: "kept", // the reader's zoom outlives what comes in
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    ...extra,
    xaxis: { ...axis, ...extra.xaxis },
    yaxis: { ...axis, ...extra.yaxis },
    ...(extra.yaxis2 ? { yaxis2: { ...axis, ...extra.yaxis2 } } : {}),
  };
}

export const config = { responsive: true, displaylogo: false, displayModeBar: false };

/** Ticks at 1, 2 and 5 of each power of ten, each with its own whole label. */
export function decades(low, high) {
  const digits = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) ticks.push(...digits.map((digit) => digit * 10 ** power));
  const label = (value) => (value >= 1e6 ? `${value / 1e6}M` : value >= 1e3 ? `${value / 1e3}k` : `${Number(value.toPrecision(1))}`);
  return { tickvals: ticks, ticktext: ticks.map(label) };
}

/** The range of these values, with room around them: a share of how far apart they are. */
export function spread(values, share) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * share;
  return [low - room, high + room];
}
