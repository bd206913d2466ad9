// One model: the policy in force, and the one in its shadow.
import { html, useState } from "../../lib/ui.js";
import { del, put } from "../../lib/api.js";
import { millis, number, percent } from "../../lib/format.js";
import { may } from "../../lib/session.js";
import { modelPath, steer } from "../../lib/steering.js";
import { Badge, Bar, Button, Card, Grid, Select, Stat, Table, Time, useConfirm } from "../../lib/parts.js";

/** A model's card. */
export function Model({ model, policies, version, reload }) {
  const confirm = useConfirm();
  const path = `models/${modelPath(model.name)}`;

  const turn = async (policy) => {
    const body = html`<p>From now on <strong>${policy}</strong> chooses the replicas of <strong>${model.name}</strong>, in place of <strong>${model.policy}</strong>.
      Requests under way end where they are. It holds until you take it back, over restarts too.</p>`;
    if (!await confirm({ title: `Switch ${model.name} to ${policy}?`, body, action: "Switch" })) return;
    await steer((of) => put(`${path}/policy`, { policy }, { version: of }), version, `${model.name} goes by ${policy} now.`, reload);
  };
  const back = () => steer((of) => del(`${path}/policy`, undefined, { version: of }), version, `${model.name} goes by the configured policy again.`, reload);

  return html`<${Card} title=${model.name} class="policy-model"
      aside=${`${model.backend}, ${number(model.replicas)} ${model.replicas === 1 ? "replica" : "replicas"}, ${number(model.recent_requests)} recent requests`}>
    <p class="in-force">Policy in force: <strong>${model.policy}</strong>
      ${model.overridden && html` <${Badge} tone="info">changed here<//> ${may("operator") && html`<button type="button" class="plain" onClick=${back}>Take back</button>`}`}
      <span class="what">${policies.find((each) => each.name === model.policy)?.what}</span></p>
    ${may("operator") && html`<${Choose} label=${`Policy for ${model.name}`} action="Switch" policies=${policies} not=${model.policy} onChoose=${turn} />`}
    <${Shadow} model=${model} policies=${policies} version=${version} reload=${reload} path=${path} onSwitch=${turn} />
  <//>`;
}

/** A list of policies with a button. */
function Choose({ label, action, policies, not, onChoose }) {
  const others = policies.filter((each) => each.name !== not);
  const [chosen, setChosen] = useState(null);
  const usual = ["cost", "least_outstanding"].find((name) => name !== not);
  const policy = others.some((each) => each.name === chosen) ? chosen : usual;
  return html`<div class="policy-choose">
    <${Select} label=${label} value=${policy} onChange=${setChosen} options=${others.map((each) => [each.name, each.what ? `${each.name}: ${each.what}` : each.name])} />
    <${Button} onClick=${() => onChoose(policy)}>${action}<//>
  </div>`;
}

/** What the second policy would have done, or a way to start one. */
function Shadow({ model, policies, version, reload, path, onSwitch }) {
  const { shadow } = model;
  const start = (policy) => steer((of) => put(`${path}/shadow`, { policy }, { version: of }), version, `${policy} decides in the shadow of ${model.name} now.`, reload);
  const end = () => steer((of) => put(`${path}/shadow`, { policy: null }, { version: of }), version, `${model.name} has no shadow any more.`, reload);
  if (!shadow) {
    return html`<div class="shadow">
      <h3>Shadow</h3>
      <p class="hint">None. A shadow policy decides about some of the requests too, and sends nothing: here you would see where it would have sent them.</p>
      ${may("operator") && html`<${Choose} label=${`Shadow for ${model.name}`} action="Start shadow" policies=${policies} not=${model.policy} onChoose=${start} />`}
    </div>`;
  }
  const { numbers } = shadow;
  return html`<div class="shadow">
    <h3>Shadow: ${shadow.policy}</h3>
    <p class="hint">Since <${Time} at=${shadow.began_unix_s} />: asked about ${number(numbers.compared)} requests${" "}
      (${number(shadow.per_s)} a second at most in each worker, ${number(numbers.passed_over)} passed over), after each was sent;${" "}
      ${number(shadow.decide_us)} µs each. Both choices are measured by the same prediction.</p>
    ${numbers.failed > 0 && html`<p class="error">It failed ${number(numbers.failed)} times; the log says why.</p>`}
    <${Grid} min="11rem">
      <${Stat} label="Same replica" value=${percent(shadow.agreement)} note=${`of ${number(numbers.compared)} requests`} />
      <${Stat} label="Predicted TTFT" value=${millis(shadow.ttft_ms.shadow)} note=${`in force: ${millis(shadow.ttft_ms.real)}`} />
      <${Stat} label="Prompt tokens cached" value=${percent(shadow.cached_share.shadow)} note=${`in force: ${percent(shadow.cached_share.real)}`} />
    <//>
    ${numbers.compared > 0 && html`<${Went} model=${model} numbers=${numbers} />`}
    ${may("operator") && html`<div class="actions">
      <${Button} kind="primary" onClick=${() => onSwitch(shadow.policy)}>Switch to ${shadow.policy}<//>
      <${Button} onClick=${end}>End shadow<//>
    </div>`}
  </div>`;
}

function Went({ model, numbers }) {
  const share = (count) => (count ?? 0) / numbers.compared;
  const rows = [...new Set([...Object.keys(numbers.went), ...Object.keys(numbers.would_go)])].sort()
    .map((replica) => ({ replica, went: share(numbers.went[replica]), would: share(numbers.would_go[replica]) }));
  const bar = (value, what) => html`<div class="share-cell"><span>${percent(value)}</span><${Bar} value=${value} label=${what} text=${percent(value)} /></div>`;
  return html`<${Table} label=${`Where requests for ${model.name} went, and would have gone`} rows=${rows} rowKey=${(row) => row.replica} columns=${[
    { key: "replica", label: "Replica" },
    { key: "went", label: "Went there", value: (row) => row.went, cell: (row) => bar(row.went, `Went to ${row.replica}`) },
    { key: "would", label: "Would have gone", value: (row) => row.would, cell: (row) => bar(row.would, `Would have gone to ${row.replica}`) },
  ]} />`;
}
