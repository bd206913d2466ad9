// Calls of the admin API. A browser adds the session's cookie; the header says that this page is asking, which a
// page of another site cannot say.

/** A refusal of the gateway, in its own words; `status` 0 when it could not be reached. */
export class ApiError extends Error {
  constructor(status, { message, code = null, param = null, ...rest } = {}) {
    super(message ?? `The gateway answered ${status}.`);
    this.status = status;
    this.code = code;
    this.param = param;
    this.more = rest;
  }
}

const signedOut = new EventTarget();

/** Calls `listener` when the gateway says that nobody is signed in any more. */
export function onSignedOut(listener) {
  signedOut.addEventListener("out", listener);
  return () => signedOut.removeEventListener("out", listener);
}

/** Calls those listeners. */
export const tellSignedOut = () => signedOut.dispatchEvent(new Event("out"));

/**
 * One call; `path` is relative to /admin/. Resolves to the JSON of the answer (null where there is none).
 * @param {{version?: string|number, signal?: AbortSignal}} [options] version: what a change is a change of
 */
export async function call(method, path, body, { version, signal } = {}) {
  const headers = { "x-tidegate-csrf": "1", accept: "application/json" };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (version !== undefined) headers["if-match"] = `"${version}"`;
  let answer;
  try {
    answer = await fetch(path, {
      method, headers, signal, credentials: "same-origin", cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "The gateway does not answer. Is it running, and is this machine online?" });
  }
  const text = await answer.text();
  let content = null;
  try {
    content = text ? JSON.parse(text) : null;
  } catch {
    throw new ApiError(answer.status, { message: `The gateway answered ${answer.status} with something that is no JSON.` });
  }
  if (answer.ok) return content;
  if (answer.status === 401 && path !== "session") tellSignedOut();
  throw new ApiError(answer.status, content?.error ?? {});
}

export const get = (path, options) => call("GET", path, undefined, options);
export const post = (path, body, options) => call("POST", path, body, options);
export const put = (path, body, options) => call("PUT", path, body, options);
export const patch = (path, body, options) => call("PATCH", path, body, options);
export const del = (path, body, options) => call("DELETE", path, body, options);
