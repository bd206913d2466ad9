import { html, useEffect, useMemo, useState } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { useLive } from "../lib/live.js";
import { dollars, number, percent, seconds, time } from "../lib/format.js";
import { Badge, Bar, Button, Card, Empty, ErrorBox, Field, Grid, Loading, Page, Stat, Table } from "../lib/parts.js";
import { go, useRoute } from "../lib/route.js";

export const title = "Limits";

const PAGE = 100;
const WORDS = {
  requests_per_minute: "requests a minute",
  input_tokens_per_minute: "prompt tokens a minute",
  output_tokens_per_minute: "output tokens a minute",
  tokens_per_minute: "tokens a minute",
  concurrent_requests: "requests at once",
  usd_per_day: "dollars a day",
  usd_per_month: "dollars a month",
};
const STORES = {
  memory: ["memory", "of this gateway"],
  redis: ["Redis", "shared by all gateways"],
  local: ["this process", "Redis is away: every limit is shared out among the gateways"],
};
const NOTHING = "Limits of keys, tenants, end users and models appear here with what is left of them. "
  + "Set some for a key or tenant under Tenants, or in the configuration under limits.";
const KINDS = { key: "Key", tenant: "Tenant", user: "End user", model: "Model", tenant_model: "Tenant's model" };

const amount = (limit, value) => limit.startsWith("usd_") ? dollars(value) : number(value);

/** How a limit stands in words as well as in colour: [tone, word]. Nothing is left of less than one whole request. */
function standing(gauge) {
  if (gauge.remaining <= 0) return ["bad", "used up"];
  return gauge.share >= 0.8 ? ["warn", "nearly"] : ["good", "free"];
}

function holder(row) {
  if (row.kind === "key") return row.name ? `${row.name} (${row.tenant})` : `${row.key} (${row.tenant})`;
  if (row.kind === "tenant_model") return `${row.model} for ${row.tenant}`;
  if (row.kind === "user") return `${row.user} of ${row.tenant}`;
  return row.kind === "model" ? row.model : row.tenant;
}

function Gauge({ row, gauge }) {
  const [tone, word] = standing(gauge);
  const raised = row.raised[gauge.limit];
  const money = gauge.limit.startsWith("usd_");
  const of = `${amount(gauge.limit, gauge.used)} of ${amount(gauge.limit, gauge.capacity)}`;
  return html`<li class="gauge">
    <div class="gauge-head">
      <span>${WORDS[gauge.limit] ?? gauge.limit}</span>
      <span><${Badge} tone=${tone}>${word}<//> ${percent(gauge.share, 0)}</span>
    </div>
    <${Bar} value=${gauge.share} tone=${tone === "good" ? undefined : tone} label=${`${holder(row)}: ${WORDS[gauge.limit]}`}
      text=${`${of} taken, ${word}`} />
    <div class="gauge-foot">
      <span>${money ? `${of} spent` : `${of} taken`}</span>
      ${money && html`<span>${dollars(gauge.reserved)} reserved</span>`}
      <span>${amount(gauge.limit, gauge.remaining)} left</span>
      ${gauge.capacity !== gauge.most && html`<span>limit ${number(gauge.most)} a minute</span>`}
      ${gauge.resets_s > 0 && html`<span>free again in ${seconds(gauge.resets_s)}</span>`}
      ${gauge.refused > 0 && html`<span>${number(gauge.refused)} refused</span>`}
      ${gauge.would_refuse > 0 && html`<span>${number(gauge.would_refuse)} would be refused</span>`}
      ${raised && html`<span>raised from ${raised[0] === null ? "no limit" : amount(gauge.limit, raised[0])}
        until ${time(row.raised_until_unix_s)}</span>`}
    </div>
  </li>`;
}

function Holder({ row }) {
  return html`<div class="limits-of">
    <p>${KINDS[row.kind]} <strong>${holder(row)}</strong>
      ${row.shadow && html` <${Badge} tone="info">shadow: refuses nobody<//>`}
      ${row.in_flight > 0 && html` · ${number(row.in_flight)} under way`}
      ${row.in_line > 0 && html` · ${number(row.in_line)} of the tenant in line`}
      ${row.key && html` · <a href=${`#tenants/${encodeURIComponent(row.key)}`}>open the key</a>`}</p>
    <ul class="gauges">${row.limits.map((gauge) => html`<${Gauge} key=${gauge.limit} row=${row} gauge=${gauge} />`)}</ul>
  </div>`;
}

const COLUMNS = [
  { key: "holder", label: "Whose", value: holder, cell: holder },
  { key: "kind", label: "Kind", cell: (row) => KINDS[row.kind] },
  { key: "nearest", label: "Nearest limit", cell: (row) => WORDS[row.nearest] ?? row.nearest },
  { key: "share", label: "Taken", align: "end", cell: (row) => {
    const [tone, word] = standing(nearest(row));
    return html`<${Badge} tone=${tone}>${word}<//> ${percent(row.share, 0)}`;
  } },
  { key: "left", label: "Left", align: "end", value: (row) => nearest(row).remaining,
    cell: (row) => amount(row.nearest, nearest(row).remaining) },
  { key: "refused", label: "Refused", align: "end", value: refusals,
    cell: (row) => row.shadow ? `${number(refusals(row))} in shadow` : number(refusals(row)) },
];

const usedUp = (row) => row.limits.some((each) => each.remaining <= 0);

function nearest(row) {
  return row.limits.find((each) => each.limit === row.nearest);
}

function refusals(row) {
  return row.limits.reduce((sum, each) => sum + (row.shadow ? each.would_refuse : each.refused), 0);
}

/** Asked for in the address of the page, so that a view can be sent to a colleague. */
function asked(query) {
  const found = new URLSearchParams();
  for (const name of ["tenant", "key", "model"]) if (query.get(name)) found.set(name, query.get(name));
  return found;
}

function Filters({ query }) {
  const [values, setValues] = useState(() => Object.fromEntries(asked(query)));
  useEffect(() => setValues(Object.fromEntries(asked(query))), [query.toString()]);
  const show = (event) => {
    event.preventDefault();
    const written = Object.entries(values).map(([name, value]) => [name, value.trim()]);
    const wanted = new URLSearchParams(written.filter(([, value]) => value));
    go(wanted.toString() ? `limits?${wanted}` : "limits");
  };
  const set = (name) => (event) => setValues({ ...values, [name]: event.target.value });
  return html`<form class="limit-filters" onSubmit=${show}>
    <${Field} label="Tenant" value=${values.tenant ?? ""} onInput=${set("tenant")} autocomplete="off" />
    <${Field} label="Key id" value=${values.key ?? ""} onInput=${set("key")} autocomplete="off" />
    <${Field} label="Model" value=${values.model ?? ""} onInput=${set("model")} autocomplete="off" />
    <${Button} kind="primary" type="submit">Show<//>
    ${asked(query).toString() && html`<${Button} onClick=${() => go("limits")}>Show all<//>`}
  </form>`;
}

export default function LimitsPage() {
  const { query } = useRoute();
  const filter = asked(query).toString();
  const [offset, setOffset] = useState(0);
  const [open, setOpen] = useState(null);
  useEffect(() => setOffset(0), [filter]);
  const { data, error, loading, reload } = useData(`limits?limit=${PAGE}&offset=${offset}${filter ? `&${filter}` : ""}`);
  const live = useLive("limits");

  // The first page follows those nearest to a limit; the others are as they were when they were fetched.
  const rows = useMemo(() => {
    if (!data) return [];
    if (!live || filter || offset > 0) return data.data;
    const now = new Map(live.data.map((row) => [row.scope, row]));
    const known = data.data.map((row) => now.get(row.scope) ?? row);
    const seen = new Set(known.map((row) => row.scope));
    return [...known, ...live.data.filter((row) => !seen.has(row.scope))].sort((a, b) => b.share - a.share);
  }, [data, live, filter, offset]);
  const store = (!filter && live?.store) || data?.store;
  const full = rows.filter((row) => !row.shadow && usedUp(row)).length;
  const near = rows.filter((row) => !row.shadow && row.share >= 0.8 && !usedUp(row)).length;
  const shadow = rows.filter((row) => row.shadow).reduce((sum, row) => sum + refusals(row), 0);
  const chosen = rows.find((row) => row.scope === open) ?? null;

  return html`<${Page} title=${title} lead="Every limit in force and what is left of it now, those nearest to their end first.">
    <${Filters} query=${query} />
    <${ErrorBox} error=${error} retry=${reload} />
    ${!data && loading && html`<${Loading} what="Reading the limits" />`}
    ${data && html`
      <${Grid} min="11rem">
        <${Stat} label="Used up" value=${number(full)} tone=${full ? "bad" : undefined}
          note=${full ? "requests are refused" : "nobody is held up"} />
        <${Stat} label="Nearly used up" value=${number(near)} tone=${near ? "warn" : undefined} note="80 % or more is taken" />
        <${Stat} label="Would be refused" value=${number(shadow)} note="by limits in shadow mode" />
        <${Stat} label="Counted in" value=${(STORES[store] ?? STORES.memory)[0]} note=${(STORES[store] ?? STORES.memory)[1]}
          tone=${store === "local" ? "warn" : undefined} />
      <//>
      ${rows.length > 0 && html`<${Card} title="Nearest to their limit">
        ${rows.slice(0, 3).map((row) => html`<${Holder} key=${row.scope} row=${row} />`)}
      <//>`}
      <${Card} title="All holders" aside=${`${number(data.total)} looked at${data.complete ? "" : ", those active lately first"}`}>
        <${Table} label="Limits by holder" columns=${COLUMNS} rows=${rows} rowKey=${(row) => row.scope} selected=${open ?? undefined}
          onOpen=${(row) => setOpen(row.scope === open ? null : row.scope)}
          empty=${html`<${Empty} title=${filter ? "No limit matches" : "Nothing is limited yet"}>
            <p>${filter ? "Check the names, or show all." : NOTHING}</p><//>`} />
        ${data.total > PAGE && html`<div class="limit-pager">
          <${Button} disabled=${offset === 0} onClick=${() => setOffset(Math.max(0, offset - PAGE))}>Nearer<//>
          <span>${offset + 1} to ${offset + data.data.length}</span>
          <${Button} disabled=${data.data.length < PAGE} onClick=${() => setOffset(offset + PAGE)}>Further<//>
        </div>`}
      <//>
      ${chosen && html`<${Card} title=${`Limits of ${holder(chosen)}`}
        aside=${html`<${Button} onClick=${() => setOpen(null)}>Close<//>`}>
        <${Holder} row=${chosen} />
      <//>`}
    `}
  <//>`;
}
