"""The figures that the conventions for generative AI have names for: tokens, duration, time to first token.

Kept in their own bounds and attributes, beside those of `/metrics`, and only where metrics go to a collector.
"""

from __future__ import annotations

from collections.abc import Iterator

from gateway.histogram import Histogram
from gateway.record import Exchange, Outcome
from gateway.telemetry import names
from gateway.telemetry.names import Names
from gateway.telemetry.places import Places

MAX_SERIES = 2000
"""Combinations of operation, provider, model and error; further ones are left out."""

Labels = tuple[tuple[str, str], ...]
Snapshot = tuple[str, str, str, list[tuple[Labels, tuple[float, ...], list[int], float]]]
"""Name, unit, description, and for each labels: bounds, counts per bucket, sum."""

_FINE = frozenset({Outcome.COMPLETED, Outcome.CLIENT_LEFT})


class GenAiCounts:
    """One worker's."""

    def __init__(self, words: Names, places: Places) -> None:
        self._names = words
        self._places = places
        self._tokens: dict[Labels, Histogram] = {}
        self._durations: dict[Labels, Histogram] = {}
        self._ttfts: dict[Labels, Histogram] = {}

    def observe(self, exchange: Exchange) -> None:
        """Count a settled exchange, if it came as far as a model."""
        operation = names.OPERATIONS.get(exchange.route)
        if not exchange.model or operation is None:
            return
        words, provider = self._names, self._places.of(exchange.pool, exchange.replica).provider
        labels: Labels = ((words.operation, operation), (words.request_model, exchange.model))
        if provider:
            labels += ((words.provider, provider),)
        failed = "" if exchange.outcome in _FINE else exchange.error_code or str(exchange.outcome)
        ended = (*labels, (words.error_type, failed)) if failed else labels
        _add(self._durations, ended, names.DURATION_BOUNDS_S, exchange.duration_s)
        ttft_s, used = exchange.ttft_s, exchange.usage
        if ttft_s is not None:
            _add(self._ttfts, labels, names.TTFT_BOUNDS_S, ttft_s)
        if used is not None:
            for kind, tokens in ((names.INPUT, used.prompt_tokens), (names.OUTPUT, used.completion_tokens)):
                _add(self._tokens, (*labels, (words.token_type, kind)), names.TOKEN_BOUNDS, tokens)

    def snapshot(self) -> Iterator[Snapshot]:
        """All of it at this moment."""
        words = self._names
        for name, unit, text, found, bounds in (
            (words.token_usage, "{token}", "Tokens of a request, by kind.", self._tokens, names.TOKEN_BOUNDS),
            (words.server_duration, "s", "Duration of a request.", self._durations, names.DURATION_BOUNDS_S),
            (words.server_ttft, "s", "Time to the first token.", self._ttfts, names.TTFT_BOUNDS_S),
        ):
            yield name, unit, text, [(labels, bounds, list(one.counts), one.total) for labels, one in found.items()]


def _add(found: dict[Labels, Histogram], labels: Labels, bounds: tuple[float, ...], value: float) -> None:
    histogram = found.get(labels)
    if histogram is None:
        if len(found) >= MAX_SERIES:
            return
        histogram = found[labels] = Histogram(bounds)
    histogram.observe(value)
