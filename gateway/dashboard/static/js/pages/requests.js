// Requests under way and past ones; one of them opened shows what happened when, and why it went where it went.
import { html, useEffect, useMemo, useRef, useState } from "../lib/ui.js";
import { del, get } from "../lib/api.js";
import { useData } from "../lib/data.js";
import { useLive } from "../lib/live.js";
import { dollars, millis, number, time } from "../lib/format.js";
import {
  Badge, Button, Card, CopyText, Empty, ErrorBox, Field, Loading, Page, Select, Table, Time, useConfirm,
} from "../lib/parts.js";
import { notify, notifyError } from "../lib/notify.js";
import { go, useRoute } from "../lib/route.js";
import { may } from "../lib/session.js";
import { Decisions } from "../lib/decision.js";
import { OUTCOMES, Outcome, PHASES } from "../lib/outcomes.js";
import { Attempts, Timeline } from "../lib/timeline.js";

export const title = "Requests";

const FILTERS = ["tenant", "key", "model", "replica", "outcome", "status", "slower_than_ms"];
const KEPT = 5000;

/** Whether a row is one that the filters ask for, as the gateway would say. */
export function matches(row, filters) {
  const lasted = row.duration_ms ?? Date.now() - row.time_unix_s * 1000;
  return (!filters.tenant || row.tenant === filters.tenant) && (!filters.key || row.key_id === filters.key)
    && (!filters.model || row.model === filters.model || row.fallback_from === filters.model)
    && (!filters.replica || filters.replica === row.replica || filters.replica === `${row.pool}/${row.replica}`)
    && (!filters.outcome || row.outcome === filters.outcome)
    && (!filters.status || hasStatus(String(row.status), filters.status))
    && (!filters.slower_than_ms || lasted > Number(filters.slower_than_ms));
}

const hasStatus = (status, wanted) => wanted.endsWith("xx") ? status[0] === wanted[0] : status === wanted;
const endedAt = (row) => row.time_unix_s + row.duration_ms / 1000;
const newest = (left, right) => endedAt(right) - endedAt(left);

/** Adds rows to those that are there, each once, the last settled first. */
function joined(before, rows) {
  const known = new Set(before.map((row) => row.id));
  const fresh = rows.filter((row) => !known.has(row.id));
  return fresh.length ? [...before, ...fresh].sort(newest).slice(0, KEPT) : before;
}

const took = (key, label) => ({ key, label, align: "end", cell: (row) => millis(row[key]) });

function Tokens({ row }) {
  const words = `${number(row.prompt_tokens)} of the prompt, ${number(row.cached_tokens)} of them cached`;
  return html`<span title=${words}>${number(row.prompt_tokens)} → ${number(row.completion_tokens)}</span>`;
}

const SETTLED = [
  { key: "id", label: "Request", cell: (row) => html`<code>${row.id.slice(-8)}</code>` },
  { key: "time_unix_s", label: "Began", cell: (row) => html`<${Time} at=${row.time_unix_s} />` },
  { key: "outcome", label: "Outcome", cell: (row) => html`<${Outcome} row=${row} />` },
  { key: "status", label: "Status", align: "end", cell: (row) => row.status || "–" },
  { key: "tenant", label: "Tenant" },
  { key: "model", label: "Model", cell: (row) => row.model || "–" },
  { key: "replica", label: "Replica", cell: (row) => row.replica || "–" },
  { key: "attempts", label: "Attempts", align: "end" },
  took("queue_ms", "Queue"), took("ttft_ms", "First token"), took("duration_ms", "Whole"),
  { key: "prompt_tokens", label: "Tokens", align: "end", cell: (row) => html`<${Tokens} row=${row} />` },
];

function Filters({ filters, onChange }) {
  const [typed, setTyped] = useState(filters);
  const changed = useRef(null);
  useEffect(() => setTyped(filters), [JSON.stringify(filters)]);
  useEffect(() => () => clearTimeout(changed.current), []);
  const set = (name, value, now = false) => {
    const next = { ...typed, [name]: value };
    setTyped(next);
    clearTimeout(changed.current);
    changed.current = setTimeout(() => onChange(next), now ? 0 : 350);
  };
  const input = (name, label, more = {}) =>
    html`<${Field} label=${label} value=${typed[name] ?? ""} onInput=${(event) => set(name, event.target.value.trim())}
      autocomplete="off" ...${more} />`;
  return html`<form class="req-filters" role="search" aria-label="Filter requests"
    onSubmit=${(event) => { event.preventDefault(); onChange(typed); }}>
    ${input("tenant", "Tenant")} ${input("key", "Key id")} ${input("model", "Model")} ${input("replica", "Replica")}
    <${Select} label="Outcome" value=${typed.outcome ?? ""} onChange=${(value) => set("outcome", value, true)}
      options=${[["", "any"], ...Object.keys(OUTCOMES).map((each) => [each, each])]} />
    ${input("status", "Status", { placeholder: "503 or 5xx" })}
    ${input("slower_than_ms", "Slower than (ms)", { inputmode: "numeric" })}
    <div class="field clear"><${Button} onClick=${() => onChange({})}
      disabled=${!Object.values(filters).some(Boolean)}>Clear<//></div>
  </form>`;
}

function useEnding(onDone) {
  const confirm = useConfirm();
  return async (row) => {
    const sure = await confirm({
      title: "End this request?", danger: true, action: "End request",
      body: html`<p>Its client (tenant ${row.tenant || "unknown"}) gets an error with the
        code <code>ended_by_operator</code>, and the engine is told to stop. That cannot be undone.</p>`,
    });
    if (!sure) return;
    try {
      await del(`requests/${encodeURIComponent(row.id)}`);
      notify("The request is ended.");
    } catch (error) {
      notifyError(error);
    }
    onDone?.();
  };
}

function List({ query }) {
  const filters = useMemo(() => {
    const given = FILTERS.map((name) => [name, query.get(name) ?? ""]);
    return Object.fromEntries(given.filter(([, value]) => value));
  }, [query.toString()]);
  const search = new URLSearchParams(filters).toString();
  const { data, error, loading, reload } = useData(`requests?limit=200${search ? `&${search}` : ""}`);
  const live = useLive("requests");
  const [paused, setPaused] = useState(false);
  const [shown, setShown] = useState({ settled: [], live: [], next: null });
  const end = useEnding();

  useEffect(() => { if (data) setShown({ settled: data.settled, live: data.live, next: data.next }); }, [data]);
  useEffect(() => {
    if (!live || paused || !data) return;
    const noOutcome = !filters.outcome && !filters.status;
    setShown((before) => ({
      ...before,
      settled: joined(before.settled, live.settled.filter((row) => matches(row, filters))),
      live: noOutcome ? live.live.filter((row) => matches(row, filters)) : [],
    }));
  }, [live, paused, data]);

  const change = (next) => {
    const kept = new URLSearchParams(Object.entries(next).filter(([, value]) => value)).toString();
    go(kept ? `requests?${kept}` : "requests", { replace: true });
  };
  const more = async () => {
    try {
      const after = new URLSearchParams({ ...filters, limit: 200, live: false, before: shown.next });
      const page = await get(`requests?${after}`);
      setShown((before) => ({ ...before, settled: joined(before.settled, page.settled), next: page.next }));
    } catch (failure) {
      notifyError(failure);
    }
  };
  const open = (row) => go(`requests/${encodeURIComponent(row.id)}`);
  const columns = useMemo(() => [
    { key: "id", label: "Request", cell: (row) => html`<code>${row.id.slice(-8)}</code>` },
    { key: "time_unix_s", label: "Began", cell: (row) => html`<${Time} at=${row.time_unix_s} />` },
    { key: "phase", label: "Is at", cell: (row) => html`<${Badge}
      tone=${row.phase === "queue" ? "warn" : "info"}>${PHASES[row.phase] ?? row.phase}<//>` },
    { key: "tenant", label: "Tenant" },
    { key: "model", label: "Model", cell: (row) => row.model || "–" },
    { key: "replica", label: "Replica", cell: (row) => row.replica || "–" },
    { key: "attempts", label: "Attempts", align: "end" },
    { key: "content_events", label: "Tokens so far", align: "end", cell: (row) => number(row.content_events) },
    ...(may("operator") ? [{ key: "end", label: "", sortable: false, cell: (row) => html`<button type="button"
      class="plain" aria-label=${`End request ${row.id.slice(-8)}`} onClick=${() => end(row)}>End</button>` }] : []),
  ], []);
  const filtered = Object.keys(filters).length > 0;
  const total = live?.live_total ?? 0;
  return html`<${Page} title=${title} lead="What is under way now, and the last thousand of each worker."
    actions=${html`<${Button} aria-pressed=${paused ? "true" : "false"}
      onClick=${() => setPaused(!paused)}>${paused ? "Go on" : "Pause"}<//>`}>
    <${Filters} filters=${filters} onChange=${change} />
    <${ErrorBox} error=${error} retry=${reload} />
    ${(data?.silent_workers ?? []).length > 0 && html`<p role="status"><${Badge}
      tone="warn">worker ${data.silent_workers.join(", ")} does not answer<//> Its requests are missing here.</p>`}
    <${Card} class="req-list" title="Under way" aside=${paused ? html`<${Badge}
      tone="warn">paused<//>` : total > shown.live.length && !filtered ? `${shown.live.length} of ${total}` : number(shown.live.length)}>
      <${Table} label="Requests under way" columns=${columns} rows=${shown.live} rowKey=${(row) => row.id}
        onOpen=${open} maxHeight="40vh"
        empty=${html`<${Empty}
          title="Nothing is under way.">${filtered ? "That these filters let through, at least." : "A request appears here as soon as its first bytes have come."}<//>`} />
    <//>
    <${Card} class="req-list" title="Settled" aside=${number(shown.settled.length)}>
      ${loading && !data ? html`<${Loading} what="Loading requests" />` : html`<${Table} label="Settled requests"
        columns=${SETTLED} rows=${shown.settled} rowKey=${(row) => row.id} onOpen=${open}
        empty=${html`<${Empty} title=${filtered ? "No request matches." : "No request has been settled yet."}>
          ${filtered ? html`<${Button}
            onClick=${() => change({})}>Clear the filters<//>` : html`<p>Send one to the inference port, or <a
            href="#playground">in the playground</a>. Each appears here when its answer has ended.</p>`}<//>`} />`}
      ${shown.next && html`<div class="req-more"><${Button} onClick=${more}>Older ones<//></div>`}
    <//>
  <//>`;
}

/** A definition list of what is known. */
const Facts = ({ facts }) => html`<dl
  class="req-facts">${facts.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) =>
  html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;

function facts(row) {
  const yes = (value) => value ? "yes" : null;
  return [
    ["Began", time(row.time_unix_s)], ["Tenant", row.tenant], ["Key", row.key_id && html`<code>${row.key_id}</code>`], ["Class", row.class],
    ["Path", row.route && html`<code>${row.route}</code>`], ["Model", row.model], ["Asked for", row.fallback_from], ["Pool", row.pool], ["Replica", row.replica],
    ["Region", row.region], ["Chosen because", row.route_reason && html`<code>${row.route_reason}</code>`], ["Streamed", row.stream ? "yes" : "no"],
    ["Attempts", row.attempts], ["Went on elsewhere", row.continuations || null], ["Hedged", yes(row.hedged)],
    ["Status", row.status || null], ["Error", row.error_code && html`<code>${row.error_code}</code>`],
    ["Queue", row.queue_ms === undefined ? null : millis(row.queue_ms)], ["First token", row.ttft_ms === undefined ? null : millis(row.ttft_ms)],
    ["Whole", row.duration_ms === undefined ? null : millis(row.duration_ms)],
    ["Prompt tokens", row.prompt_tokens === undefined ? null : number(row.prompt_tokens)],
    ["of them cached", row.cached_tokens === undefined ? null : number(row.cached_tokens)],
    ["Output tokens", row.completion_tokens === undefined ? null : `${number(row.completion_tokens)}${row.usage_estimated ? ", estimated" : ""}`],
    ["Cost", row.cost_usd === undefined ? null : dollars(row.cost_usd)], ["Worker", row.worker],
  ];
}

function Details({ id }) {
  const { data, error, loading, reload } = useData(`requests/${encodeURIComponent(id)}`);
  const topic = useLive("requests");
  const seen = useRef("");
  const end = useEnding(reload);
  const under = data?.live ?? null;
  useEffect(() => {
    if (!topic || !under) return;
    const now = topic.live.find((row) => row.id === id);
    const state = now ? `${now.phase} ${now.attempts}` : "over";
    if (seen.current !== state) {
      seen.current = state;
      reload();
    }
  }, [topic]);
  const row = under ?? data?.record;
  const heading = `Request ${id.slice(-8)}`;
  const actions = html`<a class="button normal" href="#requests">All requests</a>
    ${under && may("operator") && html`<${Button} kind="danger" onClick=${() => end(under)}>End request<//>`}`;
  if (error && !data) {
    return html`<${Page} title=${heading} actions=${actions}>
      ${error.status === 404 ? html`<${Empty} title="This request is not known here any more.">
        <p>Each worker keeps its last thousand in memory; the usage log, where <code>usage_log.path</code> names one, has them all. Its id was <code>${id}</code>.</p><//>`
        : html`<${ErrorBox} error=${error} retry=${reload} />`}<//>`;
  }
  if (!row) return html`<${Page} title=${heading}>${loading && html`<${Loading} what="Loading the request" />`}<//>`;
  return html`<${Page} title=${heading} actions=${actions}
    lead=${under ? html`<${Badge}
      tone="info">${PHASES[under.phase] ?? under.phase}<//> ${number(under.content_events)} content events so far`
      : html`<${Outcome} row=${row} /> ${OUTCOMES[row.outcome]?.[1]}`}>
    <${Card} title="Timeline" aside=${millis(data.timeline.duration_ms)}><${Timeline} timeline=${data.timeline} /><//>
    <${Card} title="Why it went there"><${Decisions} decisions=${data.decisions}
      attempts=${data.timeline.attempts.length} /><//>
    <${Card} title="Attempts" aside=${data.timeline.attempts.length}><${Attempts}
      attempts=${data.timeline.attempts} /><//>
    <${Card} title="Record"><${Facts} facts=${facts(row)} />
      <div class="req-copies"><${CopyText} text=${`x-request-id: ${id}`} />
        ${row.replica && html`<${CopyText} text=${`x-tidegate-replica: ${row.replica}`} />`}
        <${CopyText} text=${`tidegate requests show ${id}`} /></div><//>
  <//>`;
}

export default function RequestsPage() {
  const { rest, query } = useRoute();
  return rest.length ? html`<${Details} key=${rest[0]} id=${rest[0]} />` : html`<${List} query=${query} />`;
}
