import { html, useEffect, useRef, useState } from "../../lib/ui.js";
import { useData } from "../../lib/data.js";
import { del, get, post, put } from "../../lib/api.js";
import { may } from "../../lib/session.js";
import { notify, notifyError } from "../../lib/notify.js";
import { bytes, millis, number, percent, seconds } from "../../lib/format.js";
import { Badge, Bar, Button, CopyText, ErrorBox, Field, Loading, useConfirm } from "../../lib/parts.js";
import { originOf } from "./sources.js";
import { counted, reasonOf, stateOf } from "./words.js";

/** One replica: how it is and why, what it holds, and what an operator can do. `row`: its newest figures, if it is there;
 *  `members`: what sources have found, if that is known yet. */
export function Detail({ pool, name, row, members, onClose, onChanged }) {
  const path = `${encodeURIComponent(pool)}/${encodeURIComponent(name)}`;
  const { data, error, reload } = useData(`fleet/replicas/${path}`);
  const heading = useRef(null);
  useEffect(() => { heading.current?.focus({ preventScroll: window.innerWidth > 800 }); }, []);
  // What the stream's rows do not say is asked for again when its state changes.
  useEffect(() => { if (data && row) reload(); }, [row?.kind, row?.reason, row?.adapters.join()]);
  const changed = async () => { await Promise.all([reload(), onChanged()]); };

  return html`<aside class="card detail" aria-label=${`Replica ${name}`} onKeyDown=${(event) => { if (event.key === "Escape" && !event.defaultPrevented) onClose(); }}>
    <header class="card-head">
      <div><p class="over">${pool}</p><h2 tabindex="-1" ref=${heading}>${name}</h2></div>
      <button type="button" class="plain" onClick=${onClose}>Close</button>
    </header>
    ${error && html`<${ErrorBox} error=${error} retry=${reload} />`}
    ${data === null
      ? !error && html`<div aria-busy="true"><${Loading} /></div>`
      : html`${row ? html`<${State} state=${data} row=${row} />` : html`<p class="state" role="status"><${Badge}>gone<//> It is no longer in the pool; this is what was known of it.</p>`}
          ${may("operator") && row && html`<${Actions} state=${data} path=${path} onChanged=${changed} />`}
          <${Figures} state=${data} row=${row} />
          ${row && html`<${Adapters} state=${data} onChanged=${changed} />`}
          <${Facts} state=${data} origin=${row ? originOf(members, pool, name) : []} />`}
  </aside>`;
}

function State({ state, row }) {
  const kind = row?.kind ?? (state.draining ? "draining" : state.available ? "ok" : "down");
  const reason = row ? row.reason : state.unavailable_reason;
  const { tone, text } = stateOf(kind);
  return html`<div class="state">
    <${Badge} tone=${tone}>${text}<//>
    <p>${reasonOf(reason, kind)}</p>
    ${kind === "draining" && html`<p>${state.empty ? "It is empty: the engine can be stopped." : `${counted(row?.in_flight ?? state.in_flight, "request")} still under way.`}</p>`}
    ${state.cordoned && kind !== "cordoned" && html`<p>It is cordoned too: it gets no new prompts.</p>`}
    ${state.workers.length > 0 && html`<p>Workers differ: ${state.workers.map((each) => `${each.worker}: ${each.unavailable_reason ?? each.health}`).join(", ")}.</p>`}
    ${Object.entries(state.limited_s).map(([model, left]) => html`<p key=${model}>Its limit for ${model || "every model"} is reached; asked again in ${seconds(left)}.</p>`)}
  </div>`;
}

function Actions({ state, path, onChanged }) {
  const confirm = useConfirm();
  const [busy, setBusy] = useState(null);
  const act = async (what, work) => {
    setBusy(what);
    try {
      await work();
      await onChanged();
    } catch (problem) {
      notifyError(problem);
    } finally {
      setBusy(null);
    }
  };
  const order = (verb, query = "") => post(`replicas/${path}/${verb}${query}`);

  const drain = async () => {
    const last = state.last_of_pool;
    const yes = await confirm({
      title: `Drain ${state.replica}?`,
      body: html`<p>It finishes the ${counted(state.in_flight, "request")} it has and gets no new ones. Its warm prefixes stay until the engine stops.</p>
        ${last && html`<p><strong>It is the last replica of ${state.pool} that takes work:</strong> requests for this pool will be refused until it is undrained.</p>`}`,
      action: "Drain", danger: true, typed: last ? state.replica : null,
    });
    if (!yes) return;
    await act("drain", async () => {
      await order("drain", last ? "?force=true" : "");
      notify(`Drained ${state.replica}.`, { undo: async () => { await order("undrain"); await onChanged(); } });
    });
  };
  const undrain = () => act("drain", async () => {
    await order("undrain");
    notify(`${state.replica} takes work again.`, { undo: async () => { await order("drain"); await onChanged(); } });
  });
  // It goes on with what it holds, and with everything where nobody else is left: nothing to be asked about.
  const cordon = (wanted) => act("cordon", async () => {
    await order(wanted ? "cordon" : "uncordon");
    notify(wanted ? `Cordoned ${state.replica}: it gets no new prompts.` : `${state.replica} gets new prompts again.`,
      { undo: async () => { await order(wanted ? "uncordon" : "cordon"); await onChanged(); } });
  });
  return html`<div class="actions">
    ${state.draining
      ? html`<${Button} kind="primary" busy=${busy === "drain"} onClick=${undrain}>Undrain<//>`
      : html`<${Button} busy=${busy === "drain"} onClick=${drain}>Drain…<//>`}
    ${state.cordoned
      ? html`<${Button} kind=${state.draining ? "normal" : "primary"} busy=${busy === "cordon"} onClick=${() => cordon(false)}>Uncordon<//>`
      : html`<${Button} busy=${busy === "cordon"} onClick=${() => cordon(true)} title="No new prompts; it goes on with those that it holds.">Cordon<//>`}
    <${Weight} state=${state} path=${path} onChanged=${onChanged} />
  </div>`;
}

/** Weights are overrides of the configuration: each change is of a version, so that two operators cannot cross. */
function Weight({ state, path, onChanged }) {
  const [text, setText] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  if (text === null) return html`<${Button} onClick=${() => setText(String(state.weight))}>Weight ${number(state.weight)}…<//>`;

  const save = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      const before = (await get("overrides")).version;
      const after = await put(`replicas/${path}/weight`, { weight: Number(text) }, { version: before });
      notify(`${state.replica} has weight ${text}.`, {
        undo: async () => { await post("overrides/restore", { version: before }, { version: after.version }); await onChanged(); },
      });
      setText(null);
      await onChanged();
    } catch (problem) {
      setError(problem.message);
    } finally {
      setBusy(false);
    }
  };
  return html`<form class="inline-form" onSubmit=${save}>
    <${Field} label="Weight" type="number" min="0" step="any" required value=${text} error=${error} onInput=${(event) => setText(event.target.value)}
      hint="Its part of the work, beside the others' weights. Kept over restarts, as an override of the configuration." />
    <${Button} type="submit" kind="primary" busy=${busy}>Set<//>
    <${Button} onClick=${() => { setText(null); setError(null); }}>Cancel<//>
  </form>`;
}

/** `plain`: being full is nothing to be warned of. */
function Meter({ label, value, text, note, plain = false }) {
  return html`<div class="measure">
    <div><span>${label}</span><b>${text}</b></div>
    ${value !== null && html`<${Bar} value=${value} label=${label} text=${text}
      tone=${plain || value <= 0.8 ? null : value > 0.95 ? "bad" : "warn"} />`}
    ${note && html`<p>${note}</p>`}
  </div>`;
}

function Figures({ state, row }) {
  const inFlight = row?.in_flight ?? state.in_flight;
  const kv = row?.kv_use ?? state.load?.kv_use ?? null;
  const held = state.prefix_index;
  const warm = row?.warm_tokens ?? held?.tokens ?? null;
  return html`<div class="measures">
    <${Meter} label="Load" value=${state.ceiling ? inFlight / state.ceiling : null}
      text=${state.ceiling ? `${inFlight} of ${state.ceiling}` : number(inFlight)} note=${state.ceiling ? null : "No limit is known: set max_in_flight, or use an engine that reports one."} />
    <${Meter} label="KV cache" value=${kv} text=${percent(kv, 0)}
      note=${state.load?.kv_capacity_tokens ? `of ${number(state.load.kv_capacity_tokens)} tokens` : kv === null ? "This engine does not report it." : null} />
    <${Meter} label="Warm prefixes" plain value=${held?.budget_tokens ? warm / held.budget_tokens : null} text=${held ? `${number(warm)} tokens` : "–"}
      note=${held ? `believed, of ${number(held.budget_tokens)} at most, in ${number(held.keys)} pieces` : "Nothing is known of its cache."} />
  </div>`;
}

function Adapters({ state, onChanged }) {
  const confirm = useConfirm();
  const [loading, setLoading] = useState(false);
  const able = !("adapters" in state.lacking);
  const where = { pool: state.pool, replica: state.replica };

  const unload = async (adapter) => {
    const yes = await confirm({
      title: `Unload ${adapter.name}?`,
      body: `${state.replica} drops the adapter; requests for it go to other replicas that hold it. One that the configuration lists comes back by itself.`,
      action: "Unload", danger: true,
    });
    if (!yes) return;
    try {
      await del(`adapters/${encodeURIComponent(state.pool)}/${adapter.name.split("/").map(encodeURIComponent).join("/")}?replica=${encodeURIComponent(state.replica)}`);
      notify(`${state.replica} has unloaded ${adapter.name}.`, adapter.path
        ? { undo: async () => { await post("adapters", { ...where, name: adapter.name, path: adapter.path }); await onChanged(); } } : {});
      await onChanged();
    } catch (problem) {
      notifyError(problem);
    }
  };
  return html`<section class="adapters" aria-label="LoRA adapters">
    <h3>LoRA adapters ${state.adapter_slots !== null && html`<span class="engine">${state.adapters.length} of ${state.adapter_slots}</span>`}</h3>
    ${state.adapters.length === 0 && html`<p class="hint">${able ? "None is loaded." : state.lacking.adapters}</p>`}
    <ul>${state.adapters.map((each) => html`<li key=${each.name}><span><b>${each.name}</b> <span class="engine">${each.path ?? ""}</span></span>
      ${may("operator") && able && html`<button type="button" class="plain" onClick=${() => unload(each)} aria-label=${`Unload ${each.name}`}>Unload</button>`}</li>`)}</ul>
    ${state.adapters_loading.length > 0 && html`<p role="status">Loading ${state.adapters_loading.join(", ")}…</p>`}
    ${may("operator") && able && (loading
      ? html`<${LoadAdapter} where=${where} onChanged=${onChanged} onDone=${() => setLoading(false)} />`
      : html`<${Button} onClick=${() => setLoading(true)}>Load an adapter…<//>`)}
  </section>`;
}

function LoadAdapter({ where, onChanged, onDone }) {
  const [name, setName] = useState("");
  const [path, setPath] = useState("");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const load = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await post("adapters", { ...where, name: name.trim(), path: path.trim() });
      notify(`${where.replica} has loaded ${name.trim()}.`);
      onDone();
      await onChanged();
    } catch (problem) {
      setError(problem);
    } finally {
      setBusy(false);
    }
  };
  return html`<form class="stacked-form" onSubmit=${load}>
    <${Field} label="Name" required value=${name} onInput=${(event) => setName(event.target.value)} error=${error?.param === "name" ? error.message : null} />
    <${Field} label="Path" required value=${path} onInput=${(event) => setPath(event.target.value)} hint="As the engine finds it: a folder there, or a hub name."
      error=${error?.param === "path" ? error.message : null} />
    ${error && !["name", "path"].includes(error.param) && html`<${ErrorBox} error=${error} />`}
    <div class="actions"><${Button} type="submit" kind="primary" busy=${busy}>Load<//><${Button} onClick=${onDone}>Cancel<//></div>
  </form>`;
}

/** Milliseconds a token as tokens a second; what is too fast to be true has not been learned yet. */
const rate = (ms) => (ms >= 1e-3 ? `${number(Number((1000 / ms).toPrecision(2)))} tokens/s` : "not learned yet");

function Facts({ state, origin }) {
  const { speed, info, ttft_error: missed, connections } = state;
  const facts = [
    ["Address", html`<${CopyText} text=${state.url} />`],
    ...origin,
    ["Region", state.region ?? "not said"],
    ["Engine", [state.engine, info?.version].filter(Boolean).join(" ")],
    ["Models", info?.models.join(", ") || "not said"],
    ["Prompt speed", rate(speed.prefill_ms)],
    ["Answer speed, one alone", rate(speed.step_ms)],
    ["Round trip", millis(speed.rtt_ms)],
    ["First token, prediction off by", missed?.count ? `${percent(missed.mean_absolute, 0)} on average` : "not known yet"],
    ["Waiting for a first token", counted(state.work.queued, "request")],
    ["Request bodies held", bytes(state.in_flight_bytes)],
    ["Connections", `${connections.active} in use, ${connections.idle} idle, ${connections.waiting} waited for`],
    ["KV events", state.kv_events ? "read" : "not read"],
    ...Object.entries(state.lacking).filter(([signal]) => signal !== "adapters").map(([signal, why]) => [`Does not tell ${signal.replaceAll("_", " ")}`, why]),
  ];
  return html`<section aria-label="Facts"><h3>Facts</h3><dl class="facts">${facts.map(([term, text]) => html`<div key=${term}><dt>${term}</dt><dd>${text}</dd></div>`)}</dl></section>`;
}
