import { html, useCallback, useEffect, useRef, useState } from "../lib/ui.js";
import { get } from "../lib/api.js";
import { number } from "../lib/format.js";
import { Badge, Button, Card, Empty, ErrorBox, Field, Loading, Page, Select, Table, Tabs } from "../lib/parts.js";
import { go, useRoute } from "../lib/route.js";
import { may } from "../lib/session.js";
import { KeyDetail, KeyState, NewKey } from "../accounts/key.js";
import { TenantDetail } from "../accounts/tenant.js";

export const title = "Tenants and keys";

const PAGE = 100;
const KEYS_OFF = "keys_off"; // the code of a gateway that asks nobody for a key
const SEARCH_AFTER_MS = 250;
const STATES = [["", "any"], ["valid", "valid"], ["disabled", "disabled"], ["expired", "expired"]];

const limitsOf = (limits) => Object.entries(limits).filter(([, value]) => value !== false)
  .map(([name, value]) => `${name} ${value}`).join(", ");
const asked = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value)).toString();
const NO_KEYS = "A key lets somebody send requests, within the limits that you give it. Create the first one with New key, "
  + "or with tidegate keys create.";
const KEY_COLUMNS = [
  { key: "name", label: "Key", sortable: false, cell: (row) => row.name || row.id },
  { key: "tenant", label: "Tenant", sortable: false },
  { key: "state", label: "State", sortable: false, cell: (row) => html`<${KeyState} state=${row.state} />` },
  { key: "hint", label: "Ends in", sortable: false, cell: (row) => html`<code>${row.hint || "–"}</code>` },
  { key: "class", label: "Class", sortable: false },
  { key: "limits", label: "Limits", sortable: false, cell: (row) => limitsOf(row.limits) || "–" },
  { key: "expires", label: "Expires", sortable: false, cell: (row) => row.expires?.slice(0, 10) ?? "never" },
];
const TENANT_COLUMNS = [
  { key: "name", label: "Tenant", sortable: false, cell: (row) => row.name },
  { key: "keys", label: "Keys", align: "end", sortable: false, cell: (row) => number(row.keys) },
  { key: "disabled", label: "State", sortable: false,
    cell: (row) => html`<${Badge} tone=${row.disabled ? "off" : "good"}>${row.disabled ? "disabled" : "enabled"}<//>` },
  { key: "weight", label: "Weight", align: "end", sortable: false },
  { key: "limits", label: "Limits", sortable: false, cell: (row) => limitsOf(row.limits) || "–" },
];

/** Pages of a list, one after the other: `{ rows, total, more, error, loading, next, again }`. */
function usePages(path, last) {
  const [state, setState] = useState({ rows: [], total: null, more: false, error: null, loading: true });
  const asked = useRef(0);
  const load = useCallback(async (after, before) => {
    const mine = ++asked.current;
    setState((now) => ({ ...now, loading: true }));
    try {
      const page = await get(after ? `${path}&after=${encodeURIComponent(after)}` : path);
      if (mine !== asked.current) return;
      setState({ rows: [...before, ...page.data], total: page.total ?? null, more: page.has_more, error: null, loading: false });
    } catch (error) {
      if (mine === asked.current) setState((now) => ({ ...now, error, loading: false }));
    }
  }, [path]);
  useEffect(() => { load("", []); return () => { asked.current += 1; }; }, [load]);
  return { ...state, next: () => load(last(state.rows.at(-1)), state.rows), again: () => load("", []) };
}

/** A word to look for, told on once nobody has typed for a moment. */
function Search({ label, hint, value, onChange }) {
  const [text, setText] = useState(value);
  useEffect(() => setText(value), [value]);
  useEffect(() => {
    if (text === value) return undefined;
    const timer = setTimeout(() => onChange(text), SEARCH_AFTER_MS);
    return () => clearTimeout(timer);
  }, [text]);
  return html`<${Field} label=${label} hint=${hint} type="search" value=${text} autocomplete="off"
    onInput=${(event) => setText(event.target.value)} />`;
}

function List({ pages, what, ...table }) {
  return html`
    ${pages.error?.code === KEYS_OFF
      ? html`<${Empty} title="Nobody is asked for a key"><p>${pages.error.message}</p><//>`
      : html`<${ErrorBox} error=${pages.error} retry=${pages.again} />`}
    ${pages.loading && !pages.rows.length && html`<${Loading} what=${`Looking for ${what}`} />`}
    ${(!pages.loading || pages.rows.length > 0) && !pages.error && html`<${Table} rows=${pages.rows} ...${table} />`}
    ${pages.rows.length > 0 && html`<div class="list-foot">
      <span>${number(pages.rows.length)}${pages.total !== null ? ` of ${number(pages.total)}` : ""} ${what}</span>
      ${pages.more && html`<${Button} busy=${pages.loading} onClick=${pages.next}>Show more<//>`}
    </div>`}`;
}

function Keys({ query, chosen }) {
  const [creating, setCreating] = useState(false);
  const filter = { q: query.get("q") ?? "", tenant: query.get("tenant") ?? "", state: query.get("state") ?? "" };
  const found = asked(filter);
  const pages = usePages(`keys?order=newest&count=true&limit=${PAGE}${found ? `&${found}` : ""}`, (row) => row.id);
  const look = (changed) => go(`tenants?${asked({ ...filter, ...changed })}`, { replace: true });
  const open = (id) => go(`tenants${id ? `/${id}` : ""}${found ? `?${found}` : ""}`);
  const off = pages.error?.code === KEYS_OFF;
  return html`
    <div class="list-filters">
      <${Search} label="Find" hint="Part of a name, an id, a tenant, or the last four characters of the key."
        value=${filter.q} onChange=${(q) => look({ q })} />
      <${Search} label="Tenant" value=${filter.tenant} onChange=${(tenant) => look({ tenant })} />
      <${Select} label="State" options=${STATES} value=${filter.state} onChange=${(state) => look({ state })} />
      ${may("owner") && !off && html`<${Button} kind="primary" onClick=${() => setCreating(true)}>New key<//>`}
    </div>
    ${creating && html`<${Card} title="New key"><${NewKey} tenant=${filter.tenant} onClose=${() => setCreating(false)}
      onMade=${() => { setCreating(false); pages.again(); }} /><//>`}
    ${chosen && html`<${Card} title="Key" aside=${html`<${Button} onClick=${() => open(null)}>Close<//>`}>
      <${KeyDetail} key=${chosen} id=${chosen} onChanged=${pages.again} onGone=${() => { open(null); pages.again(); }} /><//>`}
    <${Card} title="Keys">
      <${List} pages=${pages} what="keys" label="API keys" columns=${KEY_COLUMNS} rowKey=${(row) => row.id}
        selected=${chosen ?? undefined} onOpen=${(row) => open(row.id)}
        empty=${html`<${Empty} title=${found ? "No key matches" : "There are no keys yet"}>
          <p>${found ? "Look for less, or in another state." : NO_KEYS}</p><//>`} />
    <//>`;
}

function Tenants({ query }) {
  const text = query.get("q") ?? "";
  const chosen = query.get("name");
  const pages = usePages(`tenants?limit=${PAGE}${text ? `&q=${encodeURIComponent(text)}` : ""}`, (row) => row.name);
  const show = (changed) => go(`tenants?${asked({ view: "tenants", q: text, name: chosen, ...changed })}`);
  return html`
    <div class="list-filters">
      <${Search} label="Find" hint="Part of a tenant's name." value=${text} onChange=${(q) => show({ q })} />
    </div>
    ${chosen && html`<${Card} title=${chosen} aside=${html`<${Button} onClick=${() => show({ name: "" })}>Close<//>`}>
      <${TenantDetail} key=${chosen} name=${chosen} onChanged=${pages.again}
        onGone=${() => { show({ name: "" }); pages.again(); }} /><//>`}
    <${Card} title="Tenants">
      <${List} pages=${pages} what="tenants" label="Tenants" columns=${TENANT_COLUMNS} rowKey=${(row) => row.name}
        selected=${chosen ?? undefined} onOpen=${(row) => show({ name: row.name })}
        empty=${html`<${Empty} title=${text ? "No tenant matches" : "There are no tenants yet"}>
          <p>${text ? "Look for less." : "A tenant is made with its first key. Those of the configuration alone are not listed here."}</p><//>`} />
    <//>`;
}

export default function TenantsPage() {
  const { rest, query } = useRoute();
  const view = query.get("view") === "tenants" ? "tenants" : "keys";
  const actions = html`<${Tabs} label="What is listed" value=${view} options=${[["keys", "Keys"], ["tenants", "Tenants"]]}
    onChange=${(next) => go(next === "keys" ? "tenants" : "tenants?view=tenants")} />`;
  const lead = view === "keys" ? "Who may send requests, and how many." : html`What is set here goes before what the configuration
    says of the same tenant, field by field. <a href="#limits">Limits</a> shows those in force, of both.`;
  return html`<${Page} title=${title} lead=${lead} actions=${actions}>
    ${view === "keys" ? html`<${Keys} query=${query} chosen=${rest[0] ?? null} />` : html`<${Tenants} query=${query} />`}
  <//>`;
}
