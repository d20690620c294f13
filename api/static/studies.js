// The list of studies, live.
import { follow, refresh, soon } from "./live.js";

const seen = document.getElementById("live").dataset.seen;
const update = soon(() => refresh(location.pathname + location.search, ["live"]), 500);
follow(`/v1/events?after=${seen}`, { message: update });
