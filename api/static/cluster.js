// The cluster, live: at every event, and as the time goes by.
import { follow, refresh, soon } from "./live.js";

const live = document.getElementById("live");
const every = Math.max(1, live.dataset.minutes * 60 / 600); // seconds in which a lane grows by about a pixel
const update = soon(() => refresh(`/cluster/live?minutes=${live.dataset.minutes}`, ["live"]), 500);

follow(`/v1/events?after=${live.dataset.seen}`, { message: update });
setInterval(() => { if (!document.hidden) update(); }, 1000 * every);
document.addEventListener("visibilitychange", () => { if (!document.hidden) update(); });
