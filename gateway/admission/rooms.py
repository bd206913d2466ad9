"""How much room every pool has, in the words of the queue."""

from __future__ import annotations

from collections.abc import Callable

from gateway.admission.doors import Doors
from gateway.fleet import Pool
from gateway.store.places import Room
from routing.capacity import pool_capacity, set_ceilings

FOREVER_US = 7 * 86_400_000_000
FRESH_S = 0.1
"""How long a sum over the replicas is good for: under load it is asked for with every request."""


class Rooms:
    """Reads what the replicas are known to carry.

    `queues`: whether the store can carry queues at all. `shared`: whether other gateways have places there, too, so
    that every place needs a lease; what only this process knows ends with it. `workers`: how many have lines of their
    own, where these are not shared: each has its part of those that may wait.
    """

    def __init__(self, *, queues: bool, shared: bool, workers: int = 1) -> None:
        self.queues = queues
        self.shared = shared
        self.doors: Doors | None = None
        """Which pools are shut; None: nobody waits for a first replica."""
        self.latest: Callable[[Pool], Pool] = _itself
        """A pool as it is after the last reload."""
        self._parts = 1 if shared else workers
        self._leases = {} if shared else {"lease_us": FOREVER_US, "grant_us": FOREVER_US, "gateway_us": FOREVER_US}
        self._known: dict[str, tuple[Pool, float, Room | None]] = {}

    def room(self, pool: Pool, now: float) -> Room | None:
        """The pool's room; None when requests do not queue for it: not wanted, not known, or nobody there to serve.
        No place at all while it gets its first replica: all wait."""
        known = self._known.get(pool.name)
        if known is not None and known[0] is pool and now < known[1]:
            return known[2]
        pool = self.latest(pool)  # a reload may have replaced it: there is one room, whoever asks
        if known is not None and known[0] is pool and now < known[1]:
            return known[2]
        room = self._read(pool, now)
        self._known[pool.name] = (pool, now + FRESH_S, room)
        return room

    def _read(self, pool: Pool, now: float) -> Room | None:
        queue = pool.settings.queue
        requests: int | None = None
        tokens: int | None = None
        parts = 1
        if not self.queues or queue.enabled is False:
            set_ceilings(pool.replicas, None)
            parts = self._parts
        else:
            requests, tokens = pool_capacity(pool.replicas, queue.headroom, now)
            set_ceilings(pool.replicas, None if requests is None else queue.headroom)
        if self.doors is not None:
            width = self.doors.width(pool, now)
            if width is not None:
                requests = width if requests is None else min(width, requests)
        if requests is None:
            return None
        shares = queue.shares
        return Room(
            requests=requests,
            tokens=tokens,
            shares=(shares.critical, shares.standard, shares.batch, shares.sheddable),
            max_waiting=max(1, queue.max_waiting // parts),
            max_waiting_per_tenant=max(1, queue.max_waiting_per_tenant // parts),
            **self._leases,
        )


def _itself(pool: Pool) -> Pool:
    return pool
