// Policies compared on the last requests, by simulation.
import { html, useState } from "../../lib/ui.js";
import { del, post } from "../../lib/api.js";
import { millis, number, percent, seconds } from "../../lib/format.js";
import { notifyError } from "../../lib/notify.js";
import { may } from "../../lib/session.js";
import { Badge, Bar, Button, Card, Empty, Field, Select, Table } from "../../lib/parts.js";

const FIRST = ["least_outstanding", "round_robin"];

/** The card with its form, and the last comparison. */
export function Compare({ models, policies, job, reload }) {
  const [model, setModel] = useState(models[0].name);
  const [wanted, setWanted] = useState(1000);
  const [ticked, setTicked] = useState(null);
  const current = models.find((each) => each.name === model) ?? models[0];
  const chosen = ticked ?? new Set([current.policy, ...FIRST]);
  const running = job?.state === "running";

  const tick = (name) => {
    const next = new Set(chosen);
    if (!next.delete(name)) next.add(name);
    setTicked(next);
  };
  const run = async () => {
    try {
      await post("policies/compare", { model: current.name, policies: [...chosen], requests: Number(wanted) });
      await reload();
    } catch (error) {
      notifyError(error);
    }
  };
  const cancel = async () => {
    try {
      await del("policies/compare");
      await reload();
    } catch (error) {
      notifyError(error);
    }
  };

  return html`<${Card} title="Compare on recent traffic" class="compare">
    <p class="hint">The last requests are played again through simulated engines, as fast as this gateway has found its
      own to be; those for LoRA adapters are left out. No request is sent, and no text was kept: only times, lengths and
      keys of beginnings.</p>
    ${may("operator") && html`<form onSubmit=${(event) => { event.preventDefault(); run(); }}>
      <div class="compare-form">
        <${Select} label="Model" value=${current.name} onChange=${setModel} options=${models.map((each) => [each.name, `${each.name} (${number(each.recent_requests)} requests known)`])} />
        <${Field} label="Last requests" type="number" min="50" max="4096" value=${wanted} onInput=${(event) => setWanted(event.target.value)} />
      </div>
      <fieldset class="policy-ticks"><legend>Policies, 8 at most</legend>
        ${policies.map((each) => html`<label key=${each.name}><input type="checkbox" checked=${chosen.has(each.name)} disabled=${!chosen.has(each.name) && chosen.size >= 8}
          onChange=${() => tick(each.name)} /> ${each.name}</label>`)}
      </fieldset>
      <div class="actions">
        <${Button} kind="primary" type="submit" disabled=${running || chosen.size === 0}>Compare<//>
        ${running && html`<${Button} onClick=${cancel}>Cancel<//>`}
      </div>
    </form>`}
    ${job ? html`<${Job} job=${job} />` : html`<${Empty} title="Nothing compared yet">Choose policies and compare them: time to first token and cache hits of each would be shown here.<//>`}
  <//>`;
}

function Job({ job }) {
  if (job.state === "running") {
    return html`<div role="status"><p>Simulating ${job.policies.length} policies for ${job.model}: ${job.done} of ${job.of} runs.</p>
      <${Bar} value=${job.of ? job.done / job.of : 0} label="Progress of the comparison" text=${`${job.done} of ${job.of} runs`} /></div>`;
  }
  if (job.state !== "done") {
    return html`<p class="error" role="status">${job.state === "cancelled" ? "The comparison was cancelled." : `No result: ${job.error}.`}</p>`;
  }
  const rows = job.policies.map((policy) => ({ policy, figures: job.result[policy] }));
  const column = (key, label, format) => ({
    key, label, align: "end", value: (row) => row.figures[key].mean,
    cell: (row) => html`<span title=${`${format(row.figures[key].least)} to ${format(row.figures[key].most)}`}>${format(row.figures[key].mean)}</span>`,
  });
  return html`<div class="compare-result">
    <h3>${job.model}, on ${number(job.requests)} requests of ${seconds(job.span_s)}</h3>
    <${Table} label=${`Policies compared for ${job.model}`} rows=${rows} rowKey=${(row) => row.policy} sort=${["ttft_ms", 1]} columns=${[
      { key: "policy", label: "Policy", cell: (row) => html`${row.policy} ${row.policy === job.in_force && html`<${Badge} tone="info">in force<//>`}` },
      column("ttft_ms", "TTFT mean", millis), column("ttft_p99_ms", "TTFT p99", millis),
      column("hit_rate", "Cache hits", percent), column("total_ms", "End to end", millis),
    ]} />
    <p>Measured of the same requests, by ${job.in_force}: TTFT ${millis(job.measured.ttft_ms)} in the mean, p99 ${millis(job.measured.ttft_p99_ms)}${" "}
      (${number(job.measured.with_ttft)} streamed), cache hits ${percent(job.measured.hit_rate)}.</p>
    <details open><summary>What these figures do not know</summary>
      <ul>${job.caveats.map((each) => html`<li key=${each}>${each}</li>`)}</ul></details>
  </div>`;
}
