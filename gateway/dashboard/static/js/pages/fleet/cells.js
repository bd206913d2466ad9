import { html, classes, useRef, useState } from "../../lib/ui.js";
import { Badge } from "../../lib/parts.js";
import { number, percent } from "../../lib/format.js";
import { inWords, measures } from "./model.js";
import { stateOf } from "./words.js";

const step = (value) => (value === null ? "none" : Math.min(4, Math.floor(value * 5)));

/**
 * The replicas of a pool in one region. One of them is in the order of the Tab key; from there the arrows lead on.
 */
export function Cells({ pool, region, measure, compact, opened, onOpen }) {
  const place = useRef(null);
  const [at, setAt] = useState(0);
  const { value } = measures[measure];
  const first = Math.min(at, pool.replicas.length - 1);

  const moved = (event) => {
    const cells = [...place.current.querySelectorAll("button")];
    const now = cells.indexOf(document.activeElement);
    const across = Math.max(1, cells.findIndex((cell) => cell.offsetTop > cells[0].offsetTop));
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + across, ArrowUp: now - across, Home: 0, End: cells.length - 1 }[event.key];
    if (to === undefined || !cells[to]) return;
    event.preventDefault();
    setAt(to);
    cells[to].focus();
  };
  const name = `${pool.pool}${region ? `, ${region}` : ""}`;
  return html`<div class="pool">
    <h3>${pool.pool} <span class="engine">${pool.engine}</span> ${pool.hosted && html`<${Badge} tone="info">rented<//>`}</h3>
    <div class=${classes("cells", compact && "compact")} ref=${place} role="group" aria-label=${`Replicas of ${name}`} onKeyDown=${moved}>
      ${pool.replicas.map((each, place) => {
        const { sign, text, tone } = stateOf(each.kind);
        return html`<button key=${each.key} type="button" tabindex=${place === first ? 0 : -1} title=${inWords(each)}
          aria-label=${inWords(each)} aria-current=${each.key === opened ? "true" : null}
          class=${classes("cell", `shade-${step(value(each))}`, each.kind !== "ok" && `state-${tone}`)} onClick=${() => { setAt(place); onOpen(each); }}>
          ${compact
            ? html`<span class="figure">${each.kind === "ok" ? each.in_flight : sign}</span>`
            : html`<span class="name">${each.replica}</span>
              <span class=${`cell-state ${tone}`}>${sign} ${text}</span>
              <span class="line"><span>Load</span><${Track} share=${measures.load.value(each)} /><b>${each.in_flight}${each.ceiling === null ? "" : ` / ${number(each.ceiling)}`}</b></span>
              <span class="line"><span>KV</span><${Track} share=${each.kv_use} /><b>${each.kv_use === null ? "–" : percent(each.kv_use, 0)}</b></span>
              <span class="line"><span>Warm</span><${Track} share=${measures.warm.value(each)} /><b>${number(each.warm_tokens)}</b></span>
              <span class="foot">${each.adapters.length ? each.adapters.join(", ") : `${number(each.tokens_per_s)} tokens/s`}</span>`}
        </button>`;
      })}
    </div>
  </div>`;
}

const Track = ({ share }) => html`<i class="track"><i style=${{ width: `${Math.min(1, share ?? 0) * 100}%` }}></i></i>`;
