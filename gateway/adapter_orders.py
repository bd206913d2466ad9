"""How an engine is told to load or unload a LoRA adapter, and how all workers come to know of it.

Orders may be repeated without harm, and may meet the same order of somebody else: an operator's, a request's, the
watch's. What an engine refuses because it is done already counts as done.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from backends.dialects.protocol import Adapter, AdapterRefused, NotOffered
from backends.side import SideChannelError
from backends.upstream import Upstream
from gateway.store.protocol import GATHER_S, MAX_TTL_S, Store, StoreError
from gateway.watch import notes

logger = logging.getLogger(__name__)

HEARD_S = 3 * GATHER_S
"""Until the other workers have heard of an adapter that is about to go, and what they sent before has arrived."""


class AdapterOrders:
    """One worker's orders to engines."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def load(self, upstream: Upstream, name: str, path: str) -> str | None:
        """Load; returns why nothing had to be done, None when it was.

        Raises `NotOffered`, `AdapterRefused`, `SideChannelError`.
        """
        already = _already(await held(upstream), name, path)
        if already is None:
            try:
                await upstream.dialect.load_adapter(upstream.side, name, path)
            except AdapterRefused:
                # Somebody else may have been quicker: another operator, the watch, another rank of the same engine.
                already = _already(await held(upstream), name, path)
                if already is None:
                    raise
        await self.tell(upstream)
        return already

    async def unload(self, upstream: Upstream, name: str) -> str | None:
        """Unload; returns why nothing had to be done, None when it was.

        Workers hear of it before the engine does, so that no request is sent for an adapter that is being dropped.
        Raises `NotOffered`, `AdapterRefused`, `SideChannelError`.
        """
        before = await held(upstream)
        upstream.dropping.add(name)
        try:
            if before is not None and any(each.name == name for each in before):
                await self.post(upstream, tuple(each for each in before if each.name != name))
                await asyncio.sleep(HEARD_S)
            return await self._unload(upstream, name, before)
        finally:
            upstream.dropping.discard(name)

    async def _unload(self, upstream: Upstream, name: str, before: tuple[Adapter, ...] | None) -> str | None:
        reason = None
        try:
            await upstream.dialect.unload_adapter(upstream.side, name)
        except NotOffered:
            await self.post(upstream, before)
            raise
        except AdapterRefused as error:
            await self.tell(upstream)
            if before is None or any(each.name == name for each in await held(upstream) or ()):
                raise
            reason = f"it does not hold it: {error}"
        else:
            await self.tell(upstream)
        return reason

    async def tell(self, upstream: Upstream) -> None:
        """Have all workers know what a replica holds now. If that fails, the watch does it within seconds."""
        try:
            await self.post(upstream, await held(upstream))
        except SideChannelError as error:
            logger.debug("adapters of %s: %s", upstream.replica.name, error)

    async def post(self, upstream: Upstream, adapters: tuple[Adapter, ...] | None) -> None:
        """Have all workers take a replica to hold these. None says nothing."""
        if adapters is None:
            return
        note = msgspec.json.encode(notes.AdaptersNote(adapters))
        try:
            await self._store.post(notes.key(notes.ADAPTERS, upstream.replica), note, MAX_TTL_S)
        except (StoreError, ValueError) as error:  # ValueError: too many of them for one fact
            logger.warning("the adapters of replica %s are not shared: %s", upstream.replica.name, error)


async def held(upstream: Upstream) -> tuple[Adapter, ...] | None:
    """What a replica says it holds; None when it does not list that. Raises `SideChannelError`."""
    try:
        return await upstream.dialect.adapters(upstream.side)
    except NotOffered:
        return None


def _already(adapters: tuple[Adapter, ...] | None, name: str, path: str) -> str | None:
    """Why an adapter need not be loaded; None when it must be. Raises `AdapterRefused` where the name means another."""
    for each in adapters or ():
        if each.name == name and each.resident:
            if each.path is not None and each.path.rstrip("/") != path.rstrip("/"):
                raise AdapterRefused(f"it holds another adapter of that name, from {each.path}; unload that first")
            return "it holds it already"
    return None
