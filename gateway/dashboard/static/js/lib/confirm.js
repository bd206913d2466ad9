import { html, render, useEffect, useRef, useState } from "./ui.js";

/** The question itself. `typed`: a word that has to be written before the button works. */
export function Confirm({ title, body, action = "Go on", danger = false, typed = null, onAnswer }) {
  const dialog = useRef(null);
  const [text, setText] = useState("");
  useEffect(() => { dialog.current.showModal(); }, []);
  const answer = (value) => { dialog.current.close(); onAnswer(value); };
  return html`<dialog ref=${dialog} class="confirm" aria-labelledby="confirm-title" onCancel=${(event) => { event.preventDefault(); answer(false); }}>
    <form method="dialog" onSubmit=${(event) => { event.preventDefault(); answer(true); }}>
      <h2 id="confirm-title">${title}</h2>
      <div class="confirm-body">${body}</div>
      ${typed && html`<label class="typed">Type <code>${typed}</code> to confirm
        <input value=${text} onInput=${(event) => setText(event.target.value)} autocomplete="off" /></label>`}
      <div class="confirm-actions">
        <button type="button" class="button normal" onClick=${() => answer(false)}>Cancel</button>
        <button type="submit" class=${`button ${danger ? "danger" : "primary"}`} disabled=${typed !== null && text !== typed}>${action}</button>
      </div>
    </form>
  </dialog>`;
}

/** `const confirm = useConfirm(); if (await confirm({ title, body, action, danger, typed })) …` */
export function useConfirm() {
  return (question) => new Promise((resolve) => {
    const place = document.createElement("div");
    document.body.append(place);
    const before = document.activeElement;
    const onAnswer = (value) => {
      render(null, place);
      place.remove();
      before?.focus?.();
      resolve(value);
    };
    render(html`<${Confirm} ...${question} onAnswer=${onAnswer} />`, place);
  });
}
