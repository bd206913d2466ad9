"""All workers' glances as one map of the fleet: what changes seldom, and what changes all the time.

The first part names each replica once; the second has a short row for each, in the same order, so that 200 replicas fit
into 20 KB. A digest of the first is in both: who has another one asks for the first again. Nothing here asks anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import xxhash

from gateway.fleet_view.glance import Glance, ReplicaGlance

_LEAST_MS = 1e-3
"""A million tokens a second."""
LIVE_FIELDS = ("in_flight", "queued", "kv_use", "warm_tokens", "state", "share")
"""Of each row of `now`; `share` is left out where it is 1, `kv_use` has three places."""

_LEARNED = ("prefill_tokens_per_s", "tokens_per_s", "warm_budget")
"""Change a little with every request. They are told with the rest, and not a reason to ask for it again."""

Seen = dict[tuple[str, str], list[ReplicaGlance]]


class Chart:
    """The fleet at one moment, as all workers that answered see it."""

    def __init__(self, answers: Iterable[tuple[int, Glance | None]]) -> None:
        self.silent: list[int] = []
        """Workers that did not answer, by their numbers."""
        self._engines: dict[str, str] = {}
        self._seen: Seen = {}
        for index, answer in answers:
            if answer is None:
                self.silent.append(index)
                continue
            for pool in answer.pools:
                self._engines.setdefault(pool.name, pool.engine)
                for replica in pool.replicas:
                    self._seen.setdefault((pool.name, replica.name), []).append(replica)
        self._fixed = [_fixed(pool, seen) for (pool, _), seen in self._seen.items()]

    @property
    def digest(self) -> str:
        """Of everything that `whole` has and `now` has not."""
        told = [{name: value for name, value in each.items() if name not in _LEARNED} for each in self._fixed]
        return xxhash.xxh3_64_hexdigest(msgspec.json.encode([self._engines, told]))

    def whole(self) -> dict[str, Any]:
        """Everything: the answer to who looks for the first time."""
        pools = [{"name": name, "engine": engine} for name, engine in self._engines.items()]
        return {"pools": pools, "replicas": self._fixed, "fields": LIVE_FIELDS, **self.now()}

    def now(self) -> dict[str, Any]:
        """What changes all the time: a row for each replica, with its state as a place in `states`."""
        states: dict[tuple[str, str], int] = {}
        rows = [_row(seen, states) for seen in self._seen.values()]
        named = [{"kind": kind, "reason": reason} for kind, reason in states]
        return {"digest": self.digest, "states": named, "now": rows, "silent_workers": self.silent}


def _fixed(pool: str, seen: Sequence[ReplicaGlance]) -> dict[str, Any]:
    first = seen[0]
    ceilings = [each.ceiling for each in seen]
    return {
        "pool": pool,
        "replica": first.name,
        "region": first.region,
        "engine": first.engine,
        "hosted": first.hosted,
        "weight": first.weight,
        "ceiling": None if None in ceilings else sum(each for each in ceilings if each is not None),
        "draining": all(each.draining for each in seen),
        "cordoned": all(each.cordoned for each in seen),
        "warm_budget": max((each.warm_budget for each in seen if each.warm_budget is not None), default=None),
        "prefill_tokens_per_s": _rate(first.prefill_ms),
        "tokens_per_s": _rate(first.step_ms),
        "adapters": sorted({name for each in seen for name in each.adapters}),
        "loading": sorted({name for each in seen for name in each.loading}),
    }


def _rate(ms: float) -> float | None:
    """Per second, to two digits; None for what is too fast to be anything but not learned."""
    return float(f"{1000 / ms:.2g}") if ms >= _LEAST_MS else None


def _row(seen: Sequence[ReplicaGlance], states: dict[tuple[str, str], int]) -> list[Any]:
    reason = next((each.reason for each in seen if each.reason), "")
    worst = min(seen, key=lambda each: each.share)
    state = states.setdefault((_kind(seen, worst, reason), reason), len(states))
    kv_use = next((each.kv_use for each in seen if each.kv_use is not None), None)
    row: list[Any] = [
        sum(each.in_flight for each in seen),
        max(each.queued for each in seen),
        None if kv_use is None else round(kv_use, 3),
        max((each.warm_tokens for each in seen if each.warm_tokens is not None), default=None),
        state,
    ]
    return row if worst.share >= 1.0 else [*row, worst.share]


def _kind(seen: Sequence[ReplicaGlance], worst: ReplicaGlance, reason: str) -> str:
    """One word for the map: `ok`, `recovering` (it gets a part of its usual work, or will), `full`, `cordoned`,
    `draining` or `down`."""
    if any(each.draining for each in seen):
        return "draining"
    if reason in ("full", "cordoned"):
        return reason
    if reason in ("joining", "warming"):
        return "recovering"
    if reason:
        return "down"
    return "ok" if worst.share >= 1.0 else "recovering"
