"""A second policy beside the one in force: what it would have done with the same request, which it never sends.

It is asked after the request was dispatched, so that nobody waits for it. What that dispatch has changed (the place
and the work at the chosen replica, the belief that the prompt is cached there, where the session went) is left out of
what it sees. Both choices are then measured by one yardstick, the default policy's prediction of the time to the first
token, since most policies predict none: with two yardsticks one would compare predictions, not choices.

A policy with state of its own (a position in a round, a tree) keeps it from one question to the next. It learns of no
request that it was not asked about, so that such a policy is judged a little worse than it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from routing.policies.cost import Cost, averages
from routing.router import PoolState, Router
from routing.types import Chooser, Decision, InferenceRequest, Replica, View


@dataclass(frozen=True, slots=True)
class Comparison:
    """What both would have from one request."""

    chosen: Replica | None
    """By the shadow; None: it would have refused."""
    same: bool
    cached_tokens: int | None
    """Prompt tokens that the shadow's choice is believed to hold; None where the prompt has no keys."""
    real_cached_tokens: int | None
    ttft_ms: float | None
    """Predicted for the shadow's choice."""
    real_ttft_ms: float


class Beside(Router):
    """A policy that decides beside the one in force, over the same books."""

    def __init__(self, chooser: Chooser, state: PoolState, rng: Random) -> None:
        super().__init__(
            chooser, state, rng, stay_where_loaded=not getattr(chooser, "weighs_adapters", False), quiet=True
        )
        self._yardstick = Cost(rng)
        self._seen: View | None = None

    @property
    def failures(self) -> int:
        """How often the policy, one of the operator's own, did not decide, so that another did in its place."""
        return int(getattr(self.chooser, "failures", 0))

    def view(self, request: InferenceRequest, now: float) -> View:
        """For `decide`: what there was to see before the dispatch."""
        return self._seen or super().view(request, now)

    def compare(
        self,
        request: InferenceRequest,
        replicas: Sequence[Replica],
        real: Replica,
        now: float,
        session: Replica | None,
    ) -> Comparison:
        """`real`: where the request was dispatched at `now`. `session`: where the last one of its session had gone."""
        with _as_before(self.state, request, real):
            seen = self._before(request, real, now, session)
            self._seen = seen if self.chooser.wants_prefix else View(now, self._rng, {}, seen.output_tokens, session)
            try:
                decision = self.decide(request, replicas, now)
            finally:
                self._seen = None
            return self._measured(request, replicas, real, decision, seen)

    def _before(self, request: InferenceRequest, real: Replica, now: float, session: Replica | None) -> View:
        state, prefix = self.state, request.prefix
        matches: dict[Replica, int] = {}
        if prefix is not None:
            found = state.index.match(prefix)
            matches = {state.by_slot[slot]: int(count * prefix.unit_tokens) for slot, count in found.items()}
            flight = state.flights.get((request.id, real))
            if flight is not None:
                matches[real] = flight.cached
        return View(now, self._rng, matches, state.calibration.output_tokens(request), session)

    def _measured(
        self,
        request: InferenceRequest,
        replicas: Sequence[Replica],
        real: Replica,
        decision: Decision,
        seen: View,
    ) -> Comparison:
        chosen, usual, known = decision.replica, averages(replicas), request.prefix is not None
        real_ttft_ms = self._yardstick.terms(request, real, seen, usual)["ttft"]
        ttft_ms: float | None = None
        if chosen is not None:
            ttft_ms = real_ttft_ms if chosen is real else self._yardstick.terms(request, chosen, seen, usual)["ttft"]
        return Comparison(
            chosen,
            chosen is real,
            seen.matches.get(chosen, 0) if known and chosen is not None else None,
            seen.matches.get(real, 0) if known else None,
            ttft_ms,
            real_ttft_ms,
        )


@contextmanager
def _as_before(state: PoolState, request: InferenceRequest, replica: Replica) -> Iterator[None]:
    """The replica without this request's own place and work, for as long as the block lasts; nothing awaits in it."""
    flight = state.flights.get((request.id, replica))
    if flight is None or flight.first_token_at is not None:
        yield
        return
    work, uncached = replica.work, flight.tokens - flight.cached
    replica.in_flight -= 1
    replica.in_flight_bytes -= request.prompt_bytes
    work.queued -= 1
    work.queued_tokens -= uncached
    try:
        yield
    finally:
        replica.in_flight += 1
        replica.in_flight_bytes += request.prompt_bytes
        work.queued += 1
        work.queued_tokens += uncached
