"""Members that say they are about to go: given no new work, as `tidegate drain` does, for as long as they say so.

An operator's drain is left alone: only what was drained from here is undrained from here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.members.merge import Placed
from gateway.sources import Silent, Source

logger = logging.getLogger("tidegate")

AGAIN_S = 1.0

Place = tuple[str, str]
"""Pool and address."""


class Drains:
    """Has workers follow; `run` until cancelled."""

    def __init__(self, sources: Sequence[Source], settings: Callable[[], Settings]) -> None:
        self._sources = sources
        self._settings = settings
        self._wanted: set[Place] = set()
        self._done: set[Place] = set()
        self._wake = asyncio.Event()

    def want(self, members: Mapping[str, Sequence[Placed]]) -> None:
        """The members as they are now."""
        wanted = {
            (pool, each.place[0])
            for pool, several in members.items()
            for each in several
            if each.place is not None and each.member.state == "draining"
        }
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    async def run(self) -> None:
        """Order what is wanted and not done yet; what fails is tried again."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            left = [await self._order(place, True) for place in self._wanted - self._done]
            left += [await self._order(place, False) for place in self._done - self._wanted]
            if not all(left):
                self._wake.set()
                await asyncio.sleep(AGAIN_S)

    async def _order(self, place: Place, draining: bool) -> bool:
        """Whether nothing is left to do about it."""
        pool, url = place
        backend = self._settings().backends.get(pool)
        replicas = () if backend is None else backend.replicas
        names = [each.name for each in replicas if each.url == url]
        if not names:
            if not draining:
                self._done.discard(place)  # it is gone: what was ordered about it goes with it
                return True
            return False  # its place in the pool is still being made
        for source in self._sources:
            try:
                for name in names:
                    await source.drain(pool, name, draining)
            except (Silent, GatewayError) as error:
                logger.debug("drain of %s/%s: %s", pool, url, error)
                continue
            if draining:
                self._done.add(place)
            else:
                self._done.discard(place)
            return True
        return False
