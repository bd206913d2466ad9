// Sends a prompt through the front door, to one place or side by side to several, and shows what becomes of it.
import { html, useEffect, useMemo, useRef, useState } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { dollars, millis, number } from "../lib/format.js";
import { Badge, Button, Card, CopyText, Empty, ErrorBox, Field, Loading, Page, Select } from "../lib/parts.js";
import { may } from "../lib/session.js";
import { Decisions } from "../lib/decision.js";
import { Outcome } from "../lib/outcomes.js";
import { play } from "../lib/play.js";
import { Timeline } from "../lib/timeline.js";

export const title = "Playground";
const MAX_COLUMNS = 4;
const FRESH = {
  state: "waiting", text: "", reasoning: "", head: null, decisions: null, usage: null, errors: [], done: null,
  first_ms: null, finish: null,
};

/** What one event changes of what is known of a column. */
export function told(column, name, data) {
  switch (name) {
    case "head": return { ...column, state: data.status === 200 ? "answering" : "failed", head: data };
    case "decision": return { ...column, decisions: data.decisions };
    case "text": return {
      ...column, first_ms: column.first_ms ?? data.at_ms, text: column.text + (data.text ?? ""),
      reasoning: column.reasoning + (data.reasoning ?? ""),
    };
    case "finish": return { ...column, finish: data.reason };
    case "usage": return { ...column, usage: data };
    case "error": return { ...column, state: "failed", errors: [...column.errors, data] };
    case "done": return {
      ...column, state: column.state === "failed" ? "failed" : "done", done: data,
      decisions: data.decisions ?? column.decisions,
    };
    default: return column;
  }
}

/** The body as OpenAI's API has it. */
export function request(form) {
  const body = { model: form.model };
  if (form.path === "/v1/completions") body.prompt = form.prompt;
  else {
    const system = form.system ? [{ role: "system", content: form.system }] : [];
    body.messages = [...system, { role: "user", content: form.prompt }];
  }
  if (form.max_tokens) body.max_tokens = Number(form.max_tokens);
  if (form.temperature !== "") body.temperature = Number(form.temperature);
  return body;
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** What does the same from a shell, with a key of one's own. */
export function curl(url, form) {
  const body = JSON.stringify({ ...request(form), stream: true });
  const socket = url.startsWith("unix:") ? ` --unix-socket ${quoted(url.slice(5))}` : "";
  const base = socket ? "http://localhost" : url;
  const headers = `-H "Authorization: Bearer $TIDEGATE_API_KEY" \\\n  -H 'Content-Type: application/json'`;
  return `curl -N${socket} ${base}${form.path} \\\n  ${headers} \\\n  -d ${quoted(body)}`;
}

const place = (chosen) => {
  const [kind, ...rest] = chosen.split("=");
  return kind === "any" ? {} : { [kind]: rest.join("=") };
};
const placeName = (chosen) => chosen === "any" ? "As any request" : chosen.replace("=", " ");

const FIRST = {
  model: "", path: "/v1/chat/completions", system: "", prompt: "", max_tokens: "256", temperature: "",
  tenant: "playground", columns: ["any"],
};
const STATES = {
  waiting: ["info", "waiting"], answering: ["info", "answering"], done: ["good", "done"], failed: ["bad", "failed"],
  stopped: ["off", "stopped"],
};

const Used = ({ usage }) => html`<span>Prompt <b>${number(usage.prompt_tokens)}</b>,${" "}
  cached <b>${number(usage.prompt_tokens_details?.cached_tokens)}</b>,${" "}
  output <b>${number(usage.completion_tokens)}</b></span>`;

function Column({ name, column }) {
  const [tone, word] = STATES[column.state];
  const record = column.done?.record;
  const headers = column.head?.headers ?? {};
  return html`<${Card} title=${name} aside=${html`<span role="status"><${Badge} tone=${tone}>${word}<//></span>`}
    class="column">
    <div class="play-figures">
      ${headers["x-tidegate-replica"] && html`<span>Replica <b>${headers["x-tidegate-replica"]}</b></span>`}
      ${headers["x-tidegate-route-reason"] && html`<span>because <code>${headers["x-tidegate-route-reason"]}</code></span>`}
      ${column.first_ms !== null && html`<span>First token <b>${millis(column.first_ms)}</b></span>`}
      ${record && html`<span>Whole <b>${millis(record.duration_ms)}</b></span>
        <span>Cost <b>${dollars(record.cost_usd)}</b></span>`}
      ${column.usage && html`<${Used} usage=${column.usage} />`}
      ${column.finish && html`<span>Finished: <code>${column.finish}</code></span>`}
    </div>
    ${column.errors.map((each, at) => html`<div class="error-box" role="alert"
      key=${at}><p><strong>${each.message ?? "It failed."}</strong></p>
      <p>${each.status ? `Status ${each.status}. ` : ""}${each.code && html`Code <code>${each.code}</code>`}</p></div>`)}
    <div class="play-answer" role="log" aria-label=${`Answer, ${name}`} aria-live="polite"
      aria-busy=${column.state === "answering" ? "true" : "false"} tabindex="0">
      ${column.reasoning && html`<span class="reasoning">${column.reasoning}</span>`}${column.text}</div>
    ${record && html`<p><${Outcome} row=${record} /> <a
      href=${`#requests/${encodeURIComponent(column.done.id)}`}>Open the request</a></p>`}
    ${column.done?.timeline && html`<details><summary>Timeline</summary><${Timeline}
      timeline=${column.done.timeline} /></details>`}
    ${column.decisions && html`<details><summary>Why it went there</summary><${Decisions} decisions=${column.decisions}
      attempts=${record?.attempts ?? 1} /></details>`}
    ${column.head?.id && html`<${CopyText} text=${`x-request-id: ${column.head.id}`} />`}
  <//>`;
}

function Form({ options, form, set, running, onSend, onStop }) {
  const model = options.models.find((each) => each.name === form.model);
  const places = [["any", "As any request"], ...options.policies.map((each) => [`policy=${each}`, `Policy ${each}`]),
    ...(model?.replicas ?? []).map((each) => [`replica=${each}`, `Replica ${each}`])];
  const input = (name) => (event) => set({ ...form, [name]: event.target.value });
  const choose = (at, value) =>
    set({ ...form, columns: form.columns.map((each, index) => index === at ? value : each) });
  const ask = (model) =>
    set({ ...form, model, columns: form.columns.map((each) => each.startsWith("replica=") ? "any" : each) });
  const sendByKey = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (!running) onSend();
  };
  return html`<form class="play-form" aria-label="Request" onSubmit=${(event) => { event.preventDefault(); onSend(); }}>
    <div class="play-texts">
      ${form.path === "/v1/chat/completions" && html`<${Field} as="textarea" label="System" rows="2"
        value=${form.system} onInput=${input("system")} />`}
      <${Field} as="textarea" label="Prompt" rows="6" required value=${form.prompt} onInput=${input("prompt")}
        onKeyDown=${sendByKey}
        hint="Ctrl+Enter sends. The gateway keeps nothing of the text." />
      <div class="play-buttons">
        <button type="submit" class="button primary" disabled=${running || !form.prompt || !form.model}>Send</button>
        <${Button} onClick=${onStop} disabled=${!running}>Stop<//>
      </div>
    </div>
    <div class="play-settings">
      <${Select} label="Model" value=${form.model}
        onChange=${ask}
        options=${options.models.map((each) => [each.name, each.name])} />
      <${Select} label="API" value=${form.path} onChange=${(value) => set({ ...form, path: value })}
        options=${[["/v1/chat/completions", "Chat"], ["/v1/completions", "Completion"]]} />
      <div class="play-pair">
        <${Field} label="Most tokens" type="number" min="1" value=${form.max_tokens} onInput=${input("max_tokens")} />
        <${Field} label="Temperature" type="number" min="0" max="2" step="0.1" value=${form.temperature}
          onInput=${input("temperature")} />
      </div>
      <${Field} label="Tenant" value=${form.tenant} onInput=${input("tenant")}
        hint="Whose limits and records it counts to." />
      ${form.columns.map((each, at) => html`<${Select} key=${at}
        label=${form.columns.length > 1 ? `Column ${at + 1} goes` : "Goes"} value=${each} options=${places}
        onChange=${(value) => choose(at, value)} />`)}
      <div class="play-buttons">
        <${Button} onClick=${() => set({ ...form, columns: [...form.columns, "any"] })}
          disabled=${form.columns.length >= MAX_COLUMNS}>Side by side<//>
        ${form.columns.length > 1 && html`<${Button}
          onClick=${() => set({ ...form, columns: form.columns.slice(0, -1) })}>One less<//>`}
      </div>
    </div>
  </form>`;
}

export default function PlaygroundPage() {
  const { data, error, reload } = useData("playground");
  const [form, set] = useState(FIRST);
  const [columns, setColumns] = useState([]);
  const [running, setRunning] = useState(false);
  const [failure, setFailure] = useState(null);
  const [names, setNames] = useState([]);
  const aborter = useRef(null);
  useEffect(() => {
    if (data?.models.length && !form.model) set((now) => ({ ...now, model: data.models[0].name }));
  }, [data]);
  useEffect(() => () => aborter.current?.abort(), []);

  const send = async () => {
    const mine = new AbortController();
    aborter.current = mine;
    setFailure(null);
    setRunning(true);
    setNames(form.columns.map(placeName));
    setColumns(form.columns.map(() => FRESH));
    // Tokens come faster than they can be drawn: what came is put together for each frame.
    let waiting = [];
    let frame = 0;
    const flush = () => {
      const events = waiting;
      waiting = [];
      frame = 0;
      setColumns((now) => events.reduce((before, [name, content]) =>
        before.map((column, at) => at === content.column ? told(column, name, content) : column), now));
    };
    try {
      const { path, tenant } = form;
      const body = { request: request(form), path, tenant: tenant || "playground", columns: form.columns.map(place) };
      await play(body, (name, content) => {
        if (content?.column === undefined) return;
        waiting.push([name, content]);
        frame = frame || requestAnimationFrame(flush);
      }, mine.signal);
    } catch (problem) {
      if (problem.name !== "AbortError") setFailure(problem);
    }
    cancelAnimationFrame(frame);
    flush();
    const over = (column) => column.done || column.state === "failed";
    setColumns((now) => now.map((column) => over(column) ? column : { ...column, state: "stopped" }));
    if (aborter.current === mine) setRunning(false);
  };
  const command = useMemo(() => data && form.model ? curl(data.url, form) : "", [data, form]);

  const lead = "A prompt through the gateway's own front door: admitted, limited and recorded like any other request.";
  if (!may("operator")) return html`<${Page} title=${title} lead=${lead}><${Empty}
    title="This needs the role operator.">Ask an owner of this gateway for it.<//><//>`;
  return html`<${Page} title=${title} lead=${lead}>
    <${ErrorBox} error=${error} retry=${reload} />
    ${!data && !error && html`<${Loading} what="Loading models" />`}
    ${data && !data.models.length && html`<${Empty}
      title="There is no model to ask.">Name one under <code>models</code> in the configuration, and reload it.<//>`}
    ${data && data.models.length > 0 && html`<${Card} title="Request">
      <${Form} options=${data} form=${form} set=${set} running=${running} onSend=${send}
        onStop=${() => aborter.current?.abort()} />
      <details><summary>The same with curl</summary><pre class="play-curl">${command}</pre><${CopyText}
        text=${command.replaceAll("\\\n  ", "")} label="Copy as one line" /></details>
    <//>`}
    <${ErrorBox} error=${failure} />
    <div class="play-columns">${columns.map((column, at) => html`<${Column} key=${at} name=${names[at]}
      column=${column} />`)}</div>
    ${data && !columns.length && data.models.length > 0 && html`<${Empty}
      title="Nothing sent yet.">The answer appears here as it comes, with the replica that gave it and why. Put two policies or replicas side by side to compare them on the same prompt.<//>`}
  <//>`;
}
