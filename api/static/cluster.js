// The cluster, live: at every event, and as the time goes by.
import { follow, refresh, soon } from "./live.js";

const live = document.getElementById("live");
const EVERY = { 0.25: 2, 1: 5, 6: 20, 24: 60, 168: 300 }; // seconds in which a lane grows by about a pixel or two
const update = soon(() => refresh(`/cluster/live?hours=${live.dataset.hours}`, ["live"]), 500);

follow(`/v1/events?after=${live.dataset.seen}`, { message: update });
setInterval(() => { if (!document.hidden) update(); }, 1000 * EVERY[live.dataset.hours]);
document.addEventListener("visibilitychange", () => { if (!document.hidden) update(); });
