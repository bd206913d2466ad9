// What pages are made of.
import { html, classes, useEffect, useMemo, useRef, useState, useId } from "./ui.js";
import { ago, time } from "./format.js";
import { notify } from "./notify.js";

export { useConfirm, Confirm } from "./confirm.js";
export { Table } from "./table.js";

/** One page: its heading, what can be done on it, and its content. */
export function Page({ title, lead, actions, children }) {
  useEffect(() => { document.title = `${title} · Tidegate`; }, [title]);
  return html`<div class="page">
    <header class="page-head">
      <div><h1 tabindex="-1">${title}</h1>${lead && html`<p class="lead">${lead}</p>`}</div>
      ${actions && html`<div class="actions">${actions}</div>`}
    </header>
    ${children}
  </div>`;
}

export function Card({ title, aside, children, class: name, ...rest }) {
  return html`<section class=${classes("card", name)} aria-label=${title} ...${rest}>
    ${title && html`<header class="card-head"><h2>${title}</h2>${aside && html`<div class="aside">${aside}</div>`}</header>`}
    ${children}
  </section>`;
}

/** Cards or figures side by side, as many as fit. */
export const Grid = ({ min = "16rem", children, class: name }) =>
  html`<div class=${classes("grid", name)} style=${{ "--min": min }}>${children}</div>`;

/** One figure with its name; `tone` "good", "warn" or "bad" with a `note` that says why. */
export function Stat({ label, value, note, tone, children }) {
  return html`<div class=${classes("stat", tone)}>
    <div class="stat-label">${label}</div>
    <div class="stat-value">${value}</div>
    ${note && html`<div class="stat-note">${note}</div>`}
    ${children}
  </div>`;
}

const SIGNS = { good: "●", warn: "▲", bad: "■", info: "◆", off: "○" };

/** A word with a sign of its kind: never colour alone. */
export const Badge = ({ tone = "off", children, title }) =>
  html`<span class=${`badge ${tone}`} title=${title}><span aria-hidden="true">${SIGNS[tone]}</span> ${children}</span>`;

/** A share of a whole, 0 to 1 (more is drawn as full); `label` says what it is. */
export function Bar({ value, label, tone, text }) {
  const share = Math.max(0, Math.min(1, value ?? 0));
  return html`<div class=${classes("bar", tone)} role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="100"
    aria-valuenow=${Math.round(share * 100)} aria-valuetext=${text}>
    <div class="bar-fill" style=${{ width: `${share * 100}%` }}></div>
  </div>`;
}

/** Buttons of which one is chosen. `options` are [value, label]. */
export function Tabs({ label, value, options, onChange }) {
  return html`<div class="tabs" role="group" aria-label=${label}>
    ${options.map(([each, text]) => html`<button key=${each} type="button" aria-pressed=${each === value ? "true" : "false"}
      onClick=${() => onChange(each)}>${text}</button>`)}
  </div>`;
}

export function Button({ kind = "normal", busy = false, children, ...rest }) {
  return html`<button type="button" class=${`button ${kind}`} aria-busy=${busy ? "true" : null} disabled=${busy || rest.disabled}
    ...${rest}>${children}</button>`;
}

/** An input with its label; `error` is shown beside it and told to screen readers. */
export function Field({ label, hint, error, as = "input", children, ...rest }) {
  const id = useId();
  const described = [hint && `${id}-hint`, error && `${id}-error`].filter(Boolean).join(" ") || null;
  const common = { id, "aria-describedby": described, "aria-invalid": error ? "true" : null, ...rest };
  return html`<div class=${classes("field", error && "wrong")}>
    <label for=${id}>${label}</label>
    ${as === "input" && html`<input ...${common} />`}
    ${as === "textarea" && html`<textarea ...${common}></textarea>`}
    ${as === "select" && html`<select ...${common}>${children}</select>`}
    ${hint && html`<p class="hint" id=${`${id}-hint`}>${hint}</p>`}
    ${error && html`<p class="error" id=${`${id}-error`}>${error}</p>`}
  </div>`;
}

/** A drop-down list; `options` are [value, text]. */
export const Select = ({ label, options, value, onChange, ...rest }) =>
  html`<${Field} as="select" label=${label} value=${value} onChange=${(event) => onChange(event.target.value)} ...${rest}>
    ${options.map(([each, text]) => html`<option key=${each} value=${each} selected=${each === value}>${text}</option>`)}
  <//>`;

/** Nothing is here: what would be, and how to make it so. */
export const Empty = ({ title, children }) =>
  html`<div class="empty"><p class="empty-title">${title}</p>${children && html`<div>${children}</div>`}</div>`;

/** What went wrong, in the gateway's words, and a way to try again. */
export const ErrorBox = ({ error, retry }) =>
  error && html`<div class="error-box" role="alert"><p><strong>${error.message}</strong></p>
    ${error.param && html`<p>Field: <code>${error.param}</code></p>`}
    ${retry && html`<${Button} onClick=${retry}>Try again<//>`}</div>`;

export const Loading = ({ what = "Loading" }) => html`<p class="loading" role="status">${what}…</p>`;

/** Unix seconds as "5 s ago", the full time on hovering. */
export function Time({ at }) {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((count) => count + 1), 5000);
    return () => clearInterval(timer);
  }, []);
  return html`<time title=${time(at)} datetime=${at ? new Date(at * 1000).toISOString() : null}>${ago(at)}</time>`;
}

/** Text with a button that copies it. */
export function CopyText({ text, label = "Copy" }) {
  const field = useRef(null);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      notify("Copied.");
    } catch {
      const range = document.createRange();
      range.selectNodeContents(field.current);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      notify("Selected: press Ctrl+C to copy.");
    }
  };
  return html`<span class="copy"><code ref=${field}>${text}</code> <button type="button" class="plain" onClick=${copy}>${label}</button></span>`;
}
