// One tenant: its share of busy pools, its limits, those of its users; disabled, enabled and removed.
import { html } from "../lib/ui.js";
import { del, put } from "../lib/api.js";
import { useData } from "../lib/data.js";
import { notify, notifyError } from "../lib/notify.js";
import { Badge, Button, ErrorBox, Field, Loading, useConfirm } from "../lib/parts.js";
import { may } from "../lib/session.js";
import { EditForm, useEditor } from "./editor.js";
import { LimitFields, limitsChanged, limitsShown } from "./forms.js";

const shownOf = (tenant) => ({
  weight: String(tenant.weight), limits: limitsShown(tenant.limits), user_limits: limitsShown(tenant.user_limits),
});

function changesOf(before, now) {
  const changed = {};
  if (now.weight !== before.weight) changed.weight = now.weight.trim() === "" ? null : Number(now.weight);
  for (const name of ["limits", "user_limits"]) {
    const limits = limitsChanged(before[name], now[name]);
    if (limits) changed[name] = limits;
  }
  return changed;
}

/** One tenant with all that can be done to it. */
export function TenantDetail({ name, onChanged, onGone }) {
  const { data, error, loading, reload, set } = useData(`tenants/${encodeURIComponent(name)}`);
  if (!data) return loading ? html`<${Loading} what="Reading the tenant" />` : html`<${ErrorBox} error=${error} retry=${reload} />`;
  return html`<${TenantEditor} key=${data.name} record=${data} onGone=${onGone}
    onUndone=${() => { reload(); onChanged(); }} onSaved=${(saved) => { set(saved); onChanged(); }} />`;
}

function TenantEditor({ record, onSaved, onUndone, onGone }) {
  const confirm = useConfirm();
  const owner = may("owner");
  const path = `tenants/${encodeURIComponent(record.name)}`;
  const editor = useEditor({ record, path, called: record.name, write: put, shown: shownOf, changes: changesOf, onSaved, onUndone });
  const { values, setValues, error } = editor;

  const turn = async (disabled) => {
    const body = html`<p>None of its ${record.keys} keys lets anybody in while it is disabled. Requests under way go on.</p>`;
    if (disabled && !(await confirm({ title: `Disable ${record.name}?`, body, action: "Disable", danger: true }))) return;
    await editor.turn(disabled);
  };
  const remove = async () => {
    const body = html`<p>Its limits are forgotten. What it has spent stays on record.</p>`;
    if (!(await confirm({ title: `Remove ${record.name}?`, body, action: "Remove", danger: true, typed: record.name }))) return;
    try {
      await del(path, undefined, { version: record.version });
      notify(`Removed ${record.name}.`);
      onGone();
    } catch (refused) {
      notifyError(refused);
    }
  };
  return html`<div class="key-detail">
    <p class="key-line"><${Badge} tone=${record.disabled ? "off" : "good"}>${record.disabled ? "disabled" : "enabled"}<//>
      <a href=${`#tenants?tenant=${encodeURIComponent(record.name)}`}>${record.keys} keys</a>
      ${" · "}<a href=${`#limits?tenant=${encodeURIComponent(record.name)}`}>what is left of its limits</a></p>
    ${Object.keys(record.model_limits).length > 0 && html`<p>Limits by model: <code>${JSON.stringify(record.model_limits)}</code></p>`}
    ${owner && html`<div class="actions">
      ${record.disabled ? html`<${Button} onClick=${() => turn(false)}>Enable<//>` : html`<${Button} onClick=${() => turn(true)}>Disable<//>`}
      <${Button} kind="danger" disabled=${record.keys > 0} title=${record.keys > 0 ? "Revoke its keys first" : undefined} onClick=${remove}>Remove<//>
    </div>`}
    <${EditForm} editor=${editor} owner=${owner}>
      <${Field} label="Weight" hint="Its share of a busy pool; 1 is a tenant like any other." type="number" min="0.01" max="1000" step="any"
        value=${values.weight} error=${error?.param === "weight" ? error.message : null}
        onInput=${(event) => setValues({ ...values, weight: event.target.value })} />
      <${LimitFields} legend="Limits of the tenant as a whole" prefix="limits" values=${values.limits} error=${error}
        onChange=${(limits) => setValues({ ...values, limits })} />
      <${LimitFields} legend="Limits of each of its end users" prefix="user_limits" values=${values.user_limits} error=${error}
        onChange=${(limits) => setValues({ ...values, user_limits: limits })} />
    <//>
  </div>`;
}
