// Who did what, when. Everything in an entry is text that somebody else has chosen; it is shown as text.
import { html, useEffect, useState } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { time } from "../lib/format.js";
import { Badge, Button, Card, Empty, ErrorBox, Field, Loading, Page, Select, Table, Time } from "../lib/parts.js";
import { go, useRoute } from "../lib/route.js";

export const title = "Audit";

const PAGE = 50;
const FILTERS = ["actor", "action", "object"];
const ACTIONS = [
  ["", "Everything"], ["key.", "Keys"], ["tenant.", "Tenants"], ["replica.", "Replicas"], ["adapter.", "Adapters"],
  ["override", "Overrides"], ["policy", "Policies"], ["price", "Prices"], ["reload", "Reloads"], ["request.", "Requests"],
  ["login", "Logins"], ["logout", "Logouts"], ["sessions.", "Sessions"],
];
const GRAVE = /\.(remove|revoke|kill|failed|delete|unload)$|^sessions\.end$/;

const isChange = (value) => Array.isArray(value) && value.length === 2;

function shown(value) {
  if (value === null || value === undefined) return "nothing";
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** One line on what changed. */
function summary(diff) {
  const parts = Object.entries(diff).map(([name, value]) =>
    isChange(value) ? `${name}: ${shown(value[0])} → ${shown(value[1])}` : `${name}: ${shown(value)}`);
  const text = parts.join(", ");
  return text.length > 120 ? `${text.slice(0, 119)}…` : text || "–";
}

function Diff({ diff }) {
  const rows = Object.entries(diff);
  if (!rows.length) return html`<p class="lead">The entry says no more than its action and its object.</p>`;
  return html`<div class="table-place"><table class="diff">
    <caption class="unseen">What changed</caption>
    <thead><tr><th scope="col">Field</th><th scope="col">Before</th><th scope="col">After</th></tr></thead>
    <tbody>${rows.map(([name, value]) => html`<tr key=${name}>
      <th scope="row">${name}</th>
      ${isChange(value)
        ? html`<td><del>${shown(value[0])}</del></td><td><ins>${shown(value[1])}</ins></td>`
        : html`<td colspan="2">${shown(value)}</td>`}
    </tr>`)}</tbody>
  </table></div>`;
}

function Entry({ entry, onClose }) {
  return html`<${Card} title=${`Entry ${entry.id}`} aside=${html`<${Button} onClick=${onClose}>Close<//>`}>
    <dl class="entry">
      <dt>When</dt><dd>${time(entry.time_unix_s)}</dd>
      <dt>Who</dt><dd><code>${entry.actor}</code></dd>
      <dt>What</dt><dd><code>${entry.action}</code></dd>
      <dt>To what</dt><dd><code>${entry.object}</code></dd>
    </dl>
    <${Diff} diff=${entry.diff} />
  <//>`;
}

function Warnings({ missing, unwritten }) {
  if (!missing.length && !unwritten) return null;
  return html`<div class="error-box" role="alert">
    ${missing.length > 0 && html`<p><strong>Entries are missing.</strong> ${" "}
      ${missing.slice(0, 10).map(([first, last]) => first === last ? `${first}` : `${first} to ${last}`).join(", ")}
      ${missing.length > 10 ? " and more" : ""}: they were written, and somebody with access to the database took them out.</p>`}
    ${unwritten > 0 && html`<p><strong>${unwritten} ${unwritten === 1 ? "entry is" : "entries are"} not in the database.</strong>
      The gateway tries again with the next one; its log has them, and says why.</p>`}
  </div>`;
}

function Filters({ query }) {
  const [wanted, setWanted] = useState(query);
  useEffect(() => setWanted(query), [query.actor, query.action, query.object]);
  const apply = (next) => {
    const chosen = new URLSearchParams(FILTERS.filter((each) => next[each]?.trim()).map((each) => [each, next[each].trim()]));
    go(`audit${chosen.size ? `?${chosen}` : ""}`);
  };
  const known = ACTIONS.some(([value]) => value === (wanted.action ?? ""));
  const actions = known ? ACTIONS : [...ACTIONS, [wanted.action, wanted.action]];
  const set = (name) => (event) => setWanted({ ...wanted, [name]: event.target.value });
  return html`<form class="audit-filters" aria-label="Which entries" onSubmit=${(event) => { event.preventDefault(); apply(wanted); }}>
    <${Select} label="Action" options=${actions} value=${wanted.action ?? ""}
      onChange=${(action) => { setWanted({ ...wanted, action }); apply({ ...wanted, action }); }} />
    <${Field} label="Actor" type="search" placeholder="any" value=${wanted.actor ?? ""} onInput=${set("actor")} />
    <${Field} label="Object" type="search" placeholder="any" value=${wanted.object ?? ""} onInput=${set("object")} />
    <${Button} type="submit">Filter<//>
    ${FILTERS.some((each) => query[each]) && html`<${Button} onClick=${() => go("audit")}>Show everything<//>`}
  </form>`;
}

const COLUMNS = [
  { key: "time", label: "When", value: (row) => row.time_unix_s, cell: (row) => html`<${Time} at=${row.time_unix_s} />` },
  { key: "actor", label: "Who", cell: (row) => html`<span class="cut">${row.actor}</span>` },
  { key: "action", label: "What", cell: (row) => html`<${Badge} tone=${GRAVE.test(row.action) ? "warn" : "off"}>${row.action}<//>` },
  { key: "object", label: "To what", cell: (row) => html`<span class="cut">${row.object}</span>` },
  { key: "diff", label: "Change", sortable: false, cell: (row) => html`<span class="cut wide">${summary(row.diff)}</span>` },
];

export default function AuditPage() {
  const { query } = useRoute();
  const chosen = Object.fromEntries(FILTERS.filter((each) => query.get(each)).map((each) => [each, query.get(each)]));
  const key = JSON.stringify(chosen);
  const [pages, setPages] = useState({ key, before: [] });
  const before = pages.key === key ? pages.before : [];
  const [open, setOpen] = useState(null);
  const asked = new URLSearchParams({ limit: PAGE, ...chosen, ...(before.length ? { before: before.at(-1) } : {}) });
  const { data, error, loading, reload } = useData(`audit?${asked}`);
  const turn = (next) => { setOpen(null); setPages({ key, before: next }); };

  return html`<${Page} title=${title} lead="Who did what, and when. Entries can be added, and not changed."
      actions=${html`<${Button} onClick=${reload} busy=${loading && data !== null}>Refresh<//>`}>
    <${Filters} query=${chosen} />
    ${error && html`<${ErrorBox} error=${error} retry=${reload} />`}
    ${!data && !error && html`<${Loading} what="Reading the audit" />`}
    ${data && html`
      <${Warnings} missing=${data.missing} unwritten=${data.unwritten} />
      ${open && html`<${Entry} entry=${open} onClose=${() => setOpen(null)} />`}
      <${Card} title=${before.length ? "Older entries" : "Newest entries"}>
        <${Table} label="Audit entries, newest first" columns=${COLUMNS} rows=${data.data} rowKey=${(row) => String(row.id)}
          onOpen=${setOpen} selected=${open ? String(open.id) : undefined}
          empty=${key === "{}"
            ? html`<${Empty} title="Nobody has done anything yet">Keys, tenants, drains, overrides, reloads and logins appear
                here as they happen: drain a replica on the <a href="#fleet">fleet page</a>, or run <code>tidegate keys create</code>.<//>`
            : html`<${Empty} title="No entry is like that">Names are looked for in any part, actions from their beginning.<//>`} />
        <nav class="audit-pages" aria-label="Pages of the audit">
          <${Button} disabled=${!before.length} onClick=${() => turn(before.slice(0, -1))}>Newer<//>
          <${Button} disabled=${!data.has_more} onClick=${() => turn([...before, String(data.data.at(-1).id)])}>Older<//>
        </nav>
      <//>`}
  <//>`;
}
