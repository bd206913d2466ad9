// What became of a request, in words and with the kind of sign that goes with it.
import { html } from "./ui.js";
import { Badge } from "./parts.js";

/** [kind of sign, what it means] by outcome. */
export const OUTCOMES = {
  completed: ["good", "The answer went out whole."],
  rejected: ["warn", "The gateway refused it: the client's doing, or a limit."],
  upstream_rejected: ["warn", "The model server refused it: the client's doing."],
  upstream_error: ["bad", "The model server failed before any content had gone out."],
  upstream_interrupted: ["bad", "The answer broke off after content had gone out."],
  unavailable: ["bad", "No replica could take it."],
  timeout: ["bad", "A deadline passed."],
  client_left: ["off", "The client left first."],
  drained: ["off", "The gateway was stopped."],
  ended_by_operator: ["off", "An operator ended it."],
  internal: ["bad", "A defect of the gateway; the log says more."],
};

/** A request's outcome as a word with a sign; its error code, where there is one, on hovering. */
export function Outcome({ row }) {
  const [tone, meaning] = OUTCOMES[row.outcome] ?? ["off", ""];
  return html`<${Badge} tone=${tone}
    title=${row.error_code ? `${row.error_code}: ${meaning}` : meaning}>${row.outcome}<//>`;
}

/** What a request under way is at, as a word. */
export const PHASES = {
  queue: "in the queue", reading: "reading", deciding: "deciding", connecting: "connecting",
  waiting_for_first_token: "waiting for the first token", streaming: "streaming",
};
