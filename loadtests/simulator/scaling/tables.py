"""The tables of docs/scaling.md, out of runs."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path

from loadtests.simulator.metrics import interval, mean
from loadtests.simulator.scaling.arrivals import courses
from loadtests.simulator.scaling.run import Figures, Run

BEGIN = "<!-- scaling: written by loadtests.simulator.scaling -->\n"
END = "<!-- /scaling -->"
Found = Mapping[Run, Figures]
Kind = tuple[str, str, bool, int]
"""Course, decider, spill, floor."""


def kinds(found: Found) -> dict[Kind, list[Figures]]:
    """All seeds of each, in order of the seeds."""
    gathered: dict[Kind, list[Figures]] = {}
    for what in sorted(found, key=lambda each: each.seed):
        gathered.setdefault((what.course, what.decider, what.spill, what.floor), []).append(found[what])
    return gathered


def page(days: Found, spike: Found, restarts: Found | None = None) -> str:
    """All tables: of days, of the first hour of a step, and of restarts."""
    gathered = kinds(days)
    known = courses()
    lines: list[str] = []
    for name in dict.fromkeys(what.course for what in days):
        lines += [f"#### {name}: {known[name].text}\n", *_table(gathered, name), ""]
    return "\n".join([*lines, *_spike(spike), "", *(_restarts(restarts) if restarts else ())])


def summary(found: Found) -> str:
    """For a terminal: one line for each kind of run."""
    lines = []
    for (course, decider, spill, floor), rows in kinds(found).items():
        extra = (" with spill" if spill else "") + (f" floor {floor}" if floor != 1 else "")
        lines.append(
            f"{course:14} {decider + extra:28} within {_mean(rows, 'within'):.2%}  p99 {_ms(rows, 'p99_ms'):>7} ms"
            f"  late {_mean(rows, 'late_minutes'):5.0f} min  {_mean(rows, 'replica_hours'):7.1f} replica hours"
            f"  {_mean(rows, 'usd'):7.0f} USD  {_mean(rows, 'changes'):5.0f} changes"
        )
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Between the marks of a page. Raises `ValueError` where there are none."""
    before, mark, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"{path} has no place marked for the tables")
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def _table(gathered: Mapping[Kind, list[Figures]], course: str) -> list[str]:
    oracle = gathered.get((course, "oracle", False, 1))
    lines = [
        "| | within 2 s | p90 / p99, ms | late minutes | gave up | replica hours | USD | x oracle | changes | most |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, decider, spill, _), rows in gathered.items():
        if name != course:
            continue
        ratio = "" if oracle is None else f"{_mean(rows, 'usd') / _mean(oracle, 'usd'):.2f}"
        half = 100.0 * interval([each.within for each in rows])
        lines.append(
            f"| {decider}{', spill' if spill else ''} | {_mean(rows, 'within'):.2%} ± {half:.2f}"
            f" | {_ms(rows, 'p90_ms')} / {_ms(rows, 'p99_ms')} | {_mean(rows, 'late_minutes'):,.0f}"
            f" | {_mean(rows, 'left_share'):.2%} | {_mean(rows, 'replica_hours'):,.0f} | {_mean(rows, 'usd'):,.0f}"
            f" | {ratio} | {_mean(rows, 'changes'):,.0f} | {_mean(rows, 'most'):.0f} |"
        )
    return lines


def _spike(found: Found) -> list[str]:
    lines = [
        "#### The first hour of an instant step from 1 to 50 requests/s\n",
        "| floor | spill | within | gave up | late minutes | longest wait, s | replicas, $ | rented, $ | floor, $ |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (_, _, spill, floor), rows in kinds(found).items():
        rented = mean([each.usd - 4.0 * each.replica_hours for each in rows])
        lines.append(
            f"| {floor} | {'on' if spill else 'off'} | {_mean(rows, 'within'):.1%} | {_mean(rows, 'left_share'):.1%}"
            f" | {_mean(rows, 'late_minutes'):.0f} | {_mean(rows, 'longest_wait_s'):.0f}"
            f" | {4.0 * _mean(rows, 'replica_hours'):.0f} | {rented:.0f} | {4 * floor} |"
        )
    return lines


def _restarts(found: Found) -> list[str]:
    gathered: dict[tuple[str, float], dict[str, list[Figures]]] = {}
    for what, figures in found.items():
        gathered.setdefault((what.course, what.count_from_h), {}).setdefault(what.restart, []).append(figures)
    lines = [
        "#### The gateway is killed, and decides again after 30 s: the three hours from then on\n",
        "| | gateway | within 2 s | late minutes | worst | USD | changes |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    names = {"": "lives on", "with": "with what it learned", "without": "without"}
    for (course, at), kinds_of in gathered.items():
        for restart, rows in kinds_of.items():
            half = 100.0 * interval([each.within for each in rows])
            lines.append(
                f"| {course}, hour {at:g} | {names[restart]} | {_mean(rows, 'within'):.2%} ± {half:.2f}"
                f" | {_mean(rows, 'late_minutes'):.1f} | {max(each.late_minutes for each in rows):.0f}"
                f" | {_mean(rows, 'usd'):,.0f} | {_mean(rows, 'changes'):.0f} |"
            )
    return [*lines, ""]


def _mean(rows: list[Figures], name: str) -> float:
    return mean([float(getattr(each, name)) for each in rows])


def _ms(rows: list[Figures], name: str) -> str:
    value = _mean(rows, name)
    return "∞" if value == inf else f"{value:,.0f}"
