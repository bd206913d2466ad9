// One event stream for the whole page. It is opened when the first part of the page wants a topic, asks for all topics
// that are wanted at the moment, and is closed when none is.
import { get, tellSignedOut } from "./api.js";
import { useEffect, useState } from "./ui.js";

const wanted = new Map(); // topic → set of listeners
const latest = new Map(); // topic → the last event's data
const states = new Set();
const AGAIN_MS = 3000;
let source = null;
let topics = "";
let scheduled = false;
let state = "off";

function setState(next) {
  state = next;
  states.forEach((listener) => listener(next));
}

function connect() {
  scheduled = false;
  const now = [...wanted.keys()].sort().join(",");
  if (now === topics && source !== null && source.readyState !== EventSource.CLOSED) return;
  source?.close();
  source = null;
  topics = now;
  if (!now) return setState("off");
  setState("connecting");
  const mine = new EventSource(`events?topics=${encodeURIComponent(now)}`);
  source = mine;
  mine.onopen = () => setState("live");
  mine.onerror = () => {
    setState("lost");
    // The browser tries again by itself unless the answer was an error.
    if (mine.readyState === EventSource.CLOSED) setTimeout(() => again(mine), AGAIN_MS);
  };
  for (const topic of wanted.keys()) {
    mine.addEventListener(topic, (event) => {
      if (source !== mine) return;
      const data = JSON.parse(event.data);
      latest.set(topic, data);
      wanted.get(topic)?.forEach((listener) => listener(data));
    });
  }
}

function later() {
  if (scheduled) return;
  scheduled = true;
  // The next page asks for its topics right after the last one has let go of its own.
  setTimeout(connect, 0);
}

/** An event source does not tell which error it got: it may be that nobody is signed in any more. */
async function again(refused) {
  if (source !== refused) return;
  const session = await get("session").catch(() => undefined); // null: nobody's
  if (session === null) tellSignedOut();
  if (source !== refused) return;
  topics = "";
  later();
}

/** The newest event of a topic; null until the first one. */
export function useLive(topic) {
  const [data, setData] = useState(null);
  useEffect(() => {
    if (!topic) return undefined;
    const listeners = wanted.get(topic) ?? new Set();
    wanted.set(topic, listeners);
    listeners.add(setData);
    later();
    return () => {
      listeners.delete(setData);
      if (!listeners.size) {
        wanted.delete(topic);
        latest.delete(topic);
      }
      later();
    };
  }, [topic]);
  return data;
}

/** "live", "connecting", "lost" (it is tried again) or "off" (this page has nothing that changes by itself). */
export function useConnection() {
  const [now, setNow] = useState(state);
  useEffect(() => {
    states.add(setNow);
    setNow(state);
    return () => states.delete(setNow);
  }, []);
  return now;
}

/** Ends the stream, as when nobody is signed in any more. */
export function disconnect() {
  source?.close();
  source = null;
  topics = "";
  setState("off");
}
