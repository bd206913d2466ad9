import { html, useState } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { dollars, number, percent } from "../lib/format.js";
import { Card, Empty, ErrorBox, Grid, Loading, Page, Stat, Table, Tabs } from "../lib/parts.js";
import { Chart } from "../lib/chart.js";
import { go, useRoute } from "../lib/route.js";

export const title = "Cost";

const BY = [["tenant", "By tenant"], ["model", "By model"], ["backend", "By backend"]];
const WINDOWS = [["hour", "Hour"], ["day", "Day"], ["week", "Week"], ["month", "Month"]];
const one = (options, value, first) => options.some(([each]) => each === value) ? value : first;

function columns(by, record) {
  const money = (key, label, value) => ({ key, label, align: "end", value, cell: (row) => dollars(value(row)) });
  const count = (key, label, value) => ({ key, label, align: "end", value, cell: (row) => number(value(row)) });
  return [
    { key: "name", label: by[0].toUpperCase() + by.slice(1), cell: (row) => row.name },
    count("requests", "Requests", (row) => row.requests),
    count("prompt", "Prompt tokens", (row) => row.prompt_tokens),
    { key: "cached", label: "Cached", align: "end", value: (row) => share(row.cached_tokens, row.prompt_tokens) ?? 0,
      cell: (row) => percent(share(row.cached_tokens, row.prompt_tokens), 0) },
    count("completion", "Output tokens", (row) => row.completion_tokens),
    money("own", "Own", (row) => row.own.usd),
    money("rented", "Rented", (row) => row.rented.usd),
    money("usd", "Dollars", (row) => row.usd),
    count("worth", "Tokens per $", (row) => row.tokens_per_usd),
    ...(record ? [
      money("record_day", "On record today", (row) => row.record?.day_usd),
      money("record_month", "This month", (row) => row.record?.month_usd),
    ] : []),
  ];
}

const share = (part, whole) => whole > 0 ? part / whole : null;

function Charts({ by, series }) {
  const [what, setWhat] = useState("usd");
  const money = what === "usd";
  const parts = series.names.map((name, at) => ({ label: name, values: (money ? series.usd_of : series.tokens_of)[at] }));
  const rest = money ? series.rest_usd : series.rest_tokens;
  if (rest.some((value) => value > 0)) parts.push({ label: "all others", values: rest });
  return html`<${Grid} min="22rem">
    <${Card}><${Chart} title="Dollars, own and rented" kind="stack" format=${dollars} times=${series.times}
      series=${[{ label: "own", values: series.own_usd }, { label: "rented", values: series.rented_usd, colour: "--series-3" }]} /><//>
    <${Card}><${Chart} title="Tokens by kind" kind="stack" times=${series.times} series=${[
      { label: "prompt, computed", values: series.tokens.prompt_uncached },
      { label: "prompt, cached", values: series.tokens.cached },
      { label: "output", values: series.tokens.completion },
    ]} /><//>
    <${Card}>
      <${Tabs} label="What the chart shows" value=${what} onChange=${setWhat} options=${[["usd", "Dollars"], ["tokens", "Tokens"]]} />
      <${Chart} key=${`${by} ${what}`} title=${`${money ? "Dollars" : "Tokens"} by ${by}`} kind="stack"
        format=${money ? dollars : number} times=${series.times} series=${parts} />
    <//>
  <//>`;
}

export default function CostPage() {
  const { query } = useRoute();
  const by = one(BY, query.get("by"), "tenant");
  const window = one(WINDOWS, query.get("window"), "day");
  const { data, error, loading, reload } = useData(`cost?by=${by}&window=${window}`);
  const show = (name, value) => go(`cost?${new URLSearchParams({ by, window, [name]: value })}`, { replace: true });
  const actions = html`
    <${Tabs} label="Add up" value=${by} options=${BY} onChange=${(value) => show("by", value)} />
    <${Tabs} label="How far back" value=${window} options=${WINDOWS} onChange=${(value) => show("window", value)} />
    <a class="button normal" href=${`cost.csv?by=${by}&window=${window}`} download>Export CSV</a>`;
  const totals = data?.totals;
  return html`<${Page} title=${title} lead="What was used and what it cost, on your own replicas and on rented ones." actions=${actions}>
    <${ErrorBox} error=${error} retry=${reload} />
    ${!data && loading && html`<${Loading} what="Adding up" />`}
    ${data && data.rows.length === 0 && html`<${Card}><${Empty} title="Nothing was used in this time">
      <p>Tokens and dollars appear here a moment after requests have ended. Send one to this gateway, or look further back.</p><//><//>`}
    ${data && data.rows.length > 0 && html`
      <${Grid} min="11rem">
        <${Stat} label="Dollars" value=${dollars(totals.usd)} note=${`${number(totals.requests)} requests`} />
        <${Stat} label="Own" value=${dollars(totals.own.usd)} note=${`${number(totals.own.tokens)} tokens`} />
        <${Stat} label="Rented" value=${dollars(totals.rented.usd)} note=${`${number(totals.rented.tokens)} tokens`} />
        <${Stat} label="Of that spill" value=${dollars(totals.spilled_usd)}
          note=${`${number(totals.spilled_requests)} requests left, since the own replicas were late`} />
        <${Stat} label="Tokens per dollar" value=${number(totals.tokens_per_usd)}
          note=${`${percent(share(totals.cached_tokens, totals.prompt_tokens))} of prompt tokens came from a cache`} />
      <//>
      ${totals.unpriced_tokens > 0 && html`<p class="cost-note">${number(totals.unpriced_tokens)} tokens have no price
        and count as no dollars: set <code>models.NAME.price</code> in the configuration.</p>`}
      <${Charts} by=${by} series=${data.series} />
      <${Card} title=${BY.find(([each]) => each === by)[1]}
        aside=${data.names > data.rows.length && `the first ${number(data.rows.length)} of ${number(data.names)}`}>
        <${Table} key=${by} label=${`Cost by ${by}`} columns=${columns(by, data.rows.some((row) => row.record))}
          rows=${data.rows} rowKey=${(row) => row.name} sort=${["usd", -1]} />
      <//>
      ${by === "tenant" && html`<p class="cost-note">Dollars of the window are what this gateway has counted. On record is what budgets
        go by: of this calendar day and month (UTC), all gateways together.</p>`}
    `}
  <//>`;
}
