"""Members that say they are about to go: given no new work, as `tidegate drain` does, for as long as they say so.

Such a drain is a fact with a time to live, which is posted again while it is wanted: it does not outlast the gateway
that has ordered it. An operator's drain has no end of its own and is left alone, as is an operator's word that such a
replica is to have work all the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.members.merge import Placed
from gateway.sources import Silent, Source
from gateway.watch import notes
from routing.types import Replica

logger = logging.getLogger("tidegate")

LOOK_S = 1.0
RENEW_S = 3.0
HOLDS_S = 12.0
"""Three renewals may get lost."""

UNDRAINED_LOOKS = 3
"""In a row, after which somebody has undrained it: a worker that has just started says so too, for a moment."""

Place = tuple[str, str]
"""Pool and address."""


@dataclass(slots=True)
class _Held:
    """What is drained from here."""

    posted_s: float
    undrained: int = 0
    """Looks in a row at which it was not."""


class Drains:
    """Has workers follow; `run` until cancelled."""

    def __init__(self, sources: Sequence[Source], settings: Callable[[], Settings]) -> None:
        self._sources = sources
        self._settings = settings
        self._wanted: set[Place] = set()
        self._held: dict[Place, _Held] = {}
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
        """Order what is wanted, and end what is wanted no longer; what fails is tried again."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self._wanted or self._held else None):
                    await self._wake.wait()
            self._wake.clear()
            for source in self._sources:
                try:
                    await self._look(source)
                    break
                except Silent:
                    continue
                except GatewayError as error:
                    logger.debug("drains of members: %s", error)
                    break
                except Exception:
                    logger.exception("drains of members: a look around failed; it goes on in a moment")
                    break

    async def _look(self, source: Source) -> None:
        """By one worker, who tells the others. Raises `Silent` and `GatewayError`."""
        state = await source.fleet()
        for place in self._wanted | self._held.keys():
            replicas = self._at(place)
            if not replicas:  # what was ordered about one that is gone goes with it
                self._held.pop(place, None)
            elif place in self._wanted:
                await self._hold(source, place, replicas, _is_drained(state, replicas))
            else:
                await self._release(source, place, replicas)

    async def _hold(self, source: Source, place: Place, replicas: Sequence[Replica], drained: bool) -> None:
        held, now_s = self._held.get(place), time.monotonic()
        if held is None:
            if drained:
                return  # by somebody else: looked at again in a moment
        elif now_s - held.posted_s < RENEW_S or held.undrained >= UNDRAINED_LOOKS:
            return
        elif not drained:
            held.undrained += 1
            return
        note = msgspec.json.encode(notes.DrainNote(time.time()))
        for replica in replicas:
            await source.announce(notes.key(notes.DRAIN, replica), note, HOLDS_S)
        self._held[place] = _Held(now_s)

    async def _release(self, source: Source, place: Place, replicas: Sequence[Replica]) -> None:
        if self._held[place].undrained < UNDRAINED_LOOKS:
            for replica in replicas:
                await source.retract(notes.key(notes.DRAIN, replica))
        self._held.pop(place, None)

    def _at(self, place: Place) -> list[Replica]:
        """The replicas in the pool that have this address, one for each rank."""
        pool, url = place
        backend = self._settings().backends.get(pool)
        if backend is None:
            return []
        return [
            Replica(each.name, pool, each.url, backend.engine, dp_rank=each.dp_rank)
            for each in backend.replicas
            if each.url == url
        ]


def _is_drained(state: Mapping[str, Any], replicas: Sequence[Replica]) -> bool:
    """Whether a worker says so of all of them."""
    names = {each.name for each in replicas}
    rows = [
        row
        for pool in state["pools"]
        if pool["name"] == replicas[0].pool
        for row in pool["replicas"]
        if row["name"] in names
    ]
    return bool(rows) and all(row["draining"] for row in rows)
