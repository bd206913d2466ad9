// Sends a request of the playground, and hands on what is told of it as it comes.
import { ApiError } from "./api.js";

/** The events of a server-sent stream that are complete in `text`: [[name, data]…] and what is left of it. */
export function split(text) {
  const blocks = text.split("\n\n");
  const rest = blocks.pop();
  const events = blocks.map((block) => {
    let name = "message";
    const data = [];
    for (const line of block.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data.push(line.slice(6));
    }
    return [name, data.length ? JSON.parse(data.join("\n")) : null];
  });
  return [events, rest];
}

/**
 * POSTs `body` to the playground; `onEvent(name, data)` hears what happens. Resolves at the end; rejects with an
 * ApiError, or an AbortError when `signal` has ended it, which also ends the requests.
 */
export async function play(body, onEvent, signal) {
  let answer;
  try {
    answer = await fetch("playground", {
      method: "POST", signal, credentials: "same-origin", cache: "no-store", body: JSON.stringify(body),
      headers: { "x-tidegate-csrf": "1", "content-type": "application/json", accept: "text/event-stream" },
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The gateway does not answer. Is it running, and is this machine online?" });
  }
  if (!answer.ok) throw new ApiError(answer.status, (await answer.json().catch(() => null))?.error ?? {});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const [events, left] = split(rest + value);
    rest = left;
    events.forEach(([name, data]) => onEvent(name, data));
  }
}
