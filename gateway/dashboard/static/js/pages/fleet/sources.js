// Where the replicas of each pool come from; those that start, and those that are left out.
import { html, useState } from "../../lib/ui.js";
import { post } from "../../lib/api.js";
import { may } from "../../lib/session.js";
import { notify, notifyError } from "../../lib/notify.js";
import { percent, seconds } from "../../lib/format.js";
import { Badge, Bar, Button, Card, Time, useConfirm } from "../../lib/parts.js";
import { counted } from "./words.js";

const FIRST = 12;
const KINDS = { configured: "Configuration", registration: "Registration", kubernetes: "Kubernetes", dns: "DNS", file: "File" };
const PHASES = { downloading: "downloading the model", loading: "loading weights", compiling: "compiling", warming: "warming up" };

/** What a kind of source is called. */
export const kindOf = (kind) => Object.hasOwn(KINDS, kind) ? KINDS[kind] : kind;

/** What a start is at, in words. */
export const phaseOf = (phase) => Object.hasOwn(PHASES, phase) ? PHASES[phase] : phase || "starting";

const all = (members, wanted) => members.pools.flatMap(({ pool, members: found }) => found.filter(wanted).map((each) => ({ ...each, pool })));
/** Members that are on their way. */
export const startingOf = (members) => (members === null ? [] : all(members, (each) => each.state === "starting" && !each.refused));
const refusedOf = (members) => all(members, (each) => each.refused !== null);
const troublesOf = (members) => members.pools.flatMap(({ pool, sources }) => sources.filter((each) => each.problem).map((each) => ({ ...each, pool })));

/** What keeps replicas from the map: sources that do not answer, starts that go on, and what was refused. */
export function Coming({ members }) {
  const troubles = troublesOf(members);
  const starting = startingOf(members);
  const refused = refusedOf(members);
  return html`
    ${troubles.map((each) => html`<div class="trouble" role="alert" key=${`${each.pool}/${each.kind}`}>
      <p><${Badge} tone="warn">trouble<//> <strong>The replicas of ${each.pool} cannot be looked up (${kindOf(each.kind)}).</strong></p>
      <p class="said">${each.problem}</p>
      <p class="hint">${each.told_unix_s === null ? "It has not answered yet." : html`What was told <${Time} at=${each.told_unix_s} /> holds: ${counted(each.members, "replica")}.`}</p>
    </div>`)}
    ${starting.length > 0 && html`<${Card} title="Starting" class="starting" aside=${`${counted(starting.length, "replica")}, not asked for anything yet`}>
      <${Some} rows=${starting} row=${Starting} /><//>`}
    ${refused.length > 0 && html`<${Card} title="Left out" class="refused" aside=${`${counted(refused.length, "replica")} that ${refused.length === 1 ? "was" : "were"} found and cannot be used`}>
      <${Some} rows=${refused} row=${Refused} /><//>`}`;
}

/** The first of many rows, and a button for the others. */
function Some({ rows, row }) {
  const [open, setOpen] = useState(false);
  const shown = open ? rows : rows.slice(0, FIRST);
  return html`<ul class="coming">${shown.map((each, place) => html`<${row} key=${`${each.pool}/${each.source}/${each.name || each.url}/${place}`} member=${each} />`)}</ul>
    ${rows.length > FIRST && html`<button type="button" class="plain" onClick=${() => setOpen(!open)}>${open ? "Fewer" : `All ${rows.length}`}</button>`}`;
}

function Starting({ member }) {
  const phase = phaseOf(member.phase);
  const known = member.progress !== undefined && member.progress !== null;
  const text = known ? `${phase}, ${percent(member.progress, 0)}` : phase;
  const notes = [
    member.agent && `launched by ${member.agent}`,
    member.restarts > 0 && `started again ${member.restarts === 1 ? "once" : `${member.restarts} times`}`,
    member.for_s !== null && `for ${seconds(Math.floor(member.for_s))}`,
  ].filter(Boolean);
  return html`<li>
    <div class="coming-name"><strong>${member.name}</strong> <span class="engine">${member.pool}</span></div>
    <div class="coming-state"><span>${text}</span>${known && html`<${Bar} value=${member.progress} label=${`Start of ${member.name}`} text=${text} />`}</div>
    <p class="said" title=${member.detail}>${member.detail}</p>
    <p class="hint">${notes.join(", ")}${member.restarts > 0 && html` <${Badge} tone="warn">restarts<//>`}</p>
  </li>`;
}

const Refused = ({ member }) => html`<li>
  <div class="coming-name"><strong>${member.name || member.url}</strong> <span class="engine">${member.pool}</span></div>
  <div class="coming-state"><${Badge} tone="warn">left out<//> <span>by ${kindOf(member.source)}</span></div>
  <p class="said" title=${member.refused}>${member.refused}</p>
  <p class="hint">${member.name && member.url}</p>
</li>`;

/** Each pool with its sources; where somebody can restart its servers, a button for that. */
export function Sources({ members, replicas }) {
  return html`<${Card} title="Where replicas come from" class="sources">
    <ul>${members.pools.map((each) => html`<li key=${each.pool}>
      <h3>${each.pool}</h3>
      <ul>${each.sources.length === 0 && html`<li class="hint">Nowhere: it has no <code>replicas</code>, no <code>discovery</code> and no <code>launch</code>.</li>`}
        ${each.sources.map((source) => html`<li key=${source.kind}>
          <b>${kindOf(source.kind)}</b> <span class="said">${source.detail}</span>
          <span>${counted(source.members, "replica")}</span>
          ${source.problem ? html`<${Badge} tone="warn">trouble<//>` : source.told_unix_s !== null && html`<span class="hint">asked <${Time} at=${source.told_unix_s} /></span>`}
        </li>`)}</ul>
      ${each.rolls && may("operator") && html`<${Roll} pool=${each.pool} count=${replicas.filter((row) => row.pool === each.pool).length} />`}
    </li>`)}</ul>
  <//>`;
}

function Roll({ pool, count }) {
  const confirm = useConfirm();
  const [busy, setBusy] = useState(false);
  const roll = async () => {
    const yes = await confirm({
      title: `Restart the servers of ${pool} one by one?`,
      body: html`<p>Each of them gets no new requests, ends what it has, is stopped, started again and waited for, before the next one is.
          No request is lost; what their caches hold is. It cannot be called back.</p>
        ${count < 2 && html`<p><strong>There is no other server in ${pool}:</strong> its requests wait or are refused meanwhile.</p>`}`,
      action: "Restart one by one", danger: true,
    });
    if (!yes) return;
    setBusy(true);
    try {
      await post(`pools/${encodeURIComponent(pool)}/roll`);
      notify(`The servers of ${pool} are restarted one by one.`);
    } catch (problem) {
      notifyError(problem);
    } finally {
      setBusy(false);
    }
  };
  return html`<${Button} busy=${busy} onClick=${roll} aria-label=${`Restart ${pool} one by one…`}>Restart one by one…<//>`;
}

/** What is known of where one replica comes from: terms and texts. */
export function originOf(members, pool, name) {
  const found = members?.pools.find((each) => each.pool === pool);
  if (!found) return [];
  const member = found.members.find((each) => each.name === name && each.in_pool && !each.refused);
  if (!member) return [["Found by", "Configuration"]];
  const source = found.sources.find((each) => each.kind === member.source);
  return [
    ["Found by", [kindOf(member.source), source?.detail].filter(Boolean).join(", ")],
    member.agent && ["Launched by", member.agent],
    member.started_in_s !== undefined && member.started_in_s !== null && ["Its start took", seconds(member.started_in_s)],
    member.restarts > 0 && ["Restarts", String(member.restarts)],
    member.expires_in_s !== null && ["Registration", `holds for ${seconds(Math.ceil(member.expires_in_s))}, unless it is renewed`],
    member.state === "draining" && ["Its source says", "that it is about to go"],
    member.detail && ["It says", member.detail],
  ].filter(Boolean);
}
