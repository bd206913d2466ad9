// What happened when, drawn to scale.
import { html } from "./ui.js";
import { millis } from "./format.js";

const NAMES = {
  read: "Read", queue: "Queue", decide: "Decide", connect: "Connect", first_token: "First token", answer: "Answer",
  stream: "Stream", pause: "Pause", end: "End",
};

/** The phases of a request (`timeline` of the admin API) as bars below one another, with their figures. */
export function Timeline({ timeline }) {
  const total = Math.max(timeline.duration_ms, 0.001);
  const attempts = timeline.attempts;
  return html`<table class="req-timeline">
    <caption class="unseen">Phases of the request, ${millis(timeline.duration_ms)} in all</caption>
    <colgroup><col class="tl-name" /><col /><col class="tl-took" /></colgroup>
    <thead><tr><th scope="col"><span class="unseen">Phase</span></th><th scope="col"><span
      class="unseen">From and to</span></th>
      <th scope="col"><span class="unseen">Duration</span></th></tr></thead>
    <tbody>${timeline.phases.map((phase, at) => {
      const end = phase.end_ms ?? timeline.duration_ms;
      const took = end - phase.start_ms;
      const replica = phase.attempt === null ? "" : attempts[phase.attempt].replica;
      const left = Math.min(99.5, (phase.start_ms / total) * 100);
      const width = Math.max(0.4, Math.min(100 - left, (took / total) * 100));
      return html`<tr key=${at} class=${phase.end_ms === null ? "open" : ""}>
        <th scope="row">${NAMES[phase.name] ?? phase.name}${replica && html` <span
          class="quiet">${replica}</span>`}</th>
        <td class="tl-track"><div class=${`tl-span phase-${phase.name}`}
          title=${`${millis(phase.start_ms)} to ${millis(end)}`}
          style=${{ marginLeft: `${left}%`, width: `${width}%` }}></div></td>
        <td class="end">${millis(took)}${phase.end_ms === null ? " so far" : ""}</td>
      </tr>`;
    })}</tbody>
  </table>`;
}

/** Each replica that was asked, with its times and what ended it. */
export function Attempts({ attempts }) {
  if (!attempts.length) return html`<p class="quiet">No replica was asked.</p>`;
  return html`<div class="table-place" tabindex="0" role="region" aria-label="Attempts"><table>
    <caption class="unseen">Attempts</caption>
    <thead><tr><th scope="col">Attempt</th><th scope="col">Replica</th><th scope="col">Why there</th><th scope="col"
      class="end">Begun</th>
      <th scope="col" class="end">Sent</th><th scope="col" class="end">First token</th><th scope="col"
        class="end">Ended</th><th scope="col">Came to</th></tr></thead>
    <tbody>${attempts.map((each, at) => html`<tr
      key=${at}><td>${at + 1}</td><td>${each.pool}/${each.replica}</td><td><code>${each.reason}</code></td>
      <td class="end">${millis(each.begun_ms)}</td><td class="end">${millis(each.sent_ms)}</td><td
        class="end">${millis(each.first_content_ms)}</td>
      <td class="end">${millis(each.ended_ms)}</td><td>${each.code ?? (each.ended_ms === null ? "under way" : "answered")}</td></tr>`)}</tbody>
  </table></div>`;
}
