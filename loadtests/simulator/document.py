"""The tables of docs/routing.md: what every policy did, and where the goals were met or missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loadtests.simulator.metrics import difference, interval, mean
from loadtests.simulator.runner import Cell
from loadtests.simulator.scenarios import Scenario

Found: TypeAlias = Mapping[Cell, Mapping[str, float]]

OURS, RIVAL = "cost", "lmetric"
BEHIND_BEST = 0.03
"""Mean TTFT may be so far behind the best other policy's of the workload."""
P99_BEHIND = 0.08
"""p99 TTFT may be so far behind LMetric's."""
AHEAD = -0.05
"""End-to-end must be at least so far ahead of LMetric's where replicas, adapters, regions or answers differ."""
GOAL_LOADS = (0.6, 0.8, 0.95)


@dataclass(frozen=True, slots=True)
class Change:
    """Ours against another's: share of theirs, and half the 95 % confidence interval of the pairs."""

    by: float
    half: float

    @property
    def text(self) -> str:
        return f"{self.by:+.1%} ± {self.half:.1%}" if self.half else f"{self.by:+.1%}"


class Results:
    """Runs by workload, load and policy, in order of their seeds."""

    def __init__(self, found: Found) -> None:
        self._rows: dict[tuple[str, float, str], list[Mapping[str, float]]] = {}
        for cell in sorted(found, key=lambda cell: cell.seed):
            self._rows.setdefault((cell.workload, cell.load, cell.policy), []).append(found[cell])
        self.workloads = list(dict.fromkeys(cell.workload for cell in found))
        self.loads = sorted({cell.load for cell in found})
        self.policies = list(dict.fromkeys(cell.policy for cell in found))

    def values(self, workload: str, load: float, policy: str, metric: str) -> list[float]:
        """Where there are classes to which price matters, times are those of the others."""
        return [row.get(f"people_{metric}", row[metric]) for row in self._rows[workload, load, policy]]

    def mean(self, workload: str, load: float, policy: str, metric: str) -> float:
        return mean(self.values(workload, load, policy, metric))

    def half(self, workload: str, load: float, policy: str, metric: str) -> float:
        return interval(self.values(workload, load, policy, metric))

    def change(self, workload: str, load: float, other: str, metric: str) -> Change:
        ours = self.values(workload, load, OURS, metric)
        return Change(*difference(ours, self.values(workload, load, other, metric)))

    def best(self, workload: str, load: float, metric: str) -> str:
        """The other policy with the least of it."""
        others = [policy for policy in self.policies if policy != OURS]
        return min(others, key=lambda policy: self.mean(workload, load, policy, metric))


def document(found: Found, known: Mapping[str, Scenario], seeds: int) -> str:
    """Markdown: a table of goals, then one of figures for each load."""
    results = Results(found)
    parts = [f"Means of {seeds} paired seeds, ± half the 95 % confidence interval of the pairs' differences.\n"]
    if OURS in results.policies and len(results.policies) > 1:
        parts.append(_goals(results, known))
    parts.extend(_figures(results, load) for load in results.loads)
    parts.append(_workloads(results, known))
    return "\n".join(parts)


def _goals(results: Results, known: Mapping[str, Scenario]) -> str:
    lines = [
        f"### `{OURS}` against the others\n",
        "| workload | load | mean TTFT to the best other | | mean TTFT to LMetric | p99 TTFT to LMetric |"
        " end-to-end to LMetric | missed |",
        "|---|--:|--:|---|--:|--:|--:|---|",
    ]
    rival = RIVAL if RIVAL in results.policies else None
    for workload in results.workloads:
        for load in results.loads:
            best = results.best(workload, load, "ttft_ms")
            to_best = results.change(workload, load, best, "ttft_ms")
            row = [workload, f"{load:.0%}", to_best.text, best]
            missed = ["mean TTFT"] if to_best.by > BEHIND_BEST else []
            if rival is not None:
                ttft, p99, total = (
                    results.change(workload, load, rival, metric) for metric in ("ttft_ms", "ttft_p99_ms", "total_ms")
                )
                row += [ttft.text, p99.text, total.text]
                missed += missed_against_rival(p99, total, differs=known[workload].differs)
            else:
                row += ["", "", ""]
            row.append(", ".join(missed) if load in GOAL_LOADS else "")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def missed_against_rival(p99: Change, total: Change, *, differs: bool) -> list[str]:
    """Which goals were not met."""
    missed: list[str] = []
    if p99.by > P99_BEHIND:
        missed.append("p99 TTFT")
    if differs and total.by > AHEAD:
        missed.append("end-to-end 5 % ahead")
    elif total.by - total.half > 0.0:
        missed.append("end-to-end")
    return missed


def _figures(results: Results, load: float) -> str:
    lines = [
        f"### At {load:.0%} of capacity\n",
        "Mean TTFT / p99 TTFT / mean end-to-end in ms (share of prompt tokens found in a cache).\n",
        f"| policy | {' | '.join(results.workloads)} |",
        f"|---|{'--:|' * len(results.workloads)}",
    ]
    for policy in results.policies:
        cells = []
        for workload in results.workloads:
            ttft, p99, total, hit = (
                results.mean(workload, load, policy, metric)
                for metric in ("ttft_ms", "ttft_p99_ms", "total_ms", "hit_rate")
            )
            cells.append(f"{ttft:,.0f} / {p99:,.0f} / {total:,.0f} ({hit:.2f})")
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _workloads(results: Results, known: Mapping[str, Scenario]) -> str:
    lines = [
        "### The workloads\n",
        "| workload | what it is | capacity, requests/s | `cost`: TTFT predicted, mean error | `cost`: decide, µs |",
        "|---|---|--:|--:|--:|",
    ]
    policy = OURS if OURS in results.policies else results.policies[0]
    load = results.loads[-1]
    for workload in results.workloads:
        per_s, error, decide = (
            results.mean(workload, load, policy, metric) for metric in ("per_s", "prediction_error", "decide_us")
        )
        lines.append(f"| {workload} | {known[workload].text} | {per_s / load:.1f} | {error:.0%} | {decide:.0f} |")
    return "\n".join([*lines, ""])


def gateways_table(found: Found, counts: Sequence[int]) -> str:
    """How much is lost when several gateways decide, each by what it knows."""
    gathered: dict[tuple[str, int], list[Mapping[str, float]]] = {}
    for cell in sorted(found, key=lambda cell: cell.seed):
        gathered.setdefault((cell.workload, cell.gateways), []).append(found[cell])
    lines = [
        "### Many gateways\n",
        f"`{OURS}` at 95 % of capacity; mean TTFT in ms / share found in a cache, and TTFT to one gateway's.\n",
        f"| workload, gateways: | {' | '.join(f'{count}' for count in counts)} |",
        f"|---|{'--:|' * len(counts)}",
    ]
    for workload in dict.fromkeys(cell.workload for cell in found):
        one = [row["ttft_ms"] for row in gathered[workload, counts[0]]]
        cells = []
        for count in counts:
            rows = gathered[workload, count]
            ttft = [row["ttft_ms"] for row in rows]
            text = f"{mean(ttft):,.0f} / {mean([row['hit_rate'] for row in rows]):.2f}"
            cells.append(text if count == counts[0] else f"{text}, {Change(*difference(ttft, one)).text}")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
