import { useCallback, useEffect, useRef, useState } from "./ui.js";
import { get } from "./api.js";

/**
 * What a path of the admin API answers: `{ data, error, loading, reload, set }`. The last answer stays while the next
 * one is being fetched. A path of null asks nothing.
 */
export function useData(path) {
  const [state, setState] = useState({ data: null, error: null, loading: path !== null });
  const asked = useRef(0);

  const reload = useCallback(async () => {
    if (path === null) return;
    const mine = ++asked.current;
    setState((before) => ({ ...before, loading: true }));
    try {
      const data = await get(path);
      if (mine === asked.current) setState({ data, error: null, loading: false });
    } catch (error) {
      if (mine === asked.current) setState((before) => ({ data: before.data, error, loading: false }));
    }
  }, [path]);

  useEffect(() => {
    reload();
    return () => { asked.current += 1; };
  }, [reload]);

  const set = useCallback((data) => setState({ data, error: null, loading: false }), []);
  return { ...state, reload, set };
}
