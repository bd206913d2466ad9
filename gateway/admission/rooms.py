"""How much room every pool has, in the words of the queue."""

from __future__ import annotations

from gateway.fleet import Pool
from gateway.store.places import Room
from routing.capacity import pool_capacity, set_ceilings

FOREVER_US = 7 * 86_400_000_000
FRESH_S = 0.1
"""How long a sum over the replicas is good for: under load it is asked for with every request."""


class Rooms:
    """Reads what the replicas are known to carry.

    `queues`: whether the store can carry queues at all. `shared`: whether other gateways have places there, too, so
    that every place needs a lease; what only this process knows ends with it.
    """

    def __init__(self, *, queues: bool, shared: bool) -> None:
        self.queues = queues
        self._leases = {} if shared else {"lease_us": FOREVER_US, "grant_us": FOREVER_US, "gateway_us": FOREVER_US}
        self._known: dict[str, tuple[Pool, float, Room | None]] = {}

    def room(self, pool: Pool, now: float) -> Room | None:
        """The pool's room; None when requests do not queue for it: not wanted, not known, or nobody there to serve."""
        known = self._known.get(pool.name)
        if known is not None and known[0] is pool and now < known[1]:
            return known[2]
        room = self._read(pool, now)
        self._known[pool.name] = (pool, now + FRESH_S, room)
        return room

    def _read(self, pool: Pool, now: float) -> Room | None:
        queue = pool.settings.queue
        if not self.queues or queue.enabled is False:
            set_ceilings(pool.replicas, None)
            return None
        requests, tokens = pool_capacity(pool.replicas, queue.headroom, now)
        set_ceilings(pool.replicas, None if requests is None else queue.headroom)
        if requests is None:
            return None
        shares = queue.shares
        return Room(
            requests=requests,
            tokens=tokens,
            shares=(shares.critical, shares.standard, shares.batch, shares.sheddable),
            max_waiting=queue.max_waiting,
            max_waiting_per_tenant=queue.max_waiting_per_tenant,
            **self._leases,
        )
