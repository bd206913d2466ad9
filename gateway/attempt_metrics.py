"""Counts what became of answers that broke off and of requests that were sent twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric


class AttemptMetrics:
    """One worker's."""

    def __init__(self) -> None:
        self._continuations: Counter[tuple[str, str]] = Counter()
        self._hedges: Counter[tuple[str, str]] = Counter()

    def broke_off(self, model: str, refusal: str) -> None:
        """`refusal`: why the answer could not be gone on with; empty: it is (`gateway.resumption`)."""
        self._continuations[model, refusal or "continued"] += 1

    def hedged(self, model: str, *, won: bool) -> None:
        """A request was sent twice; `won`: the second replica gave the answer (`gateway.hedging`)."""
        self._hedges[model, "won" if won else "lost"] += 1

    def families(self) -> Iterator[Metric]:
        for counts, name, text in (
            (
                self._continuations,
                "tidegate_continuations",
                "Answers that broke off at models with continuation on, by what came of it.",
            ),
            (self._hedges, "tidegate_hedges", "Requests that were sent to a second replica, by whether that one won."),
        ):
            family = CounterMetricFamily(name, text, labels=["model", "result"])
            for labels, count in list(counts.items()):
                family.add_metric(labels, count)
            yield family
