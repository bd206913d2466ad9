// One key: looked at, changed, disabled, rotated and revoked; and the making of a new one.
import { html, render, useEffect, useRef, useState } from "../lib/ui.js";
import { del, get, patch, post } from "../lib/api.js";
import { useData } from "../lib/data.js";
import { notify, notifyError } from "../lib/notify.js";
import { Badge, Button, CopyText, ErrorBox, Loading, useConfirm } from "../lib/parts.js";
import { may } from "../lib/session.js";
import { EditForm, useEditor } from "./editor.js";
import { KeyFields, keyChanges, keyShown } from "./forms.js";

const TONES = { valid: "good", disabled: "off", expired: "warn" };
export const KeyState = ({ state }) => html`<${Badge} tone=${TONES[state]}>${state}<//>`;

/** Shows the text of a new key, once; resolves when it was put away. */
export function showOnce(key, title) {
  return new Promise((resolve) => {
    const place = document.createElement("div");
    document.body.append(place);
    render(html`<${Once} text=${key} title=${title} onDone=${() => { render(null, place); place.remove(); resolve(); }} />`, place);
  });
}

function Once({ text, title, onDone }) {
  const dialog = useRef(null);
  useEffect(() => { dialog.current.showModal(); }, []);
  return html`<dialog ref=${dialog} class="confirm once" aria-labelledby="once-title" onCancel=${(event) => event.preventDefault()}>
    <h2 id="once-title">${title}</h2>
    <p>This is the only time that the key is shown: it is kept nowhere. Copy it now.</p>
    <p><${CopyText} text=${text} label="Copy key" /></p>
    <div class="confirm-actions">
      <button type="button" class="button primary" onClick=${() => { dialog.current.close(); onDone(); }}>I have it</button>
    </div>
  </dialog>`;
}

/** The form of a new key. */
export function NewKey({ tenant, onMade, onClose }) {
  const blank = { ...keyShown(null), tenant: tenant ?? "" };
  const [values, setValues] = useState(blank);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const { data } = useData("tenants?limit=200");
  const create = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      const { key, ...made } = await post("keys", { ...keyChanges(keyShown(null), values), tenant: values.tenant.trim() });
      await showOnce(key, `The new key of ${made.tenant}`);
      onMade(made);
    } catch (refused) {
      setError(refused);
    } finally {
      setBusy(false);
    }
  };
  return html`<form class="key-form" aria-label="New key" onSubmit=${create}>
    <${KeyFields} isNew values=${values} onChange=${setValues} error=${error} tenants=${data?.data.map((each) => each.name)} />
    <${ErrorBox} error=${error} />
    <div class="actions"><${Button} kind="primary" type="submit" busy=${busy}>Create key<//><${Button} onClick=${onClose}>Cancel<//></div>
  </form>`;
}

/** One key with all that can be done to it. */
export function KeyDetail({ id, onChanged, onGone }) {
  const { data, error, loading, reload, set } = useData(`keys/${encodeURIComponent(id)}`);
  if (!data) return loading ? html`<${Loading} what="Reading the key" />` : html`<${ErrorBox} error=${error} retry=${reload} />`;
  return html`<${KeyEditor} key=${data.id} record=${data} onGone=${onGone}
    onUndone=${() => { reload(); onChanged(); }} onSaved=${(saved) => { set(saved); onChanged(); }} />`;
}

function KeyEditor({ record, onSaved, onUndone, onGone }) {
  const confirm = useConfirm();
  const owner = may("owner");
  const path = `keys/${encodeURIComponent(record.id)}`;
  const called = record.name || record.id;
  const editor = useEditor({ record, path, called, write: patch, shown: keyShown, changes: keyChanges, onSaved, onUndone });

  const rotate = async () => {
    const body = html`<p>A new key with the same rights takes its place. The old one goes on for a day, so that its holders can
      change over.</p>`;
    if (!(await confirm({ title: `Rotate ${called}?`, body, action: "Rotate" }))) return;
    try {
      const { key, ...made } = await post(`${path}/rotate`, {}, { version: record.version });
      await showOnce(key, `The key in the place of ${called}`);
      onSaved(await get(path));
      notify(`${made.id} takes the place of ${called}.`);
    } catch (refused) {
      notifyError(refused);
    }
  };
  const revoke = async () => {
    const body = html`<p>Requests with this key are refused from now on. This cannot be undone; to stop it for a while,
      disable it.</p>`;
    if (!(await confirm({ title: `Revoke ${called}?`, body, action: "Revoke", danger: true, typed: called }))) return;
    try {
      await del(path);
      notify(`Revoked ${called}.`);
      onGone();
    } catch (refused) {
      notifyError(refused);
    }
  };
  return html`<div class="key-detail">
    <p class="key-line"><${KeyState} state=${record.state} /> <code>${record.id}</code> ends in <code>${record.hint}</code>,
      of <a href=${`#tenants?view=tenants&name=${encodeURIComponent(record.tenant)}`}>${record.tenant}</a>, made ${record.created}${" "}
      ${record.replaced_by && html`, replaced by <a href=${`#tenants/${record.replaced_by}`}>${record.replaced_by}</a>`}
      ${" · "}<a href=${`#limits?key=${encodeURIComponent(record.id)}`}>what is left of its limits</a></p>
    ${record.raises.length > 0 && html`<p>Raised for a while: ${record.raises.map((each) => html`<span key=${each.until}>
      <code>${JSON.stringify(each.limits)}</code> until ${each.until} </span>`)}</p>`}
    ${owner && html`<div class="actions">
      ${record.disabled ? html`<${Button} onClick=${() => editor.turn(false)}>Enable<//>` : html`<${Button} onClick=${() => editor.turn(true)}>Disable<//>`}
      <${Button} disabled=${record.state !== "valid" || record.replaced_by !== null} onClick=${rotate}>Rotate<//>
      <${Button} kind="danger" onClick=${revoke}>Revoke<//>
    </div>`}
    <${EditForm} editor=${editor} owner=${owner}>
      <${KeyFields} values=${editor.values} onChange=${editor.setValues} error=${editor.error} />
    <//>
  </div>`;
}
