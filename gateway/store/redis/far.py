"""The shared store in Redis, whole: one client, what is kept through it, and its operations as futures.

A future is asked for at once, so that what one request asks in a row goes out in one pipeline.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from gateway.store.limits import Cost, Scope
from gateway.store.places import Room, Ticket
from gateway.store.redis.client import RedisClient
from gateway.store.redis.limits import RedisLimits
from gateway.store.redis.places import RedisPlaces
from gateway.store.redis.store import RedisStore


@dataclass(frozen=True, slots=True)
class Far:
    """One worker's way to Redis. Closing the store closes the client."""

    client: RedisClient
    store: RedisStore
    limits: RedisLimits
    places: RedisPlaces

    def admit(self, id: str, scopes: tuple[Scope, ...], cost: Cost, lease_us: int) -> asyncio.Future[Any]:
        """Read the answer with `unpack_admission`."""
        return self.client.run(self.limits.admit_script, *self.limits.pack_admit(id, scopes, cost, lease_us))

    def settle(self, id: str, scopes: tuple[Scope, ...], reserved: Cost, used: Cost | None) -> asyncio.Future[Any]:
        """With `used` None: cancel."""
        if used is None:
            return self.client.run(self.limits.cancel_script, *self.limits.pack_cancel(id, scopes, reserved))
        return self.client.run(self.limits.settle_script, *self.limits.pack_settle(id, scopes, reserved, used))

    def enter(self, pool: str, ticket: Ticket, room: Room) -> asyncio.Future[Any]:
        """Read the answer with `unpack_entry`."""
        return self.places.begin_enter(pool, ticket, room)

    def leave(self, pool: str, id: str, gateway: str, used: int | None, room: Room) -> asyncio.Future[Any]:
        """Read the answer with `unpack_granted`."""
        return self.places.begin_leave(pool, id, gateway, used, room)
