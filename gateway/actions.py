"""What one worker does on an operator's order: facts are posted to the store, adapters changed through the engines.

The effects reach every worker, this one included, through its watch. Orders may be repeated without harm, and may meet
the same order of somebody else, or the watch loading what the configuration lists: what an engine refuses because it is
done already counts as done.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from backends.dialects.protocol import Adapter, AdapterRefused, NotOffered
from backends.side import SideChannelError
from backends.upstream import Upstream
from gateway.errors import GatewayError
from gateway.roster import UnknownReplica
from gateway.runtime import Runtime
from gateway.sources import AdapterChange, AdapterResult
from gateway.store.protocol import MAX_TTL_S, StoreError
from gateway.watch import notes

logger = logging.getLogger(__name__)


class StoreAway(GatewayError):
    status = 503
    code = "store_unavailable"


class Actions:
    """One worker's hand."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

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
                reason = await self._unload(upstream, change.name)
            else:
                reason = await self._load(upstream, change.name, change.path)
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

    async def _load(self, upstream: Upstream, name: str, path: str) -> str | None:
        """Load; returns why nothing had to be done, None when it was."""
        already = _already(await _held(upstream), name, path)
        if already is None:
            try:
                await upstream.dialect.load_adapter(upstream.side, name, path)
            except AdapterRefused:
                # Somebody else may have been quicker: another operator, the watch, another rank of the same engine.
                already = _already(await _held(upstream), name, path)
                if already is None:
                    raise
        await self._tell(upstream)
        return already

    async def _unload(self, upstream: Upstream, name: str) -> str | None:
        """Unload; returns why nothing had to be done, None when it was.

        Workers hear of it before the engine does, so that no request is sent for an adapter that is being dropped.
        """
        held = await _held(upstream)
        if held is not None and any(each.name == name for each in held):
            await self._post(upstream, tuple(each for each in held if each.name != name))
        reason = None
        try:
            await upstream.dialect.unload_adapter(upstream.side, name)
        except NotOffered:
            await self._post(upstream, held)
            raise
        except AdapterRefused as error:
            await self._tell(upstream)
            if held is None or any(each.name == name for each in await _held(upstream) or ()):
                raise
            reason = f"it does not hold it: {error}"
        else:
            await self._tell(upstream)
        return reason

    async def _tell(self, upstream: Upstream) -> None:
        """Have all workers know what a replica holds now. If that fails, the watch does it within seconds."""
        try:
            await self._post(upstream, await _held(upstream))
        except SideChannelError as error:
            logger.debug("adapters of %s: %s", upstream.replica.name, error)

    async def _post(self, upstream: Upstream, held: tuple[Adapter, ...] | None) -> None:
        if held is None:
            return
        note = msgspec.json.encode(notes.AdaptersNote(held))
        try:
            await self._runtime.store.post(notes.key(notes.ADAPTERS, upstream.replica), note, MAX_TTL_S)
        except (StoreError, ValueError) as error:  # ValueError: too many of them for one fact
            logger.warning("the adapters of replica %s are not shared: %s", upstream.replica.name, error)


async def _held(upstream: Upstream) -> tuple[Adapter, ...] | None:
    """What a replica says it holds; None when it does not list that. Raises `SideChannelError`."""
    try:
        return await upstream.dialect.adapters(upstream.side)
    except NotOffered:
        return None


def _already(held: tuple[Adapter, ...] | None, name: str, path: str) -> str | None:
    """Why an adapter need not be loaded; None when it must be. Raises `AdapterRefused` where the name means another."""
    for each in held or ():
        if each.name == name and each.resident:
            if each.path is not None and each.path.rstrip("/") != path.rstrip("/"):
                raise AdapterRefused(f"it holds another adapter of that name, from {each.path}; unload that first")
            return "it holds it already"
    return None
