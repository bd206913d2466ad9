"""The matrix of policies, workloads and loads.

    python -m loadtests.simulator.tables --quick --policies cost,lmetric --workloads chats,distinct

prints a compact table after a minute or so; without `--quick` it runs five seeds of everything, and with `--write` puts
tables and pictures into docs/routing.md. What is done is kept, and only what depends on changed code is run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.simulator import plots
from loadtests.simulator.document import OURS, RIVAL, Results, document, gateways_table
from loadtests.simulator.metrics import mean
from loadtests.simulator.runner import Cell, Store, Where, run_all
from loadtests.simulator.scenarios import Scenario, scenarios
from routing.policies import POLICY_NAMES

QUICK = ("chats", "shared-prefix", "distinct", "mixed-speed", "output-mix", "hot-4")
QUICK_SIZE = 0.5
"""Of the requests of a whole run."""
LOADS: tuple[float, ...] = (0.6, 0.8, 0.95, 1.05)
GATEWAYS = (1, 4, 16)
GATEWAY_WORKLOADS = ("chats", "shared-prefix", "conversation")
PAGE = Path(__file__).parent.parent.parent / "docs" / "routing.md"
BEGIN, END = "<!-- simulation: written by loadtests.simulator.tables -->", "<!-- /simulation -->"


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    known = scenarios(options.traces)
    names = options.workloads.split(",") if options.workloads else list(QUICK if options.quick else known)
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no workload is called {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    policies = (options.policies or ("cost,lmetric" if options.quick else ",".join(POLICY_NAMES))).split(",")
    if options.write:
        plots.require()
    cells = matrix(known, names, policies, options)
    store = Store(options.store or Path(tempfile.gettempdir()) / "tidegate-simulator.json")
    found = run_all(
        cells,
        store,
        where=Where(options.traces),
        processes=options.processes,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(compact(found, names, policies))
    if options.write:
        write(found, known, store, options)
    return 0


def write(
    found: Mapping[Cell, Mapping[str, float]], known: Mapping[str, Scenario], store: Store, options: argparse.Namespace
) -> None:
    """Tables and pictures into docs/routing.md; the runs with several gateways are made here."""
    seeds = len({cell.seed for cell in found})
    shown = [name for name in GATEWAY_WORKLOADS if any(cell.workload == name for cell in found)]
    several = [
        Cell(
            name,
            0.95,
            seed,
            OURS,
            options.size or known[name].size,
            replicas=options.replicas or known[name].replicas,
            gateways=count,
        )
        for name in shown
        for count in GATEWAYS
        for seed in range(1, seeds + 1)
    ]
    text = document(found, known, seeds)
    if several:
        runs = run_all(several, store, where=Where(options.traces), processes=options.processes)
        text += "\n" + gateways_table(runs, GATEWAYS)
    results = Results(found)
    for metric, label in (("ttft_ms", "mean time to first token, ms"), ("total_ms", "mean end-to-end time, ms")):
        panels = {
            workload: {
                policy: [results.mean(workload, load, policy, metric) for load in results.loads]
                for policy in results.policies
            }
            for workload in results.workloads
        }
        picture = PAGE.parent / f"routing-{metric.removesuffix('_ms')}.png"
        plots.draw_grid(picture, f"{label}, by load in % of capacity", results.loads, panels)
        text += f"\n![{label}]({picture.name})\n"
    replace_between(PAGE, BEGIN, END, text)


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Raises `ValueError` where the page lacks the markers."""
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} has no {begin} ... {end}")
    page.write_text(f"{before}{begin}\n\n{text.rstrip()}\n\n{end}{after}")


def matrix(
    known: Mapping[str, Scenario], names: Sequence[str], policies: Sequence[str], options: argparse.Namespace
) -> list[Cell]:
    loads: tuple[float, ...] = (0.8, 0.95) if options.quick else LOADS
    if options.loads:
        loads = tuple(float(each) for each in options.loads.split(","))
    seeds = options.seeds or (1 if options.quick else 5)
    return [
        Cell(
            name,
            load,
            seed,
            policy,
            options.size or int(known[name].size * (QUICK_SIZE if options.quick else 1.0)),
            replicas=options.replicas or known[name].replicas,
            gateways=options.gateways,
            told=options.told,
        )
        for name in names
        for load in loads
        for seed in range(1, seeds + 1)
        for policy in policies
    ]


def compact(found: Mapping[Cell, Mapping[str, float]], names: Sequence[str], policies: Sequence[str]) -> str:
    """A table for a terminal, times in milliseconds: how far `cost` is from LMetric, and from the best other one."""
    lines: list[str] = []
    for name in names:
        for load in sorted({cell.load for cell in found if cell.workload == name}):
            lines.append(f"{name} at {load:.0%}")
            lines.append(
                f"  {'policy':24} {'ttft':>8} {'p99':>8} {'tpot':>6} {'e2e':>8} {'p99':>8} {'hit':>5} {'cv':>5}"
                f" {'err':>5} {'us':>5} {'loads':>6} {'$/M':>6}"
            )
            rows = {policy: _means(found, name, load, policy) for policy in policies}
            for policy, row in rows.items():
                lines.append(
                    f"  {policy:24} {row['ttft_ms']:8.0f} {row['ttft_p99_ms']:8.0f} {row['tpot_ms']:6.1f}"
                    f" {row['total_ms']:8.0f} {row['total_p99_ms']:8.0f} {row['hit_rate']:5.2f} {row['load_cv']:5.2f}"
                    f" {row['prediction_error']:5.2f} {row['decide_us']:5.0f} {row['adapter_loads']:6.0f}"
                    f" {row['usd_per_million']:6.3f}"
                )
                if "people_ttft_ms" in row:
                    people = (row[f"people_{metric}"] for metric in ("ttft_ms", "ttft_p99_ms", "total_ms"))
                    lines.append("    people only: ttft {:.0f}, p99 {:.0f}, e2e {:.0f}".format(*people))
            lines.extend(_compared(rows))
    return "\n".join(lines)


def _compared(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    if OURS not in rows or len(rows) < 2:
        return []
    ours = rows[OURS]
    others = {policy: row for policy, row in rows.items() if policy != OURS}
    lines: list[str] = []
    if RIVAL in others:
        lines.append(f"  {OURS} to {RIVAL}: {_differences(ours, {m: others[RIVAL][m] for m in _COMPARED})}")
    best = {metric: min(row[metric] for row in others.values()) for metric in _COMPARED}
    lines.append(f"  {OURS} to best:    {_differences(ours, best)}")
    return lines


_COMPARED = ("ttft_ms", "ttft_p99_ms", "total_ms", "total_p99_ms")


def _differences(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    return "  ".join(
        f"{metric.removesuffix('_ms')} {ours[metric] / theirs[metric] - 1.0:+.1%}" if theirs[metric] else metric
        for metric in _COMPARED
    )


def _means(found: Mapping[Cell, Mapping[str, float]], name: str, load: float, policy: str) -> dict[str, float]:
    rows = [row for cell, row in found.items() if (cell.workload, cell.load, cell.policy) == (name, load, policy)]
    return {metric: mean([row[metric] for row in rows]) for metric in rows[0]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.simulator.tables", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer requests, 80 %% and 95 %% only")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/routing.md")
    parser.add_argument("--policies", metavar="NAME,...", help="quick: cost,lmetric; otherwise all")
    parser.add_argument("--workloads", metavar="NAME,...", help=f"quick: {','.join(QUICK)}")
    parser.add_argument("--loads", metavar="SHARE,...", help="of the capacity, e.g. 0.6,0.95")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--size", type=int, help="requests of one run")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--told", action="store_true", help="gateways are told the engines' constants")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="where the whole traces are")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--store", type=Path, metavar="FILE", help="results of former runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
