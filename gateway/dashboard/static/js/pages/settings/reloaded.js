// What came of reading the configuration again.
import { html } from "../../lib/ui.js";
import { Button, Card, Table } from "../../lib/parts.js";
import { written } from "./effective.js";

/** The outcome of a reload: what has changed, what waits for a restart, or what is wrong and on which line. */
export function Reloaded({ told, error, onClose }) {
  const close = html`<button type="button" class="plain" onClick=${onClose}>Close</button>`;
  if (error) {
    const problems = error.more?.problems ?? [];
    return html`<${Card} title="Not reloaded" aside=${close}>
      <p class="error" role="alert">${problems.length ? "The configuration cannot be used; the running one stays. Correct this, then reload again:" : error.message}</p>
      <ul class="problems">${problems.map((each) => html`<li key=${`${each.line} ${each.path} ${each.message}`}>
        <code>${each.file}${each.line ? `:${each.line}` : ""}</code> ${each.path && html`<strong>${each.path}</strong>`} ${each.message}${each.hint && html`; <em>${each.hint}</em>`}</li>`)}</ul>
      ${problems.length === 0 && html`<${Button} onClick=${onClose}>Close<//>`}
    <//>`;
  }
  return html`<${Card} title="Reloaded" aside=${close}>
    ${told.changed.length === 0 ? html`<p>Nothing has changed.</p>` : html`<${Table} label="What the reload has changed" rows=${told.changed} rowKey=${(row) => row.path} columns=${[
      { key: "path", label: "Setting", cell: (row) => html`<code>${row.path}</code>` },
      { key: "before", label: "Before", value: (row) => written(row.before), cell: (row) => written(row.before) },
      { key: "after", label: "Now", value: (row) => written(row.after), cell: (row) => written(row.after) },
      { key: "where", label: "From", cell: (row) => row.where || row.origin || "–" },
    ]} />`}
    ${told.more_changed > 0 && html`<p>And ${told.more_changed} more.</p>`}
    ${told.needs_restart.length > 0 && html`<p><strong>Waits for a restart:</strong> ${told.needs_restart.join(", ")}</p>`}
    ${told.overrides_left_out.length > 0 && html`<p><strong>Overrides left out:</strong> ${told.overrides_left_out.map((each) => `${each.name} (${each.problem})`).join(", ")}</p>`}
  <//>`;
}
