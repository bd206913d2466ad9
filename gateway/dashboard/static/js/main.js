// The frame around every page: who is signed in, where one can go, and what is connected.
import { html, render, useEffect, useErrorBoundary, useRef, useState } from "./lib/ui.js";
import { del, get, onSignedOut } from "./lib/api.js";
import { Icon } from "./lib/icons.js";
import { disconnect, useConnection } from "./lib/live.js";
import { ErrorBox, Loading } from "./lib/parts.js";
import { Notices, notifyError } from "./lib/notify.js";
import { setSession } from "./lib/session.js";
import { useRoute } from "./lib/route.js";
import { Shortcuts } from "./lib/shortcuts.js";
import { Login } from "./login.js";

/** Name, heading, the letter after g; the first four are the ones that a narrow screen always shows. */
const PAGES = [
  ["overview", "Overview", "o"], ["fleet", "Fleet", "f"], ["requests", "Requests", "r"], ["playground", "Playground", "p"],
  ["tenants", "Tenants and keys", "t"], ["limits", "Limits", "l"], ["cost", "Cost", "c"], ["policies", "Policies", "y"],
  ["scaling", "Scaling", "e"], ["audit", "Audit", "a"], ["settings", "Settings", "s"],
];
/** Where a heading of the list stands, before which page. */
const GROUPS = { overview: "Watch", playground: "Try", tenants: "Accounts", policies: "Steer" };
const CONNECTIONS = {
  live: ["good", "●", "Live"],
  connecting: ["warn", "◌", "Connecting"],
  lost: ["bad", "■", "Connection lost, trying again"],
  off: ["off", "", ""], // nothing on this page changes by itself
};

function useTheme() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme ?? "auto");
  useEffect(() => {
    if (theme === "auto") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("tidegate.theme");
    } else {
      document.documentElement.dataset.theme = theme;
      localStorage.setItem("tidegate.theme", theme);
    }
  }, [theme]);
  return [theme, setTheme];
}

/** The module of a page, fetched when it is first looked at. */
function usePage(name) {
  const [loaded, setLoaded] = useState({ name: null, module: null, error: null });
  useEffect(() => {
    let wanted = true;
    const known = PAGES.some(([each]) => each === name);
    const found = known ? import(`./pages/${name}.js`) : Promise.reject(new Error(`There is no page ${name}.`));
    found.then(
      (module) => wanted && setLoaded({ name, module, error: null }),
      (error) => wanted && setLoaded({ name, module: null, error }),
    );
    return () => { wanted = false; };
  }, [name]);
  return loaded;
}

/** A page that fails leaves the rest of the frame standing. */
function Shielded({ children }) {
  const [error, reset] = useErrorBoundary((problem) => console.error(problem));
  if (!error) return children;
  return html`<div class="page"><h1 tabindex="-1">This page has failed</h1><${ErrorBox} error=${error} retry=${reset} /></div>`;
}

function Connection() {
  const [tone, sign, text] = CONNECTIONS[useConnection()];
  return html`<p class=${`connection ${tone}`} role="status"><span aria-hidden="true">${sign}</span> ${text}</p>`;
}

function Sidebar({ page, session, onSignOut }) {
  const [theme, setTheme] = useTheme();
  const [open, setOpen] = useState(false);
  useEffect(() => { setOpen(false); }, [page]);
  const link = ([each, text], at) => html`
    ${GROUPS[each] && html`<li key=${`${each}-group`} class="group" aria-hidden="true">${GROUPS[each]}</li>`}
    <li key=${each} class=${at < 4 ? "first" : "further"}>
      <a href=${`#${each}`} aria-current=${each === page ? "page" : null}><${Icon} name=${each} /><span>${text}</span></a></li>`;
  return html`<header class=${open ? "sidebar open" : "sidebar"}>
    <a class="brand" href="#overview" aria-label="Tidegate, overview"><img src="static/icon.svg" alt="" width="24" height="24" /><span>Tidegate</span></a>
    <${Connection} />
    <nav aria-label="Pages">
      <ul>${PAGES.map(link)}</ul>
      <button type="button" class="menu" aria-expanded=${open ? "true" : "false"} onClick=${() => setOpen(!open)}>
        <${Icon} name=${open ? "close" : "more"} /><span>${open ? "Less" : "More"}</span></button>
    </nav>
    <div class="sidebar-foot">
      <p class="who"><span class="unseen">Signed in as </span>${session.name} <span class="role">${session.role}</span></p>
      <label class="theme"><span>Theme</span> <select value=${theme} onChange=${(event) => setTheme(event.target.value)}>
        ${["auto", "light", "dark"].map((each) => html`<option key=${each} value=${each} selected=${each === theme}>${each}</option>`)}</select></label>
      <button type="button" class="plain" onClick=${onSignOut}><${Icon} name="signout" />Sign out</button>
    </div>
  </header>`;
}

function Frame({ session, onSignedOut }) {
  const { page } = useRoute();
  const { name, module, error } = usePage(page);
  const main = useRef(null);
  useEffect(() => {
    window.scrollTo(0, 0);
    // Whoever has chosen a page from the list is taken to it; whoever has just opened the dashboard stays at its top.
    if (name === page && document.activeElement?.closest("header nav")) main.current.querySelector("h1")?.focus();
  }, [name]);

  const signOut = async () => {
    try {
      await del("session");
    } catch (problem) {
      if (problem.status !== 401) return notifyError(problem);
    }
    return onSignedOut();
  };
  const Shown = name === page ? module?.default : null;
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>Skip to content</a>
    <div class="frame">
      <${Sidebar} page=${page} session=${session} onSignOut=${signOut} />
      <main id="main" tabindex="-1" ref=${main}>
        ${error && name === page && html`<div class="page"><h1 tabindex="-1">No such page</h1><${ErrorBox} error=${error} /></div>`}
        ${Shown ? html`<${Shielded} key=${page}><${Shown} /><//>` : !error && html`<${Loading} />`}
      </main>
    </div>
    <${Shortcuts} pages=${PAGES} />
    <${Notices} />`;
}

function App() {
  const [session, setState] = useState(undefined); // undefined: not known yet; null: nobody
  const [error, setError] = useState(null);
  const set = (now) => { setSession(now); if (!now) disconnect(); setState(now); };
  const ask = () => {
    setError(null);
    get("session").then(set, (problem) => problem.status === 401 ? set(null) : setError(problem));
  };
  useEffect(() => { ask(); return onSignedOut(() => set(null)); }, []);
  if (error) return html`<main class="login"><${ErrorBox} error=${error} retry=${ask} /></main>`;
  if (session === undefined) return html`<main class="login"><${Loading} /></main>`;
  if (session === null) return html`<${Login} onSignedIn=${set} /><${Notices} />`;
  return html`<${Frame} session=${session} onSignedOut=${() => set(null)} />`;
}

render(html`<${App} />`, document.getElementById("app"));
