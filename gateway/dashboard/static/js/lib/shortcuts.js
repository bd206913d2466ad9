import { html, useEffect, useRef, useState } from "./ui.js";
import { go } from "./route.js";

const SEQUENCE_MS = 1200;
const typing = (target) => target.closest?.("input, textarea, select, [contenteditable]") && target.type !== "checkbox";

function focusSearch() {
  const main = document.getElementById("main");
  const field = main.querySelector("input[type=search]") ?? main.querySelector("input:not([type=checkbox], [type=radio]), select");
  field?.focus();
  field?.select?.();
  return Boolean(field);
}

/**
 * Keys for the whole page: g and a letter goes to a page, / to its search field, ? shows them all.
 * @param {[page: string, text: string, letter: string][]} pages
 */
export function Shortcuts({ pages }) {
  const [shown, setShown] = useState(false);
  useEffect(() => {
    let begunAt = 0;
    const pressed = (event) => {
      if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
      if (typing(event.target) || document.querySelector("dialog[open]")) return;
      const second = event.timeStamp - begunAt < SEQUENCE_MS;
      begunAt = 0;
      const page = second && pages.find(([, , letter]) => letter === event.key);
      if (page) go(page[0]);
      else if (event.key === "g") begunAt = event.timeStamp;
      else if (event.key === "?") setShown(true);
      else if (!(event.key === "/" && focusSearch())) return;
      event.preventDefault();
    };
    document.addEventListener("keydown", pressed);
    return () => document.removeEventListener("keydown", pressed);
  }, []);
  return shown && html`<${Help} pages=${pages} onClose=${() => setShown(false)} />`;
}

function Help({ pages, onClose }) {
  const dialog = useRef(null);
  useEffect(() => {
    const before = document.activeElement;
    dialog.current.showModal();
    return () => before?.focus?.();
  }, []);
  const row = (keys, text) => html`<div key=${text}><dt>${keys.map((key) => html`<kbd>${key}</kbd> `)}</dt><dd>${text}</dd></div>`;
  return html`<dialog ref=${dialog} class="confirm shortcuts" aria-labelledby="shortcuts-title" onClose=${onClose}>
    <h2 id="shortcuts-title">Keyboard</h2>
    <dl>
      ${row(["/"], "Search on this page")}
      ${row(["?"], "This list")}
      ${pages.map(([, text, letter]) => row(["g", letter], text))}
    </dl>
    <div class="confirm-actions"><button type="button" class="button normal" onClick=${() => dialog.current.close()}>Close</button></div>
  </dialog>`;
}
