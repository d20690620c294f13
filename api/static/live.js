// What every live page shares: following a stream, taking over what changed, and times that tick.

const badge = document.getElementById("link");

const REST_SECONDS = 20; // after which a page that nobody looks at lets go of its stream
const PATIENCE_SECONDS = [1, 2, 5, 10, 30, 60]; // between tries, where the server answers with an error

/**
 * Follow server-sent events as long as the page is there: `handlers` maps an event's name to a function of its data.
 * It goes on where it broke off, whatever happened to the server meanwhile. Returns what closes it.
 */
export function follow(url, handlers) {
  let [source, last, tries, resting, closed] = [null, null, 0, null, false];

  function open() {
    clearTimeout(resting);
    if (closed || (source && source.readyState !== EventSource.CLOSED)) return;
    const address = new URL(url, location.href);
    if (last && address.searchParams.has("after")) address.searchParams.set("after", last);
    source = new EventSource(address);
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => { last = event.lastEventId || last; handle(JSON.parse(event.data), event); });
    }
    source.addEventListener("open", () => { tries = 0; say("live", "live"); });
    source.addEventListener("error", () => {
      say("lost", "reconnecting");
      // The browser itself tries again unless it was given an error for an answer: that is left to us.
      if (source.readyState === EventSource.CLOSED) later(again, PATIENCE_SECONDS[Math.min(tries++, PATIENCE_SECONDS.length - 1)]);
    });
  }

  function later(work, seconds) {
    clearTimeout(resting);
    resting = setTimeout(work, 1000 * seconds);
  }

  async function again() {
    const answer = await fetch(location.href).catch(() => null);
    if (answer && (answer.status === 401 || answer.redirected)) location.reload(); // to sign in
    else open();
  }

  function rest() {
    clearTimeout(resting);
    source.close();
  }

  // Browsers give a server few connections, and a page that is left or hidden must not keep one of them.
  window.addEventListener("pagehide", rest);
  window.addEventListener("pageshow", (event) => { if (event.persisted) open(); });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) later(rest, REST_SECONDS);
    else open();
  });
  open();
  return { close() { closed = true; rest(); } };
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
      try {
        await work();
      } catch (error) {
        if (!(error instanceof TypeError)) throw error; // no answer: the stream says so, and its return brings the next
      }
    }
    busy = false;
  };
}

/** Make the elements of these ids what the page at `url` has there (`options` are fetch's). Then a `refreshed` event tells the other scripts. */
export async function refresh(url, ids, options) {
  const answer = await fetch(url, options);
  if (answer.status === 401) location.reload(); // the sign-in ran out
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const id of ids) {
    const [old, now] = [document.getElementById(id), fresh.getElementById(id)];
    if (old && now) become(old, now);
  }
  tick();
  document.dispatchEvent(new Event("refreshed"));
}

/** What a script has put there (data-added), or keeps itself (data-keep), is not the server's, and stays. */
const ours = (node) => node.dataset?.added === undefined;
const keyOf = (node) => node.id || node.dataset?.key;

/** Change `old` into `now` where they differ: what stays keeps the reader's focus, selection, scrolling and open details. */
function become(old, now) {
  const before = [...old.childNodes].filter(ours);
  const keyed = new Map(before.filter(keyOf).map((node) => [keyOf(node), node]));
  const used = new Set();
  let plain = before.filter((node) => !keyOf(node));
  let place = old.firstChild;
  for (const wanted of now.childNodes) {
    const key = keyOf(wanted);
    let found = key ? keyed.get(key) : plain.shift();
    if (!found || found.nodeName !== wanted.nodeName) found = document.importNode(wanted, true);
    else if (found.nodeType !== Node.ELEMENT_NODE) { if (found.data !== wanted.data) found.data = wanted.data; }
    else if (found.dataset.keep === undefined && !found.isEqualNode(wanted)) { adopt(found, wanted); become(found, wanted); }
    used.add(found);
    while (place && !ours(place)) place = place.nextSibling;
    if (found === place) place = place.nextSibling;
    else old.insertBefore(found, place);
  }
  before.filter((node) => !used.has(node)).forEach((node) => node.remove());
}

function adopt(old, now) {
  for (const { name } of [...old.attributes]) {
    if (!now.hasAttribute(name) && !(name === "open" && old.localName === "details")) old.removeAttribute(name);
  }
  for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
}

const UNITS = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

function tick() {
  for (const time of document.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    const seconds = (at - Date.now()) / 1000;
    const [size, unit] = UNITS.find(([size]) => Math.abs(seconds) >= size) ?? [1, "second"];
    time.title = at.toLocaleString();
    write(time, Math.abs(seconds) < 5 ? "just now" : relative.format(Math.round(seconds / size), unit));
  }
  for (const time of document.querySelectorAll("time[data-since]")) {
    const seconds = Math.max(0, (Date.now() - new Date(time.dataset.since)) / 1000);
    const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"]].find(([size]) => seconds >= 2 * size) ?? [1, "s"];
    write(time, `${Math.floor(seconds / size)} ${unit}`);
  }
}

/** Only what reads differently is written: a page that is left open for days should rest. */
function write(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

tick();
setInterval(tick, 1000);

/** A part of the page's state that lives in its address, so that it can be shared. */
export function shared(name, fallback) {
  return new URLSearchParams(location.search).get(name) ?? fallback;
}

/** Put a part of the page's state into its address; what is the fallback needs no saying. */
export function share(name, value, fallback) {
  const address = new URL(location.href);
  if (value === fallback) address.searchParams.delete(name);
  else address.searchParams.set(name, value);
  history.replaceState(history.state, "", address);
}
