// A record that is edited: what stands in its form, saving that, and what becomes of a change that others made meanwhile.
import { html, useEffect, useState } from "../lib/ui.js";
import { get, post } from "../lib/api.js";
import { notify, notifyError } from "../lib/notify.js";
import { Button, ErrorBox } from "../lib/parts.js";
import { Conflict, differing } from "./forms.js";

/**
 * The state of one editor. `write(path, body, options)` sends a change; `shown(record)` is what the form shows of a
 * record, `changes(before, now)` what of it differs, as the API takes it.
 */
export function useEditor({ record, path, called, write, shown, changes, onSaved, onUndone }) {
  const [values, setValues] = useState(() => shown(record));
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const [theirs, setTheirs] = useState(null);
  const reset = (to) => setValues(shown(to));
  useEffect(() => reset(record), [record.version]);
  const changed = changes(shown(record), values);

  const done = (saved, said) => {
    setError(null);
    setTheirs(null);
    onSaved(saved);
    const undo = async () => { await post(`undo/${saved.audit_id}`); onUndone(); };
    notify(said, { undo: saved.audit_id ? undo : null });
  };
  const save = async (version) => {
    setBusy(true);
    try {
      done(await write(path, changed, { version }), `Saved ${called}.`);
    } catch (refused) {
      if (refused.status === 412) setTheirs(await get(path));
      else setError(refused);
    } finally {
      setBusy(false);
    }
  };
  const turn = async (disabled) => {
    try {
      done(await write(path, { disabled }), `${disabled ? "Disabled" : "Enabled"} ${called}.`);
    } catch (refused) {
      notifyError(refused);
    }
  };
  const takeTheirs = () => { setTheirs(null); onSaved(theirs); reset(theirs); };
  return { record, called, values, setValues, error, busy, theirs, takeTheirs, reset, save, turn, dirty: Object.keys(changed).length > 0 };
}

/** The form of an editor around its fields, with the changes of others above it; `owner`: whether one may save. */
export function EditForm({ editor, owner, children }) {
  const { record, called, error, busy, theirs, takeTheirs, reset, save, dirty } = editor;
  return html`
    ${theirs && html`<${Conflict} what=${called} theirs=${differing(record, theirs)} onTheirs=${takeTheirs} onMine=${() => save(theirs.version)} />`}
    <form aria-label=${`Edit ${called}`} onSubmit=${(event) => { event.preventDefault(); save(record.version); }}>
      <fieldset class="plain-set" disabled=${!owner}>
        ${children}
        <${ErrorBox} error=${error} />
        ${owner && html`<div class="actions"><${Button} kind="primary" type="submit" busy=${busy} disabled=${!dirty}>Save changes<//>
          ${dirty && html`<${Button} onClick=${() => reset(record)}>Drop them<//>`}</div>`}
      </fieldset>
    </form>`;
}
