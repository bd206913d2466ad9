"""`tidegate simulate`: compare policies and fleets on a trace or a generated workload."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

from loadtests.simulator import plots
from loadtests.simulator.fleet import DEFAULT_ENGINE, FleetError, engine_named, engines_in
from loadtests.simulator.metrics import difference, interval, mean
from loadtests.simulator.runner import Cell, Store, Where, run_all
from loadtests.simulator.scaling.command import main as scaling
from loadtests.simulator.scenarios import scenarios
from loadtests.simulator.traces import TraceError, read_trace
from routing.policies import POLICY_NAMES, PolicyError, make_policy

DEFAULT_POLICIES = "cost,lmetric,sglang_cache_aware,least_outstanding,round_robin"
COLUMNS = (
    ("ttft_ms", "TTFT ms", 0),
    ("ttft_p50_ms", "p50", 0),
    ("ttft_p99_ms", "p99", 0),
    ("tpot_ms", "TPOT", 1),
    ("total_ms", "e2e ms", 0),
    ("total_p99_ms", "p99", 0),
    ("hit_rate", "hit", 3),
    ("good_share", "good", 3),
    ("usd_per_million", "$/M", 3),
    ("decide_us", "us", 0),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one comparison; returns the exit code: 1 when it could not be done, 2 when it was not said rightly what."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["scaling"]:
        return scaling(words[1:])
    options = parser().parse_args(words)
    try:
        cells, known = _cells(options)
        if options.plot is not None:
            plots.require()
        store = Store(options.store or Path(tempfile.gettempdir()) / "tidegate-simulator.json")
        found = run_all(
            cells,
            store,
            where=Where(options.traces, options.trace, options.usd_per_hour),
            processes=options.processes,
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
        if not found:
            print("tidegate simulate: this fleet does not answer most of these requests", file=sys.stderr)
            return 1
        text = known[cells[0].workload] if cells[0].workload in known else str(options.trace)
        print(report(found, text))
        if options.json is not None:
            rows = [{**asdict(cell), **figures} for cell, figures in found.items()]
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        if options.plot is not None:
            plots.draw(options.plot, text, sorted({cell.load for cell in cells}), summary(found))
    except (FleetError, PolicyError, TraceError, plots.PlotError) as error:
        print(f"tidegate simulate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tidegate simulate: {error}", file=sys.stderr)
        return 1
    return 0


def summary(found: Mapping[Cell, Mapping[str, float]]) -> dict[str, dict[float, dict[str, tuple[float, float]]]]:
    """Policy, load, metric: mean over the seeds and half its 95 % confidence interval."""
    gathered: dict[str, dict[float, dict[str, list[float]]]] = {}
    for cell, figures in found.items():
        metrics = gathered.setdefault(cell.policy, {}).setdefault(cell.load, {})
        for metric, value in figures.items():
            metrics.setdefault(metric, []).append(value)
    return {
        policy: {
            load: {metric: (mean(values), interval(values)) for metric, values in metrics.items()}
            for load, metrics in per_load.items()
        }
        for policy, per_load in gathered.items()
    }


def report(found: Mapping[Cell, Mapping[str, float]], title: str) -> str:
    """A table for each load; the last column compares end-to-end time with the first policy's, seed by seed."""
    rows = summary(found)
    first = next(iter(rows))
    lines = [title]
    for load in sorted({cell.load for cell in found}):
        per_s = next(figures["per_s"] for cell, figures in found.items() if cell.load == load)
        lines.append(f"\nat {load:.0%} of capacity, {per_s:.2f} requests/s")
        lines.append(f"{'policy':24}" + "".join(f"{label:>9}" for _, label, _ in COLUMNS) + f"   e2e of {first}")
        for policy, per_load in rows.items():
            figures = per_load[load]
            values = "".join(f"{figures[metric][0]:9.{digits}f}" for metric, _, digits in COLUMNS)
            lines.append(f"{policy:24}{values}   {_compared(found, load, first, policy)}")
    return "\n".join(lines)


def _compared(found: Mapping[Cell, Mapping[str, float]], load: float, first: str, policy: str) -> str:
    if policy == first:
        return ""
    pairs: dict[str, list[float]] = {}
    for name in (first, policy):
        cells = sorted(
            (cell for cell in found if cell.load == load and cell.policy == name), key=lambda cell: cell.seed
        )
        pairs[name] = [found[cell]["total_ms"] for cell in cells]
    change, half = difference(pairs[first], pairs[policy])
    return f"{change:+.1%}" + (f" ± {half:.1%}" if half else "")


def _cells(options: argparse.Namespace) -> tuple[list[Cell], dict[str, str]]:
    known = {name: scenario.text for name, scenario in scenarios(options.traces).items()}
    policies = options.policies.split(",")
    for policy in policies:
        make_policy(policy, Random(0))
    engine_named(options.engine)
    if options.trace is not None:
        trace = read_trace(options.trace)
        rows = len(trace)
        if trace[0].at == trace[-1].at:
            raise TraceError(f"{options.trace} has no two requests at different times, so that no rate can be told")
        workload, replicas, size = f"trace {options.trace.name}", options.replicas or 8, options.size or rows
    else:
        if options.workload not in known:
            raise TraceError(f"no workload is called {options.workload!r}; there are {', '.join(known)}")
        scenario = scenarios(options.traces)[options.workload]
        workload = options.workload
        replicas, size = options.replicas or scenario.replicas, options.size or scenario.size
    cells = [
        Cell(workload, load, seed, policy, size, options.engine, replicas, options.gateways, options.told)
        for load in options.load
        for seed in range(1, options.seeds + 1)
        for policy in policies
    ]
    return cells, known


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tidegate simulate",
        description="Compare routing policies on a simulated fleet, with the production code.",
        epilog="`tidegate simulate scaling` compares autoscalers over days; see its own --help.",
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake's JSON lines, or an Azure LLM trace as .csv")
    what.add_argument("--workload", metavar="NAME", help=f"one of {', '.join(scenarios())}")
    made.add_argument(
        "--policies", default=DEFAULT_POLICIES, metavar="NAME,...", help=f"of {', '.join(POLICY_NAMES)}, or module:name"
    )
    made.add_argument("--replicas", type=_count, metavar="N", help="default 8")
    made.add_argument(
        "--engine", default=DEFAULT_ENGINE, metavar="NAME", help=f"{', '.join(engines_in())} (default {DEFAULT_ENGINE})"
    )
    made.add_argument(
        "--load", type=_loads, default=(0.95,), metavar="SHARE,...", help="of the fleet's capacity (default 0.95)"
    )
    made.add_argument("--seeds", type=_count, default=5, metavar="N", help="runs of each, in pairs (default 5)")
    made.add_argument("--size", type=_count, metavar="N", help="requests of a run")
    made.add_argument("--gateways", type=_count, default=1, metavar="N", help="that tell each other (default 1)")
    made.add_argument("--told", action="store_true", help="tell the gateways how fast the engines are")
    made.add_argument("--usd-per-hour", type=float, default=0.0, metavar="USD", help="what a replica costs")
    made.add_argument("--traces", type=Path, metavar="FOLDER", help="whole traces, for the workloads made of them")
    made.add_argument("--processes", type=_count, default=2, metavar="N", help="default 2")
    made.add_argument("--store", type=Path, metavar="FILE", help="results of former runs (default: a temporary file)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them; needs matplotlib")
    return made


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _loads(text: str) -> tuple[float, ...]:
    try:
        loads = tuple(float(each) for each in text.split(","))
    except ValueError:
        loads = ()
    if not loads or not all(0.0 < each <= 5.0 for each in loads):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares of the capacity, such as 0.6,0.95")
    return loads
