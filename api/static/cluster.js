// The cluster, live: at every event, and as the time goes by.
import { follow, refresh, soon } from "./live.js";

const live = document.getElementById("live");
const EVERY = { 5: 1, 30: 3, 180: 15, 1440: 60, 10080: 300 }; // seconds in which a lane grows by about a pixel or two
const update = soon(() => refresh(`/cluster/live?minutes=${live.dataset.minutes}`, ["live"]), 500);

follow(`/v1/events?after=${live.dataset.seen}`, { message: update });
setInterval(() => { if (!document.hidden) update(); }, 1000 * EVERY[live.dataset.minutes]);
document.addEventListener("visibilitychange", () => { if (!document.hidden) update(); });
