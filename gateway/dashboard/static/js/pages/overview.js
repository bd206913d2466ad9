// Is the gateway healthy, and if not, where: one line, what is wrong, the figures, and how they got there.
import { html, useEffect, useMemo, useState } from "../lib/ui.js";
import { useData } from "../lib/data.js";
import { useLive } from "../lib/live.js";
import { go, useRoute } from "../lib/route.js";
import { dollars, millis, number, percent } from "../lib/format.js";
import { Badge, Bar, Card, Empty, ErrorBox, Grid, Loading, Page, Stat, Table, Tabs, Time } from "../lib/parts.js";
import { Chart } from "../lib/chart.js";

export const title = "Overview";

const WINDOWS = [["live", "Live"], ["hour", "Hour"], ["day", "Day"], ["week", "Week"]];
const SPANS = { live: "last 5 minutes", hour: "last hour", day: "last day", week: "last week" };
const RELOAD_S = { hour: 60, day: 300, week: 1800 };
const LIVE_S = 300;
const SHOWN = 5;
const TONES = { critical: "bad", warning: "warn", notice: "info" };
const STATES = {
  healthy: { word: "Healthy", sign: "●", tone: "good" },
  degraded: { word: "Degraded", sign: "▲", tone: "warn" },
  failing: { word: "Failing", sign: "■", tone: "bad" },
};
const CLASSES = ["critical", "standard", "batch", "sheddable"];
const PERCENTILES = ["p50", "p95", "p99"];

export default function OverviewPage() {
  const { query } = useRoute();
  const asked = query.get("window");
  const span = asked in SPANS ? asked : "live";
  const { data, error, reload } = useData(`overview?window=${span}`);
  const live = useLive("overview");
  const series = useSeries(data, live, span);

  useEffect(() => {
    const every_s = RELOAD_S[span];
    if (!every_s) return undefined;
    const timer = setInterval(() => { if (!document.hidden) reload(); }, every_s * 1000);
    return () => clearInterval(timer);
  }, [span, reload]);

  if (data === null) {
    return html`<${Page} title=${title}>${error ? html`<${ErrorBox} error=${error} retry=${reload} />` : html`<div aria-busy="true"><${Loading} /></div>`}<//>`;
  }
  const current = live ?? data;
  const figures = span === "live" ? current.now : data.totals;
  const tabs = html`<${Tabs} label="Time shown" value=${span} options=${WINDOWS}
    onChange=${(next) => go(next === "live" ? "overview" : `overview?window=${next}`, { replace: true })} />`;

  return html`<${Page} title=${title} actions=${tabs}>
    ${error && html`<${ErrorBox} error=${error} retry=${reload} />`}
    <${Verdict} verdict=${current.verdict} now=${current.now} />
    <${Findings} findings=${current.health} />
    <${Tiles} figures=${figures} now=${current.now} slo=${current.slo} span=${span} />
    ${data.totals.requests === 0 && current.now.requests === 0 && span === "live" && html`<${Card}><${Empty}
      title="No requests in the last 5 minutes">Charts fill as soon as a client asks. To try it, open the
      <a href="#playground">playground</a>, or look at a longer time above.<//><//>`}
    <${Charts} series=${series} />
    <${Models} models=${data.models} span=${span} />
  <//>`;
}

/** The answer, in one line: it is read out when it changes. */
function Verdict({ verdict, now }) {
  const { word, sign, tone } = STATES[verdict.state];
  return html`<section class=${`verdict ${tone}`} aria-label="Verdict">
    <span class="verdict-sign" aria-hidden="true">${sign}</span>
    <div class="verdict-words" role="status">
      <p class="verdict-word">${word}</p>
      <p>${verdict.text}</p>
    </div>
    <dl class="verdict-facts">
      <div><dt>Replicas</dt><dd><a href="#fleet">${now.replicas_ready} of ${now.replicas}</a> take work</dd></div>
      <div><dt>Workers</dt><dd>${now.workers_up} of ${now.workers} answer</dd></div>
      <div><dt>Store</dt><dd>${now.store_mode ?? "–"}</dd></div>
      <div><dt>In flight</dt><dd>${number(now.in_flight)}</dd></div>
    </dl>
  </section>`;
}

/** What is wrong, the worst first: where it is, since when, and what to do. */
function Findings({ findings }) {
  const [all, setAll] = useState(false);
  if (!findings.length) return null;
  const shown = all ? findings : findings.slice(0, SHOWN);
  return html`<${Card} title="What needs attention" class="findings" aside=${`${findings.length} in all`}>
    <ol>${shown.map((each) => html`<li key=${each.id} data-finding=${each.id}>
      <${Badge} tone=${TONES[each.severity]}>${each.severity}<//>
      <div class="finding-words">
        <p class="finding-what">${each.link ? html`<a href=${`#${each.link}`}>${each.what}</a>` : each.what}</p>
        <p class="finding-where">${each.where} · since <${Time} at=${each.since_unix_s} /></p>
        <p class="finding-advice">${each.advice}</p>
      </div>
    </li>`)}</ol>
    ${findings.length > SHOWN && html`<button type="button" class="plain" aria-expanded=${all ? "true" : "false"}
      onClick=${() => setAll(!all)}>${all ? "Show fewer" : `Show ${findings.length - SHOWN} more`}</button>`}
  <//>`;
}

function Tiles({ figures, now, slo, span }) {
  const over = span === "live" ? "last 30 s" : SPANS[span];
  const limit = 1 - slo.availability;
  const errors = figures.error_ratio;
  const tone = errors === null || errors <= limit ? null : errors > 10 * limit ? "bad" : "warn";
  const left = slo.budget_left;
  const late = slo.ttft_p95_ms !== null && figures.ttft_ms.p95 !== null && figures.ttft_ms.p95 > slo.ttft_p95_ms;
  const line = CLASSES.filter((name) => now.queue[name]).map((name) => `${number(now.queue[name])} ${name}`);
  const paid = figures.own_usd + figures.rented_usd;
  return html`<div class="grid tiles">
    <${Stat} label="Requests per second" value=${number(figures.requests_per_s)} note=${`${number(figures.requests)} in the ${over}`} />
    <${Stat} label="Error rate" value=${percent(errors, 2)} tone=${tone}
      note=${tone ? `above the objective: ${percent(limit, 2)} may fail` : `${number(figures.failed)} failed, ${percent(limit, 2)} may`} />
    <${Percentiles} label="Time to first token" values=${figures.ttft_ms} tone=${late ? "warn" : null}
      note=${slo.ttft_p95_ms === null ? over : `${late ? "above" : "within"} the objective: p95 ${millis(slo.ttft_p95_ms)}`} />
    <${Percentiles} label="End to end" values=${figures.duration_ms} note=${over} />
    <${Stat} label="Prompt tokens from cache" value=${percent(figures.cached_ratio)}
      note=${`${number(figures.cached_tokens)} of ${number(figures.told_prompt_tokens)}`} />
    <${Stat} label="Waiting in line" value=${number(now.waiting)} tone=${now.waiting ? "warn" : null}
      note=${line.length ? line.join(", ") : "nobody waits, in any class"} />
    <div class="broad"><${Stat} label=${span === "live" ? "Dollars per hour" : "Dollars"}
      value=${dollars(span === "live" ? figures.own_usd_per_hour + figures.rented_usd_per_hour : paid)}
      note=${span === "live"
        ? `own ${dollars(figures.own_usd_per_hour)}, rented ${dollars(figures.rented_usd_per_hour)}`
        : `own ${dollars(figures.own_usd)}, rented ${dollars(figures.rented_usd)}`} /></div>
    <div class="broad"><${Stat} label=${`Error budget left, ${slo.window}`} value=${left === null ? "–" : percent(Math.max(-9.99, left), 0)}
      tone=${left === null || left > 0.25 ? null : left > 0 ? "warn" : "bad"}
      note=${left === null ? "nothing was served yet" : left <= 0 ? "it is spent" : `of the ${percent(limit, 2)} that may fail`}>
      ${left !== null && html`<${Bar} value=${left} label="Error budget left" text=${percent(left, 0)}
        tone=${left > 0.25 ? null : left > 0 ? "warn" : "bad"} />`}
    <//></div>
  </div>`;
}

function Percentiles({ label, values, note, tone }) {
  return html`<div class=${`stat percentiles ${tone ?? ""}`}>
    <div class="stat-label">${label}</div>
    <dl>${PERCENTILES.map((name) => html`<div key=${name}><dt>${name}</dt><dd class="stat-value">${millis(values[name])}</dd></div>`)}</dl>
    <div class="stat-note">${note}</div>
  </div>`;
}

function Charts({ series }) {
  const { times } = series;
  const lines = (name) => PERCENTILES.map((each) => ({ label: each, values: series[name][each] }));
  const classes = CLASSES.filter((name) => series.queue[name]);
  return html`<${Grid} min="24rem" class="charts">
    <${Card}><${Chart} title="Requests per second" times=${times} kind="area" format=${(value) => number(value)} series=${[
      { label: "all", values: series.requests_per_s }, { label: "failed", values: series.errors_per_s, colour: "--series-5" }]} /><//>
    <${Card}><${Chart} title="Time to first token" times=${times} format=${millis} series=${lines("ttft_ms")} /><//>
    <${Card}><${Chart} title="End to end" times=${times} format=${millis} series=${lines("duration_ms")} /><//>
    <${Card}><${Chart} title="Prompt tokens from cache" times=${times} kind="area" max=${1} format=${(value) => percent(value, 0)}
      series=${[{ label: "cached", values: series.cached_ratio }]} /><//>
    <${Card}><${Chart} title="Waiting in line, by class" times=${times} kind="stack"
      series=${(classes.length ? classes : ["standard"]).map((name) => ({ label: name, values: series.queue[name] ?? times.map(() => 0) }))} /><//>
    <${Card}><${Chart} title="Dollars per hour" times=${times} kind="stack" format=${dollars} series=${[
      { label: "own", values: series.own_usd_per_hour }, { label: "rented", values: series.rented_usd_per_hour, colour: "--series-3" }]} /><//>
  <//>`;
}

const COLUMNS = [
  { key: "model", label: "Model", value: (row) => row.model, cell: (row) => html`<a href=${`#requests?model=${encodeURIComponent(row.model)}`}>${row.model}</a>` },
  { key: "requests", label: "Requests", value: (row) => row.requests, cell: (row) => number(row.requests), align: "end" },
  { key: "failed", label: "Failed", value: (row) => row.failed, cell: (row) => row.failed ? html`<${Badge} tone="warn">${number(row.failed)}<//>` : "0", align: "end" },
  { key: "ttft", label: "First token, mean", value: (row) => row.ttft_ms ?? -1, cell: (row) => millis(row.ttft_ms), align: "end" },
  { key: "cached", label: "From cache", value: (row) => row.cached_ratio ?? -1, cell: (row) => percent(row.cached_ratio, 0), align: "end" },
  { key: "tokens", label: "Output tokens", value: (row) => row.completion_tokens, cell: (row) => number(row.completion_tokens), align: "end" },
  { key: "usd", label: "Dollars, own / rented", value: (row) => row.own_usd + row.rented_usd,
    cell: (row) => `${dollars(row.own_usd)} / ${dollars(row.rented_usd)}`, align: "end" },
];

const Models = ({ models, span }) => models.length > 0 && html`<${Card} title="Models" aside=${SPANS[span]}>
  <${Table} label="Models" columns=${COLUMNS} rows=${models} rowKey=${(row) => row.model} />
<//>`;

/** The charts' lines: what the gateway has kept, and in the live view a point for each event since. */
function useSeries(data, live, span) {
  const [points, setPoints] = useState([]);
  useEffect(() => { setPoints([]); }, [data]);
  useEffect(() => {
    if (span !== "live" || live === null) return;
    setPoints((before) => before.at(-1)?.at_unix_s === live.at_unix_s ? before
      : [...before, live].filter((each) => each.at_unix_s > live.at_unix_s - LIVE_S));
  }, [live, span]);

  return useMemo(() => {
    if (data === null) return null;
    const kept = data.series;
    if (span !== "live" || !points.length) return kept;
    const after = points.filter((each) => each.at_unix_s > (kept.times.at(-1) ?? 0) + kept.slot_s);
    const first = kept.times.findIndex((each) => each > points.at(-1).at_unix_s - LIVE_S);
    const begin = first < 0 ? kept.times.length : first;
    const joined = (old, pick) => [...old.slice(begin), ...after.map((each) => pick(each.now))];
    const named = (old, pick) => Object.fromEntries(Object.keys(old).map((name) => [name, joined(old[name], (now) => pick(now, name))]));
    const queue = Object.fromEntries(CLASSES.map((name) => [name, kept.queue[name] ?? kept.times.map(() => 0)])
      .filter(([name, old]) => old.some(Boolean) || after.some((each) => each.now.queue[name])));
    return {
      times: [...kept.times.slice(begin), ...after.map((each) => each.at_unix_s)],
      requests_per_s: joined(kept.requests_per_s, (now) => now.requests_per_s),
      errors_per_s: joined(kept.errors_per_s, (now) => now.errors_per_s),
      ttft_ms: named(kept.ttft_ms, (now, name) => now.ttft_ms[name]),
      duration_ms: named(kept.duration_ms, (now, name) => now.duration_ms[name]),
      cached_ratio: joined(kept.cached_ratio, (now) => now.cached_ratio),
      own_usd_per_hour: joined(kept.own_usd_per_hour, (now) => now.own_usd_per_hour),
      rented_usd_per_hour: joined(kept.rented_usd_per_hour, (now) => now.rented_usd_per_hour),
      queue: named(queue, (now, name) => now.queue[name] ?? 0),
    };
  }, [data, points, span]);
}
