// One pool: how many it should have and has, why, and how that came.
import { html, useMemo } from "../../lib/ui.js";
import { dollars, millis, number, percent, seconds, time } from "../../lib/format.js";
import { Badge, Card, Time } from "../../lib/parts.js";
import { Chart } from "../../lib/chart.js";
import { Hold } from "./hold.js";
import { inWords, limitOf, providerOf, reasonOf, replicas, sentence } from "./words.js";

const SHOWN = 5;

/** A pool's card. */
export function Pool({ pool, onChanged }) {
  return html`<${Card} title=${pool.pool} class="scaling" aside=${providerOf(pool.provider)}>
    ${pool.problem && html`<div class="error-box" role="alert"><p><strong>Nothing is changed for now.</strong></p><p class="told">${sentence(pool.problem)}</p></div>`}
    <div class="scaling-parts">
      <div class="scaling-now">
        <${Numbers} pool=${pool} />
        <${Scale} pool=${pool} />
        <${Why} pool=${pool} />
        <${Hold} pool=${pool} onChanged=${onChanged} />
      </div>
      <div class="scaling-then">
        <${Over} pool=${pool} />
        <${Demand} demand=${pool.demand} pool=${pool} />
      </div>
    </div>
    ${pool.provider === "none" && html`<p class="hint">For KEDA or an HPA: the number is <code>wanted</code> of <code>/admin/scaling/${pool.pool}</code>,
      and <code>tidegate_scaling_wanted_replicas</code> in <code>/metrics</code>.</p>`}
  <//>`;
}

function Numbers({ pool }) {
  const { wanted, current } = pool;
  const more = wanted - current;
  const known = pool.decided_unix_s > 0;
  const figure = (value) => (known ? number(value) : "–");
  return html`<dl class="scaling-numbers">
    <div><dt>Wanted</dt><dd>${figure(wanted)}</dd></div>
    <div><dt>There</dt><dd>${figure(current)}</dd></div>
    <div><dt>Ready</dt><dd>${figure(pool.ready)}</dd></div>
    <div><dt>Starting</dt><dd>${figure(pool.starting)}</dd></div>
    <div class="scaling-word"><dt class="unseen">In a word</dt><dd>
      ${!known ? html`<${Badge}>nothing decided yet<//>`
        : more > 0 ? html`<${Badge} tone="warn">${more} more wanted<//>`
        : more < 0 ? html`<${Badge} tone="info">${-more} fewer would do<//>`
        : html`<${Badge} tone="good">as many as wanted<//>`}</dd></div>
  </dl>`;
}

/** From none to the most: those that are ready, those that start, and a mark at what is wanted. */
function Scale({ pool }) {
  const whole = Math.max(pool.max, pool.current, pool.wanted, 1);
  const at = (count) => `${(Math.min(count, whole) / whole) * 100}%`;
  return html`<div class="scale">
    <div class="scale-track" role="img" aria-label=${`Replicas of ${pool.pool}: ${inWords(pool)}`}>
      <i class="scale-ready" style=${{ width: at(pool.ready) }}></i>
      <i class="scale-starting" style=${{ left: at(pool.ready), width: at(pool.starting) }}></i>
      <i class="scale-min" style=${{ left: at(pool.min) }}></i>
      <i class="scale-wanted" style=${{ left: at(pool.wanted) }}></i>
    </div>
    <p class="hint">${inWords(pool)}${pool.ceiling < pool.max ? ` The money allows ${pool.ceiling}.` : ""}</p>
    ${pool.decided_unix_s > 0 && html`<p class="hint">A replica is ready ${seconds(pool.lead_time_s)} after its order. ${pool.usd_per_hour
      ? `What is wanted costs ${dollars(pool.usd_per_hour)} an hour.` : html`What it costs is not known: set <code>usd_per_hour</code>.`}</p>`}
  </div>`;
}

function Why({ pool }) {
  const reasons = [...pool.reasons].sort((left, right) => right.wanted - left.wanted);
  const limit = limitOf(pool.limited_by);
  return html`<section aria-label=${`Why ${pool.pool} should have ${pool.wanted}`}>
    <h3>Why</h3>
    ${reasons.length === 0 && html`<p class="hint">Nothing has been asked of this pool since the gateway began, or no worker has told of it yet.</p>`}
    <ol class="reasons">${reasons.map((each, place) => html`<li key=${`${each.kind}/${place}`}>
      <span class="reason-wanted">${each.kind === "spill" ? "" : replicas(each.wanted)}</span>
      <span class="told"><b>${reasonOf(each.kind)}.</b> ${each.kind === "hold" ? `${each.text}.` : sentence(each.text)}</span></li>`)}</ol>
    ${limit && html`<p><${Badge} tone="info">limited<//> ${limit[0]} ${limit[1] && html`<code>${limit[1]}</code>`}</p>`}
    ${pool.leaving.length > 0 && html`<p>${pool.leaving.map((each) => `${each.replica} ${each.told ? "goes" : "ends what it has, and goes then"}`).join("; ")}.</p>`}
    <p class="hint">${pool.acting ? html`Decided by this gateway <${Time} at=${pool.decided_unix_s || null} />.` : "Another gateway decides for this pool, or none yet; this is what it has said."}</p>
  </section>`;
}

/** Wanted and there, over time: each change, and now. */
function Over({ pool }) {
  const { times, series } = useMemo(() => {
    const points = [...pool.history].reverse();
    const last = points.at(-1)?.unix_s ?? 0;
    if (pool.decided_unix_s > last) points.push({ unix_s: pool.decided_unix_s, wanted: pool.wanted, current: pool.current });
    return {
      times: points.map((each) => each.unix_s),
      // Where both are the same, the dashes show that there are two.
      series: [{ label: "There", values: points.map((each) => each.current) }, { label: "Wanted", values: points.map((each) => each.wanted), colour: "--series-3", dash: [8, 6] }],
    };
  }, [pool]);
  return html`<div>
    <${Chart} title="Replicas wanted and there" kind="steps" times=${times} series=${series} format=${(value) => (Number.isInteger(value) ? number(value) : "")}
      empty="Each change of the number is a step here; there was none yet." />
    ${pool.history.length > 0 && html`<details class="changes"><summary>Last changes</summary>
      <ol>${pool.history.slice(0, SHOWN).map((each) => html`<li key=${each.unix_s}><time>${time(each.unix_s)}</time>
        <span class="told">${each.wanted} wanted, ${each.current} there. ${sentence(each.why)}</span></li>`)}</ol></details>`}
  </div>`;
}

function Demand({ demand, pool }) {
  if (demand === null) return html`<p class="hint">No worker has told yet what this pool is asked for; they do so every two seconds.</p>`;
  const per = (value, what) => `${number(value)} ${what}/s`;
  const facts = [
    ["Requests that come", per(demand.arrivals_per_s, "requests")],
    ["Foreseen for when a new replica is ready", per(pool.forecast_per_s, "requests")],
    ["Tokens that come", demand.arrival_tokens_per_s ? per(demand.arrival_tokens_per_s, "tokens") : "not known"],
    ["Tokens served", per(demand.tokens_per_s, "tokens")],
    ["Under way", number(demand.in_flight)],
    ["Waiting in gateways", number(demand.waiting)],
    ["Wait, nine of ten within", seconds(demand.queue_wait_p90_s)],
    ["First token, nine of ten within", millis(demand.ttft_p90_ms)],
    ["First token of the next request", millis(demand.predicted_ttft_ms)],
    ["KV cache in use", percent(demand.kv_use, 0)],
    ["At once, a replica", demand.capacity_requests === null ? "not known" : number(demand.capacity_requests)],
    ["Unwell", number(demand.replicas_unhealthy)],
    ["To rented replicas", demand.spilled_per_s ? `${per(demand.spilled_per_s, "requests")}, ${dollars(demand.spill_usd_per_hour)} an hour` : "nothing"],
  ];
  return html`<section aria-label=${`What ${pool.pool} is asked for`}>
    <h3>What it is asked for ${!demand.complete && html`<${Badge} tone="warn">not every worker has told<//>`}</h3>
    <dl class="demand">${facts.map(([term, text]) => html`<div key=${term}><dt>${term}</dt><dd>${text}</dd></div>`)}</dl>
  </section>`;
}
