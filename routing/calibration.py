"""Learns what a replica is like from what it did: the constants in `routing.speed`, how long answers are, and how well
the time to first token was predicted.

Two fits per replica (`routing.fit`), fed by each request:

    time to first token  =  (rtt + step)  +  prefill * tokens  +  prefill * curve * (uncached * position)
    time between tokens  =  step  +  request * running  +  kv * tokens held

`tokens` are the uncached ones of the request and of those ahead of it. What the running batch adds to a first token is
known from the second fit and taken off before, and so is the prefill of others from the time between tokens. The
engine's own count of its prefill time (SGLang, `/v1/loads`) starts the slope and then bounds it.

A request counts when it has ended, because only then the engine says how much really was cached; the first few count
at their first token, so that a start that is wrong a thousandfold is put right at once. An answer that came whole shows
only the sum of both times: it is divided as was expected, and counts a quarter.

A replica of which little is known is taken to be much like the others of its pool. And one that is not used any more,
because it once looked slow, slowly is so again; otherwise one stall could keep it idle for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from statistics import median
from typing import TYPE_CHECKING

from routing.learned import BOOTSTRAP, KNOWN, SETTLED, Learned, TtftError, Usual
from routing.types import InferenceRequest, Replica

if TYPE_CHECKING:
    from routing.router import Flight

FAILURE_RATE = 1 / 20
MAX_FAILURE = 0.9
ONE_OF = 4
"""Of so many requests one teaches, as long as what is learned holds: learning takes a third of what routing costs."""
RELAX_AFTER_S = 30.0
RELAX_EVERY_S = 1.0
RELAX_TO = 1.5
"""Times the pool's median, from where a replica nobody uses has to show that it is better."""
OUTPUT_TOKENS = 300.0
"""Of an answer, before any was seen."""
OUTPUT_RATE = 1 / 32
MAX_OUTPUT_TOKENS = 1_000_000.0
MAX_CLASSES = 4096
PUBLISHED_AT_ONCE = 64
"""Replicas that are brought up to date each second, at 3 us each."""


class Calibration:
    """Of all replicas of a pool."""

    def __init__(self) -> None:
        self.pool: Sequence[Replica] = ()
        """Between whom was decided last. Those that were never used are taken to be like the others: one that nobody
        has tried would never be, were the start values a thousandfold too slow."""
        self._learned: dict[Replica, Learned] = {}
        self._relax_at = 0.0
        self._turn = 0
        self._usual: Usual | None = None
        self._outputs: dict[str | tuple[str, int], tuple[float, int]] = {}

    def output_tokens(self, request: InferenceRequest) -> float:
        """Expected length of the answer: what the model's answers with about this limit had, never above the limit.
        A kind that was rarely seen is taken to be like all of the model's."""
        limit = request.max_output_tokens
        outputs = self._outputs
        mean, count = outputs.get((request.model, 0 if limit is None else limit.bit_length()), (0.0, 0))
        if count < 16:
            general = outputs.get(request.model)
            mean = (mean * count + 4.0 * (OUTPUT_TOKENS if general is None else general[0])) / (count + 4)
        return mean if limit is None or mean < limit else float(limit)

    def first_token(self, flight: Flight, now: float) -> None:
        if flight.replica.retired:
            return
        learned = self._of(flight.replica, now)
        learned.advance(now)
        uncached = max(0, flight.tokens - flight.cached)
        work = flight.replica.work
        mine = work.own.running
        # Peers' first tokens are not told: they are as many as theirs are of those that run.
        share = work.running / mine if 0 < mine < work.running else 1.0
        learned.prefill_ms += learned.prefill_of(flight, uncached) * share
        flight.marks = (learned.running_ms, learned.tokens_ms, learned.prefill_ms)
        observed_ms = (now - flight.dispatched_at) * 1000.0
        if flight.predicted_ttft_ms is not None:
            learned.error.add(flight.predicted_ttft_ms, observed_ms)
        if learned.ttft.count < BOOTSTRAP:
            flight.counted = True
            learned.learn_ttft(flight, observed_ms, uncached, 1.0)
            learned.publish(self._usual)

    def finished(
        self,
        request: InferenceRequest,
        flight: Flight,
        now: float,
        prompt_tokens: int | None,
        cached_tokens: int | None,
        output_tokens: int | None,
    ) -> None:
        if flight.replica.retired:
            return
        learned = self._of(flight.replica, now)
        learned.advance(now)
        speed = flight.replica.speed
        if speed.failure:
            speed.failure *= 1.0 - FAILURE_RATE
        if now >= self._relax_at:
            self._relax(now)
        if learned.step.count >= SETTLED and learned.ttft.calm and learned.step.calm:
            learned.skipped += 1
            if learned.skipped < ONE_OF:
                return
            learned.skipped = 0
        uncached = float(flight.tokens - flight.cached)
        if cached_tokens is not None and prompt_tokens:
            # In this request's own measure, which is an estimate where no tokeniser counted it.
            share = cached_tokens / prompt_tokens
            uncached = flight.tokens * (1.0 - (1.0 if share > 1.0 else share if share > 0.0 else 0.0))
        uncached = uncached if uncached > 0.0 else 0.0
        learned.turn = turn = not learned.turn
        early = learned.step.count < SETTLED
        first_at = flight.first_token_at
        if first_at is not None and flight.marks is None:
            pass  # nobody told us of its first token
        elif first_at is None or _came_whole(flight, first_at, now, output_tokens):
            total_ms = (now - flight.dispatched_at) * 1000.0
            length = flight.output_tokens if output_tokens is None else output_tokens
            learned.learn_whole(flight, total_ms, uncached, length)
        elif (turn or early) and not flight.counted:
            learned.learn_ttft(flight, (first_at - flight.dispatched_at) * 1000.0, uncached, 1.0)
        if output_tokens is not None and (not turn or early):
            learned.learn_step(flight, now, output_tokens)
            self._learn_output(request, output_tokens)
        if turn or early:
            learned.publish(self._usual)

    def failed(self, flight: Flight, now: float) -> None:
        if flight.replica.retired:
            return
        self._of(flight.replica, now).advance(now)
        speed = flight.replica.speed
        speed.failure = min(MAX_FAILURE, speed.failure + (1.0 - speed.failure) * FAILURE_RATE)
        speed.version += 1

    def error(self, replica: Replica) -> TtftError | None:
        """None before the first prediction was compared."""
        learned = self._learned.get(replica)
        if learned is None or not learned.error.count:
            return None
        error = learned.error
        return TtftError(
            error.count, error.bias, error.absolute, error.predicted_ms, error.observed_ms, tuple(error.ratios)
        )

    def forget(self, replica: Replica) -> None:
        """It is no longer in the pool."""
        self._learned.pop(replica, None)

    @property
    def known(self) -> int:
        """Replicas of which something is remembered."""
        return len(self._learned)

    def _of(self, replica: Replica, now: float) -> Learned:
        learned = self._learned.get(replica)
        if learned is None:
            if replica.speed.version == 0:
                self._start_like_others((replica,))
            learned = self._learned[replica] = Learned(replica, now)
        return learned

    def _start_like_others(self, replicas: Sequence[Replica]) -> None:
        known = [each.replica.speed for each in self._learned.values() if each.ttft.count >= BOOTSTRAP]
        if known and replicas:
            for name in ("prefill_ms", "curve", "step_ms", "request_ms", "kv_ms"):
                usual = median(getattr(each, name) for each in known)
                for replica in replicas:
                    setattr(replica.speed, name, usual)

    def _learn_output(self, request: InferenceRequest, output_tokens: int) -> None:
        observed = min(max(0.0, float(output_tokens)), MAX_OUTPUT_TOKENS)
        limit = request.max_output_tokens
        outputs = self._outputs
        for key in (request.model, (request.model, 0 if limit is None else limit.bit_length())):
            mean, count = outputs.get(key, (0.0, 0))
            if not count and len(outputs) >= MAX_CLASSES:
                return
            count += 1
            outputs[key] = (mean + (observed - mean) * max(OUTPUT_RATE, 1.0 / count), count)

    def _relax(self, now: float) -> None:
        """See the module."""
        self._relax_at = now + RELAX_EVERY_S
        learned = self._learned
        self._start_like_others([each for each in self.pool if not each.speed.version and each not in learned])
        known = [each for each in self._learned.values() if min(each.ttft.count, each.step.count) >= KNOWN // 2]
        if known:
            self._usual = Usual(
                median(each.near_ms() for each in known),
                median(each.ttft.slope for each in known),
                median(each.ttft.second / each.ttft.slope for each in known),
                median(each.step.base for each in known),
                median(each.step.slope for each in known),
                median(each.step.second for each in known),
            )
            # What is usual has changed for those as well that are not used just now.
            some = list(self._learned.values())
            self._turn = (self._turn + PUBLISHED_AT_ONCE) % len(some)
            for one in islice(chain(some[self._turn :], some), min(PUBLISHED_AT_ONCE, len(some))):
                one.publish(self._usual)
        idle = [each for each in self._learned.values() if now - each.touched_at > RELAX_AFTER_S]
        used = [each for each in self._learned.values() if each.ttft.count and now - each.touched_at <= RELAX_AFTER_S]
        if not idle or not used:
            return
        near = RELAX_TO * median(each.near_ms() for each in used)
        slope = RELAX_TO * median(each.ttft.slope for each in used)
        step = RELAX_TO * median(each.step.base for each in used)
        for each in idle:
            each.replica.speed.failure *= 0.97
            slow = max(each.near_ms() / near, each.ttft.slope / slope)
            if slow > 1.0:
                each.ttft.scale(max(0.9, 1.0 / slow))
                each.ttft.forget(1.25)
            if each.step.base > step:
                each.step.scale(max(0.9, step / each.step.base))
                each.step.forget(1.25)
            each.publish(self._usual)


def _came_whole(flight: Flight, first_at: float, now: float, output_tokens: int | None) -> bool:
    """What was called its first token was the answer: nothing to speak of passed between it and the end."""
    if output_tokens is None or output_tokens < 16:
        return False
    return (now - first_at) < 0.02 * (first_at - flight.dispatched_at) and (now - first_at) < 1e-4 * output_tokens
