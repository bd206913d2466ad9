import { html, useEffect, useState } from "./lib/ui.js";
import { get, post } from "./lib/api.js";
import { Button, ErrorBox, Field } from "./lib/parts.js";

/** Why somebody comes back from the identity provider and is not signed in: `/admin/?signin=…`. */
const REASONS = {
  expired: "That sign-in was begun too long ago, or in another browser. Please try again.",
  refused: "Your organisation's sign-in did not work. Try again; if it goes on, the gateway's log says why.",
  no_role: "You are known to your organisation, and have no role here. An owner can give you one in admin.oidc.roles.",
  unavailable: "Your organisation's sign-in does not answer. You can sign in with a token.",
  throttled: "There were too many failed sign-ins from here. Wait a minute, then try again.",
};

/** Asks who somebody is. `onSignedIn` gets the session. */
export function Login({ onSignedIn }) {
  const [token, setToken] = useState("");
  const [error, setError] = useState(() => {
    const why = new URLSearchParams(location.search).get("signin");
    return why ? { message: REASONS[why] ?? REASONS.refused } : null;
  });
  const [busy, setBusy] = useState(false);
  const [ways, setWays] = useState({ oidc: false });
  useEffect(() => {
    document.title = "Sign in · Tidegate";
    if (location.search) history.replaceState(null, "", location.pathname + location.hash);
    get("session/ways").then(setWays, () => {});
  }, []);

  const signIn = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      onSignedIn(await post("session", { token: token.trim() }));
    } catch (problem) {
      setError(problem);
    } finally {
      setBusy(false);
    }
  };
  return html`<main class="login" id="main">
    <form class="card" onSubmit=${signIn}>
      <img src="static/icon.svg" alt="" width="40" height="40" />
      <h1>Tidegate</h1>
      <${Field} label="Token" type="password" name="token" autocomplete="current-password" required autofocus
        hint="Yours from admin.tokens, or the owner's: admin.token, else the file admin-token in the gateway's state directory, which its log names."
        value=${token} onInput=${(event) => setToken(event.target.value)} />
      <${ErrorBox} error=${error} />
      <${Button} kind="primary" type="submit" busy=${busy}>Sign in<//>
      ${ways.oidc && html`<p class="or">or</p>
        <a class="button normal" href="session/oidc">Sign in at ${ways.oidc_name ?? "your organisation"}</a>`}
    </form>
  </main>`;
}
