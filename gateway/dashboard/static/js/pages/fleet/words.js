// What the states of a replica and their reasons mean, in words.

const STATES = {
  ok: { tone: "good", sign: "●", text: "taking work" },
  recovering: { tone: "info", sign: "◆", text: "coming back" },
  full: { tone: "warn", sign: "▲", text: "full" },
  draining: { tone: "off", sign: "○", text: "drained" },
  cordoned: { tone: "info", sign: "◐", text: "cordoned" },
  down: { tone: "bad", sign: "■", text: "not used" },
};

/** Tone, sign and word of a state of the map. */
export const stateOf = (kind) => STATES[kind] ?? STATES.down;

const REASONS = {
  draining: "Drained by an operator: it finishes what it has and gets nothing new.",
  cordoned: "Cordoned by an operator: it gets no new prompts, and goes on with those that it holds.",
  joining: "It is new, and no probe has found it ready yet.",
  full: "It has as many requests as it may have at once.",
  warming: "It is new or has begun anew, and is given what is most used before its first request.",
  cooling_down: "A request has failed here; it rests for a moment.",
  ejected: "Too many of its requests failed; it is left out for a while and then tried again.",
  half_open: "It was left out, and is being tried with single requests.",
  not_ready: "Its health check says that it is not ready. Look at the engine's log.",
  unresponsive: "It does not answer its health check. Is the engine running, and can this machine reach it?",
  stalled: "Requests are under way and nothing comes back. The engine may hang; restart it if this lasts.",
  credential_refused: "It refuses the key that is configured for it. Check api_key of its backend.",
};

/** Why a replica gets no new work, and what can be done. */
export const reasonOf = (reason, kind) =>
  REASONS[reason] ?? (reason ? reason.replaceAll("_", " ") : kind === "recovering" ? "It was unwell and gets a growing part of its usual work." : "It takes work.");

/** "1 request", "3 requests" */
export const counted = (count, noun) => `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
