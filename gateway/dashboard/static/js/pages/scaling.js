// How many replicas each pool should have, why, who sees to it; a number held by an operator; who launches.
import { html, useEffect, useState } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { useLive } from "../lib/live.js";
import { Card, Empty, ErrorBox, Loading, Page, Table, Time } from "../lib/parts.js";
import { Pool } from "./scaling/pool.js";

export const title = "Scaling";

const LEAD = "How many replicas each pool should have, why, and who sees to it.";
const EXAMPLE = "backends:\n  my-pool:\n    scaling: {max: 8}  # min is 1, provider is none";

export default function ScalingPage() {
  const { data, error, reload } = useData("scaling");
  const live = useLive("scaling");
  const [now, setNow] = useState(null);
  // What came last counts: the answer to a reload, or an event of the stream.
  useEffect(() => { if (data !== null) setNow(data); }, [data]);
  useEffect(() => { if (live !== null) setNow(live); }, [live]);

  if (now === null) {
    return html`<${Page} title=${title} lead=${LEAD}>${error ? html`<${ErrorBox} error=${error} retry=${reload} />` : html`<div aria-busy="true"><${Loading} /></div>`}<//>`;
  }
  return html`<${Page} title=${title} lead=${LEAD}>
    ${error && html`<${ErrorBox} error=${error} retry=${reload} />`}
    ${now.pools.length === 0 && html`<${Card}><${Empty} title="Nobody decides how many replicas there are">
        <p>A pool that is told between how many it may be is shown here, with the number that its requests ask for and the reasons:</p>
        <pre class="example">${EXAMPLE}</pre>
        <p>With the provider <code>none</code> the number is said and nothing is changed: KEDA or an HPA can follow it, at
          <code>/admin/scaling/my-pool</code> or in <code>/metrics</code>. <code>local</code> has <code>tidegate fleet up</code> start and
          stop servers; <code>kubernetes</code>, <code>command</code> and <code>webhook</code> tell others to.</p>
      <//><//>`}
    ${now.pools.map((pool) => html`<${Pool} key=${pool.pool} pool=${pool} onChanged=${reload} />`)}
    ${(now.pools.length > 0 || now.agents.length > 0) && html`<${Agents} agents=${now.agents} />`}
  <//>`;
}

const COLUMNS = [
  { key: "agent", label: "Agent" },
  { key: "pool", label: "Pool", cell: (row) => row.pool ?? "–" },
  { key: "launched", label: "Launched", align: "end" },
  { key: "ready", label: "Ready", align: "end" },
  { key: "max", label: "At most", align: "end" },
  { key: "heard", label: "Heard of", value: (row) => row.heard_unix_s, cell: (row) => row.heard_unix_s === null ? "by another gateway" : html`<${Time} at=${row.heard_unix_s} />` },
];

/** Who starts servers, a row for each of their pools. */
function Agents({ agents }) {
  const rows = agents.flatMap(({ agent, pools, heard_unix_s }) =>
    (pools.length ? pools : [{ pool: null }]).map((each) => ({ ...each, agent, heard_unix_s: heard_unix_s ?? null })));
  return html`<${Card} title="Agents" class="agents" aside=${agents.length > 0 && "who start servers on their machines"}>
    <${Table} label="Agents" columns=${COLUMNS} rows=${rows} rowKey=${(row) => `${row.agent}/${row.pool}`}
      empty=${html`<${Empty} title="No agent">Each machine on which <code>tidegate fleet up</code> runs is a row here: what it has launched, and the most it can.
        They are asked for by the provider <code>local</code>; the others need none.<//>`} /><//>`;
}
