import { html, useEffect, useState } from "./ui.js";

const KEPT_MS = 8000;
let notices = [];
let next = 1;
const listeners = new Set();

function set(now) {
  notices = now;
  listeners.forEach((listener) => listener(now));
}

const dismiss = (id) => set(notices.filter((notice) => notice.id !== id));

/**
 * Says something for a few seconds. An error stays until it is dismissed.
 * @param {{kind?: "ok"|"error", undo?: () => Promise<unknown>}} [options]
 */
export function notify(text, { kind = "ok", undo = null } = {}) {
  const id = next++;
  set([...notices.slice(-3), { id, text: String(text), kind, undo }]);
  if (kind !== "error") setTimeout(() => dismiss(id), KEPT_MS);
}

/** An error of the admin API, or any other one. */
export const notifyError = (error) => notify(error?.message ?? String(error), { kind: "error" });

export function Notices() {
  const [shown, setShown] = useState(notices);
  useEffect(() => {
    listeners.add(setShown);
    return () => listeners.delete(setShown);
  }, []);
  const undo = async (notice) => {
    dismiss(notice.id);
    try {
      await notice.undo();
      notify("Undone.");
    } catch (error) {
      notifyError(error);
    }
  };
  return html`<div class="notices" role="status" aria-live="polite">
    ${shown.map((notice) => html`<div class=${`notice ${notice.kind}`} key=${notice.id} role=${notice.kind === "error" ? "alert" : null}>
      <span class="text">${notice.text}</span>
      ${notice.undo && html`<button class="plain" onClick=${() => undo(notice)}>Undo</button>`}
      <button class="plain" aria-label="Dismiss" onClick=${() => dismiss(notice.id)}>✕</button>
    </div>`)}
  </div>`;
}
