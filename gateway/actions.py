"""What one worker does on an operator's order: facts are posted to the store, adapters changed through the engines.

The effects reach every worker, this one included, through its watch. Orders may be repeated without harm.
"""

from __future__ import annotations

import asyncio
import logging
import time

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
        (upstream,) = self._upstreams(pool, replica)
        key = notes.key(notes.DRAIN, upstream.replica)
        store = self._runtime.store
        try:
            if draining:
                await store.post(key, msgspec.json.encode(notes.DrainNote(time.time())))
            else:
                await store.withdraw(key)
        except StoreError as error:
            raise StoreAway(f"The order could not be passed on: {error}.", retry_after_s=1.0) from error

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
