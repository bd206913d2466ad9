// What operators have changed over file and environment.
import { html } from "../../lib/ui.js";
import { del, patch, post } from "../../lib/api.js";
import { may } from "../../lib/session.js";
import { steer } from "../../lib/steering.js";
import { Badge, Button, Card, Empty, Table, Time, useConfirm } from "../../lib/parts.js";
import { written } from "./effective.js";

/** The overrides in force with their undoing, and the versions before. */
export function Overrides({ data, reload }) {
  const confirm = useConfirm();
  const { overrides, history, version, changeable } = data;
  const allowed = (row) => may(row.owner_only ? "owner" : "operator");

  const drop = (row) => steer((of) => patch("overrides", { drop: [row.path] }, { version: of }), version, `Taken back: ${row.name}`, reload);
  const dropAll = async () => {
    const body = html`<p>File and environment alone are in force then. ${overrides.length} ${overrides.length === 1 ? "setting goes" : "settings go"} back to what they say.</p>`;
    if (!await confirm({ title: "Take back all overrides?", body, action: "Take back all", danger: true })) return;
    await steer((of) => del("overrides", undefined, { version: of }), version, "All overrides are taken back.", reload);
  };
  const restore = async (edition) => {
    const body = html`<p>The overrides become what they were before “${edition.change}”: ${edition.overrides} of them. What was changed since is taken back.</p>`;
    if (!await confirm({ title: `Restore version ${edition.version}?`, body, action: "Restore" })) return;
    await steer((of) => post("overrides/restore", { version: edition.version }, { version: of }), version, `Version ${edition.version} is in force again.`, reload);
  };

  return html`<${Card} title="Changed while running" class="overrides" aside=${overrides.length > 0 && may("operator") && html`<${Button} onClick=${dropAll}>Take back all<//>`}>
    <${Table} label="Overrides" rows=${overrides} rowKey=${(row) => row.name} columns=${[
      { key: "name", label: "Setting", cell: (row) => html`<code>${row.name}</code> ${!row.in_force && html`<${Badge} tone="warn" title=${row.problem}>not in force<//>`}${row.problem && html`<p class="hint">${row.problem}</p>`}` },
      { key: "value", label: "Now", value: (row) => written(row.value), cell: (row) => written(row.value) },
      { key: "base", label: "Without it", value: (row) => written(row.base), cell: (row) => written(row.base) },
      { key: "by", label: "By" },
      { key: "at", label: "When", value: (row) => row.at_unix_s, cell: (row) => html`<${Time} at=${row.at_unix_s} />` },
      { key: "undo", label: "Undo", sortable: false, cell: (row) => allowed(row) ? html`<button type="button" class="plain" aria-label=${`Take back ${row.name}`} onClick=${() => drop(row)}>Take back</button>` : "–" },
    ]} empty=${html`<${Empty} title="Nothing is changed">Weights, prices, policies and some thresholds can be changed while the gateway runs: on the pages Fleet and Policies,
      with <code>tidegate weight</code>, <code>price</code> and <code>policy</code>, or over the admin API. They are listed here then, and can be taken back.<//>`} />
    ${history.length > 0 && html`<details><summary>Versions before (${history.length})</summary>
      <${Table} label="Versions of the overrides" rows=${history} rowKey=${(row) => String(row.version)} columns=${[
        { key: "version", label: "Version", align: "end" },
        { key: "overrides", label: "Overrides", align: "end" },
        { key: "change", label: "Ended by the change" },
        { key: "ended_by", label: "Of" },
        { key: "ended", label: "When", value: (row) => row.ended_unix_s, cell: (row) => html`<${Time} at=${row.ended_unix_s} />` },
        { key: "restore", label: "Restore", sortable: false, cell: (row) => may("operator") ? html`<button type="button" class="plain" aria-label=${`Restore version ${row.version}`} onClick=${() => restore(row)}>Restore</button>` : "–" },
      ]} /></details>`}
    <details><summary>What can be changed while it runs</summary>
      <ul class="changeable">${changeable.map((each) => html`<li key=${each.path}><code>${each.path}</code> ${each.what}${each.owner_only && " (owners only)"}</li>`)}</ul></details>
  <//>`;
}
