"""Has all workers know which pools' replicas start, how far they are, and how long that takes as a rule."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil

import msgspec

from backends.discovery.member import Member
from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.members.service import Members
from gateway.notices import START
from gateway.scaling.helm import Helm
from gateway.sources import Silent, Source
from gateway.starting.note import StartNote

logger = logging.getLogger("tidegate")

LOOK_S = 0.5
TTL_S = 10.0
RENEW_S = 3.0
STARTS = 20
"""Of a pool without scaling: start times that the lead time is taken from."""
LEARNED_LEAST = 3
"""Of a pool with scaling: before so many were seen, its settings say how long a start takes (`routing.scaling`)."""
MOST_OF_THEM = 0.8


class PoolStarts:
    """What one pool's starts look like over time. Pure: `now_unix_s` is any clock."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[int, float]] = {}
        """By name of those that start: how often they were started again, and when they began."""
        self._ordered: float | None = None
        """Since when some are wanted and none is ready."""
        self._took: dict[str, float] = {}
        """By name: seconds to be ready, of those that are."""

    def note(self, members: Sequence[Member], helm: Helm | None, now_unix_s: float) -> StartNote | None:
        """What is to be told now; None: nothing starts. `members`: all of the pool, by their names."""
        starting = [each for each in members if each.state == "starting"]
        self._began = {
            each.name: (each.restarts, self._since(each, now_unix_s)) for each in starting
        }  # a server that is started again begins anew
        for each in members:
            if each.started_in_s is not None and each.state != "starting":
                self._took.pop(each.name, None)
                self._took[each.name] = each.started_in_s
                if len(self._took) > STARTS:
                    del self._took[next(iter(self._took))]
        wanted = helm is not None and helm.decided and helm.standing.wanted > 0
        ready = 0 if helm is None or helm.demand is None else helm.demand.replicas_ready
        if not wanted or ready:
            self._ordered = None
        elif self._ordered is None:
            self._ordered = now_unix_s
        if not starting and self._ordered is None:
            return None
        lead_s, learned = self._lead(helm)
        problem = "" if helm is None else helm.problem or ""
        if not starting:
            return StartNote(0, round(self._ordered or 0.0, 1), lead_s=lead_s, learned=learned, problem=problem)
        first = min(starting, key=lambda each: self._began[each.name][1])
        since = round(self._began[first.name][1], 1)
        progress = None if first.progress is None else round(first.progress, 2)
        return StartNote(len(starting), since, first.phase, progress, first.detail, lead_s, learned, problem)

    def _since(self, member: Member, now_unix_s: float) -> float:
        restarts, since = self._began.get(member.name, (member.restarts, 0.0))
        if not since and not member.restarts and self._ordered is not None:
            return self._ordered  # the lead time is from the order on
        return since if since and restarts == member.restarts else now_unix_s

    def _lead(self, helm: Helm | None) -> tuple[float | None, bool]:
        if helm is not None and helm.standing.lead_time_s:
            return helm.standing.lead_time_s, len(helm.starts) >= LEARNED_LEAST
        took = sorted(self._took.values())
        return (took[ceil(MOST_OF_THEM * len(took)) - 1], len(took) >= LEARNED_LEAST) if took else (None, False)


class StartTeller:
    """One gateway's; `run` until cancelled. Tells nothing while nothing starts."""

    def __init__(
        self,
        sources: Sequence[Source],
        settings: Callable[[], Settings],
        members: Members,
        helms: Callable[[], Mapping[str, Helm]],
    ) -> None:
        self._sources = sources
        self._settings = settings
        self._members = members
        self._helms = helms
        self._holder = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._pools: dict[str, PoolStarts] = {}
        self._told: dict[str, tuple[StartNote, float]] = {}

    async def run(self) -> None:
        """Look around again and again."""
        failing = False
        while True:
            try:
                await self.look()
                failing = False
            except (Silent, GatewayError) as error:
                logger.debug("starts could not be told: %s", error)
            except Exception:
                if not failing:
                    logger.exception("starts could not be told; this is said once")
                failing = True
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Tell what is new, and again what holds. Raises `GatewayError`, `Silent`."""
        now, now_unix_s, helms = time.monotonic(), time.time(), self._helms()
        pools = list(self._wanted())
        self._pools = {name: self._pools.get(name) or PoolStarts() for name in pools}
        for name in [each for each in self._told if each not in self._pools]:
            await self._retract(name)
        for name, starts in self._pools.items():
            members = [
                msgspec.structs.replace(each.member, name=each.name)
                for each in self._members.of(name)
                if not each.refused
            ]
            note = starts.note(members, helms.get(name), now_unix_s)
            told = self._told.get(name)
            if note is None:
                if told is not None:
                    await self._retract(name)
            elif told is None or told[0] != note or now - told[1] >= RENEW_S:
                await self._announce(name, note)
                self._told[name] = note, now

    def _wanted(self) -> Iterable[str]:
        for name, each in self._settings().backends.items():
            if each.discovery is not None or each.launch is not None or each.scaling is not None:
                yield name

    async def _announce(self, pool: str, note: StartNote) -> None:
        key, value = f"{START}/{pool}/{self._holder}", msgspec.json.encode(note)
        for source in self._sources:
            try:
                await source.announce(key, value, TTL_S)
                return
            except Silent:
                continue

    async def _retract(self, pool: str) -> None:
        for source in self._sources:
            try:
                await source.retract(f"{START}/{pool}/{self._holder}")
                break
            except Silent:
                continue
        self._told.pop(pool, None)
