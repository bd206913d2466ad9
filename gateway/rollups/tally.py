"""What happened in a stretch of time: the difference of two pulses, of all workers together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from gateway.rollups.pulse import ModelPulse, Pulse

N = TypeVar("N", int, float)
K = TypeVar("K", int, str)


class ModelTally(msgspec.Struct, array_like=True, gc=False):
    """Of one model."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    own_usd: float = 0.0
    rented_usd: float = 0.0
    answers: int = 0
    """Those with content, and the seconds until it came, added up."""
    ttft_s: float = 0.0
    told_prompt_tokens: int = 0
    """Prompt tokens of the requests whose engine said how many were cached."""

    @property
    def cached_ratio(self) -> float | None:
        """Share of prompt tokens that engines had cached; those that do not say are left out."""
        return self.cached_tokens / self.told_prompt_tokens if self.told_prompt_tokens else None

    def add(self, other: ModelTally) -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.own_usd += other.own_usd
        self.rented_usd += other.rented_usd
        self.answers += other.answers
        self.ttft_s += other.ttft_s
        self.told_prompt_tokens += other.told_prompt_tokens


class Tally(msgspec.Struct, omit_defaults=True):
    """Counts add up over time and workers; of what is a state at a moment, the highest value is kept."""

    covered_s: float = 0.0
    """Seconds that are counted here."""
    requests: dict[str, int] = {}
    refused: dict[str, int] = {}
    models: dict[str, ModelTally] = {}
    ttft: dict[int, int] = {}
    """By the number of the bucket; those that are empty are left out."""
    duration: dict[int, int] = {}
    sheds: dict[str, int] = {}
    limits: dict[str, int] = {}
    turned_away: dict[str, int] = {}
    spilled: int = 0
    retries: int = 0
    retries_refused: int = 0
    lost: dict[str, float] = {}
    in_flight: int = 0
    queue: dict[str, int] = {}
    loop_lag_s: float = 0.0

    @property
    def empty(self) -> bool:
        """Nothing happened."""
        return not (self.requests or self.refused or self.in_flight or self.queue or self.lost)

    def add(self, other: Tally) -> None:
        """Take in what another stretch of time counted."""
        self.covered_s += other.covered_s
        for mine, more in (
            (self.requests, other.requests),
            (self.refused, other.refused),
            (self.sheds, other.sheds),
            (self.limits, other.limits),
            (self.turned_away, other.turned_away),
        ):
            _add(mine, more)
        _add(self.lost, other.lost)
        _add(self.ttft, other.ttft)
        _add(self.duration, other.duration)
        for name, model in other.models.items():
            known = self.models.get(name)
            if known is None:
                known = self.models[name] = ModelTally()
            known.add(model)
        self.spilled += other.spilled
        self.retries += other.retries
        self.retries_refused += other.retries_refused
        self.in_flight = max(self.in_flight, other.in_flight)
        self.loop_lag_s = max(self.loop_lag_s, other.loop_lag_s)
        for name, count in other.queue.items():
            self.queue[name] = max(self.queue.get(name, 0), count)


def difference(before: Pulse | None, after: Pulse) -> Tally:
    """What one worker has counted from `before` to `after`.

    All of `after` where `before` is None or of another process: the counts of a worker begin at zero with it. Nothing
    is ever negative.
    """
    if before is None or (before.pid, before.started_unix_s) != (after.pid, after.started_unix_s):
        before = Pulse(after.worker, after.pid, after.started_unix_s)
    found = Tally(
        requests=_grown(before.requests, after.requests),
        refused=_grown(before.refused, after.refused),
        sheds=_grown(before.sheds, after.sheds),
        limits=_grown(before.limits, after.limits),
        turned_away=_grown(before.turned_away, after.turned_away),
        lost=_grown(before.lost, after.lost),
        spilled=max(0, after.spilled - before.spilled),
        in_flight=after.in_flight,
        queue=dict(after.queue),
        loop_lag_s=after.loop_lag_s,
    )
    pools = {pool.name: pool for pool in before.pools}
    for pool in after.pools:
        known = pools.get(pool.name)
        found.retries += max(0, pool.retries - (0 if known is None else known.retries))
        found.retries_refused += max(0, pool.retries_refused - (0 if known is None else known.retries_refused))
    for name, model in after.models.items():
        _add_model(found, name, before.models.get(name), model)
    return found


def together(tallies: list[Tally], covered_s: float) -> Tally:
    """Of all workers, in the same stretch of time: what is a state adds up as well."""
    found = Tally(covered_s=covered_s)
    for each in tallies:
        in_flight, queue = found.in_flight + each.in_flight, dict(found.queue)
        _add(queue, each.queue)
        found.add(each)
        found.in_flight, found.queue = in_flight, queue
    return found


def _add_model(tally: Tally, name: str, before: ModelPulse | None, after: ModelPulse) -> None:
    before = ModelPulse() if before is None else before
    if after.requests == before.requests:
        return
    ttft = _grown_list(before.ttft, after.ttft)
    tally.models[name] = ModelTally(
        max(0, after.requests - before.requests),
        max(0, after.failed - before.failed),
        max(0, after.prompt_tokens - before.prompt_tokens),
        max(0, after.cached_tokens - before.cached_tokens),
        max(0, after.completion_tokens - before.completion_tokens),
        max(0.0, after.own_usd - before.own_usd),
        max(0.0, after.rented_usd - before.rented_usd),
        sum(ttft.values()),
        max(0.0, after.ttft_s - before.ttft_s),
        max(0, after.told_prompt_tokens - before.told_prompt_tokens),
    )
    _add(tally.ttft, ttft)
    _add(tally.duration, _grown_list(before.duration, after.duration))


def _grown(before: Mapping[str, N], after: Mapping[str, N]) -> dict[str, N]:
    """What has become more, by how much."""
    return {name: value - before.get(name, 0) for name, value in after.items() if value > before.get(name, 0)}


def _grown_list(before: list[int], after: list[int]) -> dict[int, int]:
    if not before:
        return {place: count for place, count in enumerate(after) if count}
    return {
        place: count - known for place, (known, count) in enumerate(zip(before, after, strict=False)) if count > known
    }


def _add(mine: dict[K, N], more: Mapping[K, N]) -> None:
    for name, value in more.items():
        mine[name] = mine.get(name, 0) + value
