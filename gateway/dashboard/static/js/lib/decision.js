// Why a request went where it went: candidates with the terms of their cost, and who was left out.
import { html, useMemo, useState } from "./ui.js";
import { Badge, Button } from "./parts.js";
import { millis, number } from "./format.js";

const SHOWN = 12;
/** What each term of the cost is, for people. */
export const TERMS = {
  round_trip: "Round trip", wait: "Wait for the batch", prefill: "Compute the prompt", adapter: "Load the adapter",
  others: "Delay to others", copies: "Another copy of the prefix", decode: "Produce the answer",
  pressure: "Full cache", price: "Price", failure: "Risk of failure", warming_and_weight: "Warming up, weight",
  session: "Stays with its session",
};
const REASONS = {
  region: "not in a region it may be served in", already_tried: "had been tried already", draining: "drained",
  cordoned: "cordoned", joining: "new, not found ready yet", warming: "being warmed",
  ejected: "ejected for failures", cooling_down: "cooling down after a failure", full: "full",
  not_ready: "not ready", unresponsive: "does not answer", stalled: "makes no progress", rate_limited: "rate limited",
  context_length: "the prompt is too long for it", credential_refused: "refuses the gateway's key",
  pinned: "another replica was asked for", elsewhere: "the adapter is loaded elsewhere",
};

/** Candidates as stacked bars, one colour a term, with every figure as text beside it. */
function Candidates({ decision }) {
  const [all, setAll] = useState(false);
  const rows = decision.candidates;
  const terms = useMemo(() => {
    const sums = new Map();
    for (const row of rows) {
      for (const [name, value] of Object.entries(row.terms_ms)) sums.set(name, (sums.get(name) ?? 0) + Math.abs(value));
    }
    return [...sums].filter(([, sum]) => sum > 0.0005).sort((left, right) => right[1] - left[1]).map(([name]) => name);
  }, [rows]);
  const whole = (row) => Object.values(row.terms_ms).reduce((sum, value) => sum + Math.max(0, value), 0);
  const most = Math.max(1e-9, ...rows.map(whole));
  const costs = rows.some((row) => row.cost_ms !== null);
  const shown = all ? rows : rows.slice(0, SHOWN);
  const chosenHidden = !shown.some((row) => row.replica === decision.replica);
  const listed = chosenHidden ? [...shown, ...rows.filter((row) => row.replica === decision.replica)] : shown;
  return html`<div class="candidates">
    ${costs && html`<ul class="term-legend" aria-label="Terms of the cost">
      ${terms.map((name, at) => html`<li key=${name}><span class=${`swatch term-${at % 12}`}
        aria-hidden="true"></span> ${TERMS[name] ?? name}</li>`)}
    </ul>`}
    <div class="table-place" tabindex="0" role="region" aria-label="Candidates">
    <table class="terms">
      <caption class="unseen">Candidates, the cheapest first${costs ? ", with each term of their cost" : ""}</caption>
      <thead><tr><th scope="col">Replica</th>${costs && html`<th scope="col" class="end">Cost</th>
        <th scope="col" class="bars">Terms</th><th scope="col" class="end">First token</th>`}
        <th scope="col" class="end">Cached</th><th scope="col" class="end">In flight</th></tr></thead>
      <tbody>${listed.map((row) => html`<tr key=${row.replica}
        class=${row.replica === decision.replica ? "chosen" : ""}>
        <th scope="row">${row.replica} ${row.replica === decision.replica && html`<${Badge} tone="good">chosen<//>`}
          ${decision.near_ties?.includes(row.replica) && html`<${Badge} tone="info"
            title="Between these chance decided">near tie<//>`}
          ${row.despite && html`<${Badge} tone="warn"
            title="There was nobody without a mark">despite ${row.despite}<//>`}</th>
        ${costs && html`<td class="end">${millis(row.cost_ms)}</td>
        <td class="bars"><div class="term-stack" role="img" aria-label=${spoken(row, terms)}>
          ${terms.map((name, at) => row.terms_ms[name] > 0 && html`<span key=${name}
            class=${`term-part term-${at % 12}`}
            title=${`${TERMS[name] ?? name}: ${millis(row.terms_ms[name])}`}
              style=${{ width: `${(row.terms_ms[name] / most) * 100}%` }}></span>`)}
        </div></td><td class="end">${millis(row.ttft_ms)}</td>`}
        <td class="end">${number(row.cached_tokens)}</td><td class="end">${number(row.in_flight)}</td>
      </tr>`)}</tbody>
    </table></div>
    ${rows.length > SHOWN && html`<${Button}
      onClick=${() => setAll(!all)}>${all ? "Show the cheapest" : `Show all ${rows.length}`}<//>`}
    ${costs && html`<details><summary>Every term as a figure</summary>
      <div class="table-place" tabindex="0" role="region" aria-label="Every term as a figure"><table>
        <caption class="unseen">Milliseconds by term and candidate</caption>
        <thead><tr><th scope="col">Term</th>${listed.map((row) => html`<th scope="col" class="end"
          key=${row.replica}>${row.replica}</th>`)}</tr></thead>
        <tbody>${terms.map((name) => html`<tr key=${name}><th scope="row">${TERMS[name] ?? name}</th>
          ${listed.map((row) => html`<td class="end"
            key=${row.replica}>${row.terms_ms[name]?.toFixed(1)} ms</td>`)}</tr>`)}</tbody>
      </table></div></details>`}
  </div>`;
}

const spoken = (row, terms) =>
  terms.filter((name) => Math.abs(row.terms_ms[name] ?? 0) >= 0.05)
    .map((name) => `${TERMS[name] ?? name} ${millis(row.terms_ms[name])}`).join(", ");

function Excluded({ excluded }) {
  const groups = useMemo(() => {
    const found = new Map();
    excluded.forEach((each) => found.set(each.reason, [...(found.get(each.reason) ?? []), each.replica]));
    return [...found].sort((left, right) => right[1].length - left[1].length);
  }, [excluded]);
  if (!excluded.length) return html`<p class="quiet">Nobody was left out.</p>`;
  return html`<ul class="left-out">${groups.map(([reason, names]) => html`<li key=${reason}>
    <${Badge} tone="warn">${reason}<//> <span>${REASONS[reason] ?? ""}</span>${" "}
    <span class="names">${names.slice(0, 20).join(", ")}${names.length > 20 ? ` and ${names.length - 20} more` : ""}</span></li>`)}</ul>`;
}

/** One decision, whole. */
export function Decision({ decision, number: at, of }) {
  return html`<div class="decision">
    ${of > 1 && html`<h3>Decision ${at + 1} of ${of}</h3>`}
    <p><strong>${decision.replica ?? "Nobody"}</strong>${decision.pool ? ` of ${decision.pool}` : ""}, because: <code>${decision.reason}</code>.
      By the policy <code>${decision.policy}</code>, for a prompt of about ${number(decision.prompt_tokens)} tokens,
      of which ${number(decision.predicted_cached_tokens)} were believed to be cached there${decision.predicted_ttft_ms === null ? "" :
        html`; its first token was expected after ${millis(decision.predicted_ttft_ms)}`}.
      ${decision.pinned && html` <${Badge} tone="info">pinned to ${decision.pinned}<//>`}</p>
    ${decision.candidates.length > 0 && html`<${Candidates} decision=${decision} />`}
    <h4>Left out</h4>
    <${Excluded} excluded=${decision.excluded} />
  </div>`;
}

/** All decisions about one request, or why there are none. */
export function Decisions({ decisions, attempts = 1 }) {
  if (!decisions.length) {
    return html`<p class="quiet">${attempts === 0
      ? "It was answered before any replica had to be chosen."
      : "This decision was not kept: at most admin.explained_per_s requests a second are, so that looking costs the "
        + "others nothing. Send it again in the playground, where every decision is kept, or ask tidegate explain."}</p>`;
  }
  return decisions.map((decision, at) => html`<${Decision} key=${at} decision=${decision} number=${at}
    of=${decisions.length} />`);
}
