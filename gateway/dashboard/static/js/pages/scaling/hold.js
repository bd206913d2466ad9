// A number of replicas that is kept to for a while, whatever is asked for.
import { html, useState } from "../../lib/ui.js";
import { del, put } from "../../lib/api.js";
import { may } from "../../lib/session.js";
import { notify, notifyError } from "../../lib/notify.js";
import { Badge, Button, Field, Select, Time, useConfirm } from "../../lib/parts.js";
import { replicas } from "./words.js";

const SPANS = [["900", "15 minutes"], ["3600", "an hour"], ["14400", "4 hours"], ["28800", "8 hours"], ["86400", "a day"]];

/** What is held, the way to end it, and the form to hold another number. */
export function Hold({ pool, onChanged }) {
  const confirm = useConfirm();
  const [count, setCount] = useState(null);
  const [span, setSpan] = useState("3600");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const path = `scaling/${encodeURIComponent(pool.pool)}`;
  const { held } = pool;
  const likely = Math.max(pool.min, Math.min(pool.ceiling, pool.wanted));

  const act = async (work) => {
    setBusy(true);
    setError(null);
    try {
      await work();
      await onChanged();
    } catch (problem) {
      if (problem.param) setError(problem);
      else notifyError(problem);
    } finally {
      setBusy(false);
    }
  };
  /** To what was held before, for as long as was left of it; or to nothing. */
  const back = (before) => async () => {
    const left_s = before === null ? 0 : before.until_unix_s - Date.now() / 1000;
    await (left_s > 0 ? put(path, { count: before.count, for_s: left_s }) : del(path));
    await onChanged();
  };
  const hold = async (event) => {
    event.preventDefault();
    const wanted = Number(count ?? held?.count ?? likely);
    if (pool.provider !== "none" && wanted < pool.current) {
      const yes = await confirm({
        title: `Hold ${pool.pool} at ${wanted}?`,
        body: `${pool.current} are there: ${replicas(pool.current - wanted)} will end what they have, and go, with what their caches hold.`,
        action: "Hold", danger: true,
      });
      if (!yes) return;
    }
    await act(async () => {
      await put(path, { count: wanted, for_s: Number(span) });
      setCount(null);
      notify(`${pool.pool} is held at ${replicas(wanted)}.`, { undo: back(held) });
    });
  };
  const release = () => act(async () => {
    await del(path);
    notify(`${pool.pool} follows what is asked for again.`, held ? { undo: back(held) } : {});
  });
  return html`<section class="hold" aria-label=${`Hold ${pool.pool} at a number`}>
    ${held && html`<p><${Badge} tone="info">held<//> At ${replicas(held.count)} by <span class="told">${held.by}</span>; it ends <${Time} at=${held.until_unix_s} />.</p>`}
    ${may("operator") && html`<form class="inline-form" onSubmit=${hold}>
      <${Field} label="Hold at" type="number" min=${pool.min} max=${pool.ceiling} step="1" required value=${count ?? held?.count ?? likely}
        error=${error?.param === "count" ? error.message : null} onInput=${(event) => setCount(event.target.value)} />
      <${Select} label="For" value=${span} onChange=${setSpan} options=${SPANS} error=${error?.param === "for_s" ? error.message : null} />
      <${Button} type="submit" busy=${busy}>Hold<//>
      ${held && html`<${Button} busy=${busy} onClick=${release}>Release<//>`}
    </form>`}
  </section>`;
}
