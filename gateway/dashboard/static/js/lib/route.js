import { useEffect, useState } from "./ui.js";

/** `#requests/req_1?tenant=acme` → { page: "requests", rest: ["req_1"], query: URLSearchParams } */
export function parse(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [page = "", ...rest] = path.split("/").map((part) => { try { return decodeURIComponent(part); } catch { return part; } });
  return { page: page || "overview", rest: rest.filter(Boolean), query: new URLSearchParams(search) };
}

/** To another page, or the same one with another query; `replace` keeps the back button as it was. */
export function go(to, { replace = false } = {}) {
  const hash = `#${to}`;
  if (replace) {
    history.replaceState(null, "", hash);
    window.dispatchEvent(new HashChangeEvent("hashchange"));
  } else {
    location.hash = hash;
  }
}

export function useRoute() {
  const [route, setRoute] = useState(() => parse(location.hash));
  useEffect(() => {
    const changed = () => setRoute(parse(location.hash));
    window.addEventListener("hashchange", changed);
    return () => window.removeEventListener("hashchange", changed);
  }, []);
  return route;
}
