"""What one worker does on an operator's order: facts are posted to the store, adapters changed through the engines.

The effects reach every worker, this one included, through its watch. Orders may be repeated without harm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

import msgspec

from backends.dialects.protocol import AdapterRefused, NotOffered
from backends.side import SideChannelError
from backends.upstream import Upstream
from gateway.adapter_orders import AdapterOrders
from gateway.errors import GatewayError
from gateway.roster import UnknownReplica
from gateway.runtime import Runtime
from gateway.sources import AdapterChange, AdapterResult
from gateway.store.protocol import StoreError
from gateway.watch import notes

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StoreAway(GatewayError):
    status = 503
    code = "store_unavailable"


class Actions:
    """One worker's hand."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._orders = AdapterOrders(runtime.store)

    async def drain(self, pool: str, replica: str, draining: bool) -> None:
        """Tell every worker to send a replica no new work, or to send it work again.

        Raises `UnknownReplica`, `StoreAway`.
        """
        await self._order(notes.DRAIN, pool, replica, notes.DrainNote(time.time()) if draining else None)

    async def cordon(self, pool: str, replica: str, cordoned: bool) -> None:
        """Tell every worker to send a replica no new prompts, or to send it any again.

        Raises `UnknownReplica`, `StoreAway`.
        """
        await self._order(notes.CORDON, pool, replica, notes.CordonNote(time.time()) if cordoned else None)

    async def _order(self, kind: str, pool: str, replica: str, note: msgspec.Struct | None) -> None:
        (upstream,) = self._upstreams(pool, replica)
        key = notes.key(kind, upstream.replica)
        store = self._runtime.store
        try:
            if note is not None:
                await store.post(key, msgspec.json.encode(note))
            else:
                await store.withdraw(key)
        except StoreError as error:
            raise StoreAway(f"The order could not be passed on: {error}.", retry_after_s=1.0) from error

    async def announce(self, key: str, value: bytes, ttl_s: float | None) -> None:
        """Post a notice (`gateway.notices`). Raises `StoreAway`."""
        await self._stored(self._runtime.store.post(key, value, ttl_s))

    async def retract(self, key: str) -> None:
        """End a notice. Raises `StoreAway`."""
        await self._stored(self._runtime.store.withdraw(key))

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        """Take or renew a lease. Raises `StoreAway`."""
        return await self._stored(self._runtime.store.claim(lease, holder, ttl_s))

    async def _stored(self, operation: Awaitable[T]) -> T:
        try:
            return await operation
        except StoreError as error:
            raise StoreAway(f"The store could not be asked: {error}.", retry_after_s=1.0) from error

    async def change_adapter(self, change: AdapterChange) -> list[AdapterResult]:
        """Load or unload at all replicas at once; returns what came of it at each. Raises `UnknownReplica`."""
        upstreams = self._upstreams(change.pool, change.replica)
        return await asyncio.gather(*(self._change(upstream, change) for upstream in upstreams))

    def _upstreams(self, pool: str, replica: str | None) -> list[Upstream]:
        found = self._runtime.fleet.pools.get(pool)
        chosen = [
            upstream
            for each, upstream in (() if found is None else found.upstreams.items())
            if replica is None or each.name == replica
        ]
        if not chosen:
            raise UnknownReplica(f"This worker knows no {pool}/{replica or ''}; is the configuration just changing?")
        return chosen

    async def _change(self, upstream: Upstream, change: AdapterChange) -> AdapterResult:
        replica = upstream.replica.name
        try:
            if change.path is None:
                reason = await self._orders.unload(upstream, change.name)
            else:
                reason = await self._orders.load(upstream, change.name, change.path)
        except NotOffered as error:
            return AdapterResult(replica, ok=False, status=501, reason=str(error))
        except AdapterRefused as error:
            return AdapterResult(replica, ok=False, status=409, reason=str(error))
        except SideChannelError as error:
            return AdapterResult(replica, ok=False, status=502, reason=str(error))
        if reason is None:
            verb = "unloaded" if change.path is None else "loaded"
            logger.info("replica %s has %s the adapter %s on an operator's order", replica, verb, change.name)
        return AdapterResult(replica, ok=True, changed=reason is None, reason=reason)
