// Every effective value, to be searched.
import { html, useMemo, useState } from "../../lib/ui.js";
import { Badge, Card, Empty, Field, Select, Table } from "../../lib/parts.js";

const ORIGINS = [["changed", "All but defaults"], ["", "Everything"], ["file", "File"], ["environment", "Environment"],
  ["command line", "Command line"], ["override", "Changed while running"], ["default", "Defaults"]];
const TONES = { default: "off", file: "good", environment: "info", "command line": "info", override: "warn" };

/** A value as text: JSON, but words without quotes. */
export const written = (value) => value === null || value === undefined ? "null" : typeof value === "string" ? value : JSON.stringify(value);

/** The table of all settings with search; an opened row says what the setting means. */
export function Effective({ rows, descriptions }) {
  const [search, setSearch] = useState("");
  const [origin, setOrigin] = useState("changed");
  const [opened, setOpened] = useState(null);

  const shown = useMemo(() => {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    return rows.filter((row) => {
      const fits = origin === "" || (origin === "changed" ? row.origin !== "default" : row.origin === origin);
      return fits && words.every((word) => `${row.path} ${written(row.value)}`.toLowerCase().includes(word));
    });
  }, [rows, search, origin]);
  const detail = opened && rows.find((row) => row.path === opened);

  return html`<${Card} title="Effective configuration" aside=${`${shown.length} of ${rows.length} settings`} class="effective">
    <div class="settings-tools">
      <${Field} label="Search" type="search" value=${search} placeholder="name or value" onInput=${(event) => setSearch(event.target.value)} />
      <${Select} label="Where from" value=${origin} onChange=${setOrigin} options=${ORIGINS} />
    </div>
    ${detail && html`<aside class="setting-detail" aria-live="polite"><p><code>${detail.path}</code> <button type="button" class="plain" onClick=${() => setOpened(null)}>Close</button></p>
      <p>${descriptions[detail.description]}</p>${detail.where && html`<p class="where">${detail.where}</p>`}</aside>`}
    <${Table} label="Settings" rows=${shown} rowKey=${(row) => row.path} onOpen=${(row) => setOpened(row.path)} selected=${opened ?? undefined} columns=${[
      { key: "path", label: "Setting", cell: (row) => html`<code>${row.path}</code>` },
      { key: "value", label: "Value", value: (row) => written(row.value), cell: (row) => row.secret ? html`<em>${row.value ?? "not set"}</em> (secret)` : html`<span class="value">${written(row.value)}</span>` },
      { key: "origin", label: "From", cell: (row) => html`<${Badge} tone=${TONES[row.origin]}>${row.origin}<//> <span class="where" title=${row.where}>${row.where.split("/").at(-1)}</span>` },
      { key: "restart", label: "Change takes effect", value: (row) => (row.restart ? 1 : 0), cell: (row) => row.waits_for_restart
        ? html`<${Badge} tone="warn">waits for a restart<//>` : row.restart ? "after a restart" : "at a reload" },
    ]} empty=${html`<${Empty} title="Nothing matches">No setting has all of these words in its name or value. “Everything” under Where from shows defaults too.<//>`} />
  <//>`;
}
