// A map of the fleet: a box for each region, in it the pools, in them a cell for each replica.
import { html, useEffect, useMemo, useState } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { useLive } from "../lib/live.js";
import { go, useRoute } from "../lib/route.js";
import { number } from "../lib/format.js";
import { Badge, Card, Empty, ErrorBox, Field, Loading, Page, Select, Table, Tabs } from "../lib/parts.js";
import { Cells } from "./fleet/cells.js";
import { Detail } from "./fleet/detail.js";
import { NOWHERE, columns, measures, merge, placed, summary } from "./fleet/model.js";
import { Coming, Sources, startingOf } from "./fleet/sources.js";
import { counted, stateOf } from "./fleet/words.js";

export const title = "Fleet";

const COMPACT_FROM = 40;

export default function FleetPage() {
  const { rest, query } = useRoute();
  const { data, error, reload } = useData("fleet/map");
  const live = useLive("fleet");
  const members = useLive("members");
  const [search, setSearch] = useState("");
  const [measure, setMeasure] = useState("load");
  const view = query.get("view") ?? "map";
  const current = live !== null && data !== null && live.digest === data.digest ? live : data;

  useEffect(() => {
    // Replicas have come or gone, or something that the rows of the stream do not say has changed.
    if (live !== null && data !== null && live.digest !== data.digest) reload();
  }, [live?.digest]);

  const replicas = useMemo(() => (data === null ? [] : merge(data, current)), [data, current]);
  const shown = useMemo(() => {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    return words.length ? replicas.filter((each) => words.every((word) => each.words.includes(word))) : replicas;
  }, [replicas, search]);

  if (data === null) {
    return html`<${Page} title=${title}>${error ? html`<${ErrorBox} error=${error} retry=${reload} />` : html`<div aria-busy="true"><${Loading} /></div>`}<//>`;
  }
  const [pool, replica] = rest;
  const opened = rest.length === 2 ? replicas.find((each) => each.pool === pool && each.replica === replica) : null;
  const open = (each) => go(`fleet/${encodeURIComponent(each.pool)}/${encodeURIComponent(each.replica)}${view === "map" ? "" : `?view=${view}`}`);
  const close = () => go(`fleet${view === "map" ? "" : `?view=${view}`}`);
  const regions = placed(shown);
  const starting = startingOf(members).length;
  const lead = [summary(replicas), starting > 0 && `${counted(starting, "more replica")} ${starting === 1 ? "is" : "are"} starting.`].filter(Boolean).join(" ");

  return html`<${Page} title=${title} lead=${lead}>
    ${error && html`<${ErrorBox} error=${error} retry=${reload} />`}
    ${current.silent_workers.length > 0 && html`<div class="error-box" role="alert">
      <p><strong>Worker ${current.silent_workers.join(", ")} does not answer.</strong> What it has under way is not counted here; it may be starting.</p></div>`}
    ${members !== null && html`<${Coming} members=${members} />`}
    ${replicas.length === 0
      ? html`<${Card}><${Empty} title="No replicas yet">Each URL under <code>backends.<em>name</em>.replicas</code> of the configuration
          becomes a cell here, and so does each replica that its <code>discovery</code> finds, that its <code>launch</code> starts, or that
          registers (<code>tidegate register</code>). Add one and reload the configuration (SIGHUP, or the Settings page).<//><//>`
      : html`<div class="fleet-tools">
          <${Field} label="Search" type="search" value=${search} placeholder="name, pool, region, state, adapter"
            onInput=${(event) => setSearch(event.target.value)} />
          ${view === "map" && html`<${Select} label="Shade by" value=${measure} onChange=${setMeasure}
            options=${Object.entries(measures).map(([key, each]) => [key, each.label])} />`}
          <${Tabs} label="Show as" value=${view} options=${[["map", "Map"], ["table", "Table"]]}
            onChange=${(next) => go(`fleet${rest.map((each) => `/${encodeURIComponent(each)}`).join("")}${next === "map" ? "" : `?view=${next}`}`, { replace: true })} />
          <${Legend} replicas=${replicas} measure=${view === "map" ? measures[measure] : null} />
        </div>
        <div class=${rest.length === 2 ? "fleet with-detail" : "fleet"}>
          <div class="fleet-main">
            ${shown.length === 0 && html`<${Card}><${Empty} title="Nothing matches">No replica has all of these words in its name, pool, region, state or adapters.<//><//>`}
            ${view === "table"
              ? shown.length > 0 && html`<${Card}><${Table} label="Replicas" columns=${columns} rows=${shown} rowKey=${(row) => row.key} onOpen=${open} selected=${opened?.key} /><//>`
              : regions.map(({ region, pools, count, busy }) => html`<${Card} key=${region} class="region" title=${region === NOWHERE ? "No region" : region}
                  aside=${`${number(count)} ${count === 1 ? "replica" : "replicas"}, ${number(busy)} in flight`}>
                  <div class=${replicas.length >= COMPACT_FROM ? "pools compact" : "pools"}>${pools.map((each) => html`<${Cells} key=${each.pool} pool=${each} region=${region} measure=${measure} compact=${replicas.length >= COMPACT_FROM}
                    opened=${opened?.key} onOpen=${open} />`)}</div><//>`)}
          </div>
          ${rest.length === 2 && html`<${Detail} key=${rest.join("/")} pool=${pool} name=${replica} row=${opened} members=${members} onClose=${close} onChanged=${reload} />`}
        </div>`}
    ${members !== null && members.pools.length > 0 && html`<${Sources} members=${members} replicas=${replicas} />`}
  <//>`;
}

/** The states that there are, each with its sign and how many; and what a cell's shade means. */
function Legend({ replicas, measure }) {
  const counts = new Map();
  for (const each of replicas) counts.set(each.kind, (counts.get(each.kind) ?? 0) + 1);
  return html`<div class="legend">
    ${measure && html`<span class="ramp"><span>${measure.low}</span>${[0, 1, 2, 3, 4].map((step) => html`<i key=${step} class=${`shade-${step}`}></i>`)}<span>${measure.high}</span></span>`}
    ${[...counts].map(([kind, count]) => html`<${Badge} key=${kind} tone=${stateOf(kind).tone}>${count} ${stateOf(kind).text}<//>`)}
  </div>`;
}
