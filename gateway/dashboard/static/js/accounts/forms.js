// Forms of keys and tenants: what the admin API holds as text in fields, and back. Only what was changed is sent.
import { html } from "../lib/ui.js";
import { Field, Select } from "../lib/parts.js";

export const CLASSES = ["critical", "standard", "batch", "sheddable"];
export const AMOUNTS = [
  ["requests_per_minute", "Requests a minute"],
  ["tokens_per_minute", "Tokens a minute"],
  ["input_tokens_per_minute", "Prompt tokens a minute"],
  ["output_tokens_per_minute", "Output tokens a minute"],
  ["concurrent_requests", "Requests at once"],
  ["usd_per_day", "Dollars a day"],
  ["usd_per_month", "Dollars a month"],
  ["burst_s", "Burst, in seconds' worth"],
];
export const SWITCHES = [
  ["shadow", "Shadow: count, refuse nobody"],
  ["hard_tokens", "Hard: reserve the most a request can use"],
  ["strict_window", "Strict: never more in any minute"],
];

const ANSWERS = [["", "default"], ["true", "yes"], ["false", "no"]];
const text = (value) => value === null || value === undefined ? "" : String(value);
const listed = (values) => values ? values.join(", ") : "";

/** Values of a set of limits as its fields have them. */
export const limitsShown = (limits) =>
  Object.fromEntries([...AMOUNTS, ...SWITCHES].map(([name]) => [name, text(limits?.[name])]));

/** What has been changed in a set of limits: `{ requests_per_minute: 60, usd_per_day: null }`; null where nothing was. */
export function limitsChanged(before, now) {
  const changed = {};
  for (const [name] of AMOUNTS) {
    if (now[name] !== before[name]) changed[name] = now[name].trim() === "" ? null : Number(now[name]);
  }
  for (const [name] of SWITCHES) {
    if (now[name] !== before[name]) changed[name] = now[name] === "" ? null : now[name] === "true";
  }
  return Object.keys(changed).length ? changed : null;
}

/** "chat, code" → ["chat", "code"]; null where nothing is written. */
export function names(value) {
  const found = value.split(/[\s,]+/).filter(Boolean);
  return found.length ? found : null;
}

/** A key as the fields of its form have it. */
export const keyShown = (key) => ({
  tenant: key?.tenant ?? "",
  name: key?.name ?? "",
  models: listed(key?.models),
  adapters: listed(key?.adapters),
  regions: listed(key?.regions),
  class: key?.class ?? "standard",
  expires: key?.expires ?? "",
  deadline_ms: text(key?.deadline_ms),
  max_output_tokens: text(key?.max_output_tokens),
  limits: limitsShown(key?.limits),
});

/** What has been changed of a key, as the admin API takes it. */
export function keyChanges(before, now) {
  const changed = {};
  for (const name of ["tenant", "name", "class"]) if (now[name] !== before[name]) changed[name] = now[name].trim();
  for (const name of ["models", "adapters", "regions"]) if (now[name] !== before[name]) changed[name] = names(now[name]);
  if (now.expires !== before.expires) changed.expires = now.expires.trim() || null;
  for (const name of ["deadline_ms", "max_output_tokens"]) {
    if (now[name] !== before[name]) changed[name] = now[name].trim() === "" ? null : Number(now[name]);
  }
  const limits = limitsChanged(before.limits, now.limits);
  return limits ? { ...changed, limits } : changed;
}

/** The fields of a set of limits. `error` is a refusal of the gateway, shown beside the field that it names. */
export function LimitFields({ legend, prefix, values, onChange, error }) {
  const wrong = (name) => error?.param === `${prefix}.${name}` ? error.message : null;
  const set = (name, value) => onChange({ ...values, [name]: value });
  return html`<fieldset class="limit-fields"><legend>${legend}</legend>
    ${AMOUNTS.map(([name, label]) => html`<${Field} key=${name} label=${label} type="number" min="0" step="any" inputmode="decimal"
      placeholder="none" value=${values[name]} error=${wrong(name)} onInput=${(event) => set(name, event.target.value)} />`)}
    ${SWITCHES.map(([name, label]) => html`<${Select} key=${name} label=${label} options=${ANSWERS} value=${values[name]}
      onChange=${(value) => set(name, value)} />`)}
  </fieldset>`;
}

/** The fields of a key; a new one also has a tenant. */
export function KeyFields({ values, onChange, error, isNew, tenants = [] }) {
  const field = (name, label, hint, more) => html`<${Field} label=${label} hint=${hint} value=${values[name]} autocomplete="off"
    error=${error?.param === name || error?.param?.startsWith(`${name}[`) ? error.message : null}
    onInput=${(event) => onChange({ ...values, [name]: event.target.value })} ...${more} />`;
  return html`<div class="key-fields">
    ${isNew && html`${field("tenant", "Tenant", "Whose key it is; a new name makes a new tenant.", { required: true, list: "known-tenants" })}
      <datalist id="known-tenants">${tenants.map((each) => html`<option key=${each} value=${each}></option>`)}</datalist>`}
    ${field("name", "Name", "Your own word for it.")}
    ${field("models", "Models", "Names with commas between them; empty: all.")}
    ${field("adapters", "Adapters", "Empty: all.")}
    ${field("regions", "Regions", "Where requests may be served; empty: anywhere.")}
    <${Select} label="Class" options=${CLASSES.map((each) => [each, each])} value=${values.class}
      onChange=${(value) => onChange({ ...values, class: value })} />
    ${field("expires", "Expires", "A span such as 30d, a time such as 2027-01-31T00:00:00Z; empty: never.")}
    ${field("max_output_tokens", "Most output tokens", "Of one request; empty: no limit.", { type: "number", min: 1 })}
    ${field("deadline_ms", "Deadline, ms", "Of requests that name none; empty: the model's.", { type: "number", min: 1 })}
    <${LimitFields} legend="Limits of this key" prefix="limits" values=${values.limits} error=${error}
      onChange=${(limits) => onChange({ ...values, limits })} />
  </div>`;
}

/** What to do when somebody else was quicker: take theirs, or save over it. `theirs` are [field, value] that differ. */
export function Conflict({ what, theirs, onTheirs, onMine }) {
  return html`<div class="conflict" role="alert">
    <p><strong>Somebody changed ${what} while you were editing.</strong> Nothing of yours is saved yet.</p>
    ${theirs.length > 0 && html`<dl>${theirs.map(([field, value]) => html`<div key=${field}><dt>${field}</dt>
      <dd>is now <code>${JSON.stringify(value)}</code></dd></div>`)}</dl>`}
    <div class="actions">
      <button type="button" class="button normal" onClick=${onTheirs}>Show theirs, drop mine</button>
      <button type="button" class="button danger" onClick=${onMine}>Save mine on top</button>
    </div>
  </div>`;
}

/** Fields of two records that differ, as the newer one has them. */
export const differing = (before, now) => Object.entries(now)
  .filter(([name, value]) => !["version", "audit_id", "state", "keys"].includes(name) && JSON.stringify(value) !== JSON.stringify(before?.[name]));
