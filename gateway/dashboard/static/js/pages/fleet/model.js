// The answer of fleet/map and the newest event of the stream as one list of replicas.
import { html } from "../../lib/ui.js";
import { Badge, Bar } from "../../lib/parts.js";
import { number, percent } from "../../lib/format.js";
import { counted, stateOf } from "./words.js";

export const NOWHERE = "\u0000";

const share = (part, whole) => (part === null || part === undefined || !whole ? null : part / whole);

/** What a cell can be shaded by; each value is 0 to 1, or null where it is not known. */
export const measures = {
  load: { label: "Load", low: "idle", high: "full", value: (each) => share(each.in_flight, each.ceiling) ?? Math.min(1, each.in_flight / 32) },
  kv: { label: "KV cache in use", low: "0 %", high: "100 %", value: (each) => each.kv_use },
  warm: { label: "Warm prefixes", low: "cold", high: "warm", value: (each) => share(each.warm_tokens, each.warm_budget) },
};

/** One object for each replica. The columns of the rows are named by the answer. */
export function merge(data, current) {
  const { fields } = data;
  return data.replicas.map((fixed, at) => {
    const row = current.now[at] ?? [];
    const live = Object.fromEntries(fields.map((field, place) => [field, row[place] ?? null]));
    const { kind, reason } = current.states[live.state] ?? { kind: "down", reason: "" };
    return {
      ...fixed, ...live, kind, reason, share: live.share ?? 1,
      key: `${fixed.pool}/${fixed.replica}`,
      words: [fixed.replica, fixed.pool, fixed.region ?? "", fixed.engine, stateOf(kind).text, reason, ...fixed.adapters].join(" ").toLowerCase(),
    };
  });
}

/** By region, then by pool, both in the order in which they are configured. */
export function placed(replicas) {
  const regions = new Map();
  for (const each of replicas) {
    const name = each.region ?? NOWHERE;
    const pools = regions.get(name) ?? new Map();
    regions.set(name, pools);
    const pool = pools.get(each.pool) ?? { pool: each.pool, engine: each.engine, hosted: each.hosted, replicas: [] };
    pools.set(each.pool, pool);
    pool.replicas.push(each);
  }
  return [...regions].map(([region, pools]) => {
    const all = [...pools.values()].flatMap((pool) => pool.replicas);
    return { region, pools: [...pools.values()], count: all.length, busy: all.reduce((sum, each) => sum + each.in_flight, 0) };
  });
}

/** The fleet in a sentence. */
export function summary(replicas) {
  if (replicas.length === 0) return null;
  const regions = new Set(replicas.map((each) => each.region));
  const working = replicas.filter((each) => ["ok", "recovering", "full"].includes(each.kind)).length;
  const busy = replicas.reduce((sum, each) => sum + each.in_flight, 0);
  const all = working === replicas.length ? "all take work" : `${working} take work`;
  return `${counted(replicas.length, "replica")} in ${counted(regions.size, "region")}: ${all}; ${counted(busy, "request")} in flight.`;
}

/** A replica in a sentence, for who cannot see its cell. */
export function inWords(each) {
  const parts = [`${each.replica}: ${stateOf(each.kind).text}`];
  if (each.reason && each.reason !== "draining" && each.reason !== "full") parts.push(each.reason.replaceAll("_", " "));
  parts.push(each.ceiling === null ? `${each.in_flight} in flight` : `${each.in_flight} of ${each.ceiling} in flight`);
  if (each.kv_use !== null) parts.push(`KV cache ${percent(each.kv_use, 0)}`);
  if (each.warm_tokens) parts.push(`${number(each.warm_tokens)} warm tokens`);
  return parts.join(", ");
}

const meter = (value, label, text) => html`<span class="metered"><${Bar} value=${value} label=${label} text=${text} tone=${value > 0.95 ? "bad" : value > 0.8 ? "warn" : null} /><span>${text}</span></span>`;

export const load = (each) => each.ceiling === null
  ? html`<span>${number(each.in_flight)}</span>`
  : meter(each.in_flight / each.ceiling, `Load of ${each.replica}`, `${each.in_flight} / ${each.ceiling}`);
export const kv = (each) => each.kv_use === null ? "–" : meter(each.kv_use, `KV cache of ${each.replica}`, percent(each.kv_use, 0));
export const warm = (each) => each.warm_tokens === null ? "–" : html`<span>${number(each.warm_tokens)}</span>`;

export const columns = [
  { key: "replica", label: "Replica" },
  { key: "pool", label: "Pool" },
  { key: "region", label: "Region", cell: (row) => row.region ?? "–" },
  { key: "state", label: "State", value: (row) => row.kind, cell: (row) => html`<${Badge} tone=${stateOf(row.kind).tone} title=${row.reason}>${stateOf(row.kind).text}<//>` },
  { key: "load", label: "Load", value: (row) => measures.load.value(row), cell: load },
  { key: "queued", label: "Waiting", align: "end", value: (row) => row.queued, cell: (row) => number(row.queued) },
  { key: "kv", label: "KV cache", value: (row) => row.kv_use, cell: kv },
  { key: "warm", label: "Warm tokens", align: "end", value: (row) => row.warm_tokens, cell: warm },
  { key: "speed", label: "Tokens/s", align: "end", value: (row) => row.tokens_per_s, cell: (row) => number(row.tokens_per_s) },
  { key: "adapters", label: "Adapters", value: (row) => row.adapters.length, cell: (row) => row.adapters.join(", ") || "–" },
];
