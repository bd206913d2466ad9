"""Keeps why requests went where they went: for some of them, at a bounded cost to all.

An explanation can only be made at the moment of the decision: a millisecond later the replicas have other work. Making
one costs time in proportion to the replicas (`docs/admin.md` has the figures), so it is done for at most so many
requests a second, and never for longer than `SHARE` of the time. Whoever is not due pays one comparison.

The pace is that of the generic cell rate algorithm (ITU-T I.371): each explanation moves the theoretical time of the
next on by what it has cost, the larger of `1 / per_s` and its duration through `SHARE`. At 10 a second, of which each
takes 0.1 ms, the next is due 100 ms later; where each takes 2 ms, 400 ms later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Any

import msgspec

from gateway.inspection.trial import Pinned
from gateway.order import Order
from routing.explain import decided
from routing.router import Router
from routing.types import Decision, Policy, Replica

SHARE = 0.005
"""Of a worker's time at most."""
AT_ONCE_S = 1.0
"""So much of the pace may be used in one go, after a time of quiet."""
MAX_KEPT_BYTES = 8 * 2**20
"""With 200 replicas an explanation has some 60 KB."""
MAX_OF_ONE = 20
"""Decisions about one request that are kept."""


class Explaining:
    """One worker's. Synchronous, without I/O; belongs to the event loop."""

    __slots__ = ("_kept", "_next_at", "_order", "_pace_s", "due_at", "kept_bytes", "taken", "took_s")

    def __init__(self, per_s: float) -> None:
        """`per_s`: explanations a second at most; 0: none but those that are asked for."""
        self._kept: dict[str, list[bytes]] = {}
        self._order: deque[str] = deque()
        self._next_at = 0.0
        self.kept_bytes = 0
        self.taken = 0
        """Explanations made."""
        self.took_s = 0.0
        """What they took."""
        self.due_at = 0.0
        """From then on the next request is explained, in `time.monotonic()` seconds."""
        self.configure(per_s)

    def configure(self, per_s: float) -> None:
        """Go by another pace. What is kept stays."""
        self._pace_s = 1.0 / per_s if per_s > 0 else inf
        self._next_at = 0.0 if per_s > 0 else inf
        self.due_at = self._next_at

    def take(
        self, order: Order, now: float, tried: Sequence[Replica], decision: Decision, *, asked: bool = False
    ) -> None:
        """Keep what this decision, made for `now`, was made from, if it is due, or `asked` for, or a later one about a
        request that is explained already."""
        id = order.request.id
        known = self._kept.get(id)
        if (known is None and now < self.due_at and not asked) or (known is not None and len(known) >= MAX_OF_ONE):
            return
        router = _router(order.route.router)
        if router is None:
            return
        begun = time.thread_time()  # not the time in which others had the processor
        pinned = order.route.router
        replicas: Sequence[Replica] = order.route.pool.replicas
        told = decided(router, order.request, replicas, now, tried, decision)
        if isinstance(pinned, Pinned):
            told = pinned.told(told)
        text = msgspec.msgpack.encode({"pool": order.route.pool.name, **told})
        self._keep(id, known, text)
        took_s = time.thread_time() - begun
        self.taken += 1
        self.took_s += took_s
        if self._next_at < inf:
            self._next_at = max(self._next_at, now) + max(self._pace_s, took_s / SHARE)
            self.due_at = self._next_at - AT_ONCE_S

    def of(self, request_id: str) -> list[dict[str, Any]]:
        """The explanations of a request's decisions, in their order; empty: there are none, or not any more."""
        return [_rounded(msgspec.msgpack.decode(text)) for text in self._kept.get(request_id, ())]

    def explains(self, request_id: str) -> bool:
        """Whether there are any."""
        return request_id in self._kept

    def _keep(self, id: str, known: list[bytes] | None, text: bytes) -> None:
        if known is None:
            self._kept[id] = [text]
            self._order.append(id)
        else:
            known.append(text)
        self.kept_bytes += len(text)
        while self.kept_bytes > MAX_KEPT_BYTES and len(self._order) > 1:
            gone = self._kept.pop(self._order.popleft(), [])
            self.kept_bytes -= sum(map(len, gone))


def _rounded(value: Any) -> Any:
    """The same with its numbers as people read them: here, where somebody looks, and not where they are kept."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _router(policy: Policy) -> Router | None:
    """What can be explained; None for a policy of another kind."""
    if isinstance(policy, Pinned):
        policy = policy.router
    return policy if isinstance(policy, Router) else None
