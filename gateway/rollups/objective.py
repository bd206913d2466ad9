"""The error budget: what may fail, how much of it is left, and how fast it burns.

A burn rate of 1 uses the budget up in exactly its window. Two windows have to agree before anybody is told, a long one
so that it matters and a short one so that it is still going on (Google, "The Site Reliability Workbook", chapter 5,
"Alerting on SLOs"): 14.4 times over an hour and five minutes, or 6 times over six hours and half an hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway.config.slo import Slo
from gateway.metrics import TTFT_FINE_S
from gateway.rollups.findings import CRITICAL, WARNING, Finding
from gateway.rollups.outcomes import FAILED, UNCOUNTED
from gateway.rollups.quantiles import quantiles
from gateway.rollups.series import DAY, HOUR, Series
from gateway.rollups.tally import Tally

FAST, SLOW = 14.4, 6.0
FAST_S, SLOW_S = (3600.0, 300.0), (21_600.0, 1800.0)
AT_LEAST = 5
"""Failures in the shorter window. One of ten requests is no trend."""
JUDGED_FROM = 20
"""Answers from which on their 95th percentile says something."""


@dataclass(frozen=True, slots=True)
class Served:
    """Requests that count, and those of them that failed."""

    total: int
    failed: int

    @property
    def ratio(self) -> float:
        """Share that failed."""
        return self.failed / self.total if self.total else 0.0


def served(requests: Mapping[str, int], refused: Mapping[str, int]) -> Served:
    """By outcome, and by status of those whose caller never became known: 503 is the gateway's doing, 401 is not."""
    failed = sum(count for outcome, count in requests.items() if outcome in FAILED)
    failed += (away := sum(count for status, count in refused.items() if status >= "500"))
    return Served(sum(count for outcome, count in requests.items() if outcome not in UNCOUNTED) + away, failed)


def served_in(tallies: Iterable[Tally]) -> Served:
    total = failed = 0
    for tally in tallies:
        each = served(tally.requests, tally.refused)
        total, failed = total + each.total, failed + each.failed
    return Served(total, failed)


def recent(series: Series, last_s: float, now_unix_s: float) -> list[Tally]:
    """The slots of the last seconds, from the finest level that goes so far back."""
    level = series.levels[(HOUR if last_s <= HOUR.window_s else DAY).name]
    first = now_unix_s - last_s
    return [tally for start, tally in level.slots.items() if first <= start <= now_unix_s]


def budget_left(slo: Slo, series: Series, now_unix_s: float) -> float | None:
    """Share of the error budget that is left, below 0 when more failed than may; None while nothing was served."""
    level = series.levels[slo.window]
    first = now_unix_s - level.width.window_s
    all_ = served_in(tally for start, tally in level.slots.items() if first < start <= now_unix_s)
    if not all_.total:
        return None
    return 1.0 - all_.ratio / (1.0 - slo.availability)


def burning(slo: Slo, series: Series, now_unix_s: float) -> list[Finding]:
    """What is wrong with the objective."""
    found: list[Finding] = []
    for rate, windows, severity in ((FAST, FAST_S, CRITICAL), (SLOW, SLOW_S, WARNING)):
        long, short = (served_in(recent(series, last_s, now_unix_s)) for last_s in windows)
        burn = min(long.ratio, short.ratio) / (1.0 - slo.availability)
        if burn >= rate and short.failed >= AT_LEAST:
            found.append(
                Finding(
                    "burn",
                    severity,
                    f"{short.ratio:.1%} of requests fail, {burn:.0f} times as many as the objective allows",
                    f"last {windows[1] / 60:.0f} minutes: {short.failed} of {short.total}",
                    "See which outcome and pool they have: the requests page filters by both.",
                    "requests?outcome=failed",
                )
            )
            break
    if slo.ttft_p95_ms is not None:
        counts: dict[int, int] = {}
        for tally in recent(series, FAST_S[1], now_unix_s):
            for place, count in tally.ttft.items():
                counts[place] = counts.get(place, 0) + count
        (p95_s,) = quantiles(counts, TTFT_FINE_S, (0.95,))
        if p95_s is not None and sum(counts.values()) >= JUDGED_FROM and p95_s * 1000 > slo.ttft_p95_ms:
            found.append(
                Finding(
                    "ttft",
                    WARNING,
                    f"Answers begin late: 5 of 100 take more than {p95_s * 1000:.0f} ms, "
                    f"the objective is {slo.ttft_p95_ms:g} ms",
                    "last 5 minutes",
                    "Is there a queue, or a slow replica? Else the fleet is too small for its load.",
                    "fleet",
                )
            )
    return found
