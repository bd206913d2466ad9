// What scaling's signals, limits and providers mean, in words.

const REASONS = {
  arrivals: "What is asked for now", trend: "What will be asked for", queue: "What waits", ttft: "First tokens come late",
  kv: "KV cache", from_zero: "Nobody is there", replace: "Some are unwell", unknown: "Too little is known", spill: "What is rented",
  hold: "Held by an operator",
};
const LIMITS = {
  floor: ["Fewer would do, and the least number is reached.", "min"],
  ceiling: ["More would help, and the largest number is reached.", "max"],
  budget: ["More would help, and the money does not pay for it.", "max_usd_per_hour"],
  up_step: ["More would help; it goes up in steps.", "up_step"],
  up_cool_down: ["More would help; it has just gone up.", "up_cool_down_s"],
  tolerance: ["It is near enough to the target.", "tolerance"],
  down_after: ["Fewer would do; that has to last for a while before one goes.", "down_after_s"],
  down_step: ["Fewer would do; it goes down in steps.", "down_step"],
  unknown: ["Too little is known to take anything away.", null],
  hold: ["An operator holds the number.", null],
};
const PROVIDERS = {
  none: "nobody acts on it (provider none)",
  local: "tidegate fleet up acts on it (provider local)",
  kubernetes: "Kubernetes acts on it",
  command: "a command acts on it",
  webhook: "a webhook acts on it",
};

const of = (words, key, other) => Object.hasOwn(words, key) ? words[key] : other;

/** What a reason is about. */
export const reasonOf = (kind) => of(REASONS, kind, kind.replaceAll("_", " "));

/** What keeps the number from what the reasons ask for, and the setting that says so; null: nothing. */
export const limitOf = (kind) => (kind ? of(LIMITS, kind, [`Limited by ${kind.replaceAll("_", " ")}.`, null]) : null);

/** Who sees to it. */
export const providerOf = (provider) => of(PROVIDERS, provider, provider);

/** A text of the gateway as a sentence. */
export const sentence = (text) => (text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "");

/** "1 replica", "3 replicas" */
export const replicas = (count) => `${count.toLocaleString("en-US")} replica${count === 1 ? "" : "s"}`;

/** A pool's numbers in a sentence. */
export function inWords({ wanted, current, ready, starting, min, max, decided_unix_s }) {
  if (!decided_unix_s) return `Nothing is decided yet; between ${min} and ${max}.`;
  const parts = [`${wanted} wanted`, `${current} there: ${ready} ready`, `${starting} starting`];
  const unwell = current - ready - starting;
  if (unwell > 0) parts.push(`${unwell} unwell`);
  return `${parts.join(", ")}; between ${min} and ${max}.`;
}
