"""Runs the sources of every pool's replicas, keeps what they told last, and has the configuration follow.

One for a gateway, in the process that has the configuration: the only worker, or the supervisor. What was found is put
into force by the same reload that SIGHUP asks for, a moment after it has changed: no request is lost by it, and a
replica that is gone ends what it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.discovery.member import Member, Source
from gateway.config import Backend, ConfigError, Settings
from gateway.config.discovery import Discovery, MemberDefaults
from gateway.config.found import Found
from gateway.members import kept
from gateway.members.drains import Drains
from gateway.members.merge import REGISTRATION, Known, Placed, placed
from gateway.members.pace import Pace
from gateway.members.places import accepting, not_here, ttl_of
from gateway.members.registry import Registry
from gateway.members.sources import sources_of
from gateway.steering.reading import ConfigReader

logger = logging.getLogger("tidegate")

FIRST_LOOK_S = 2.0
"""How long a start waits for the sources' first answers. One that does not answer is heard later."""
AGAIN_S = 5.0
"""After what was found could not be put into force: a file that is missing may be back."""
LOOK_S = 1.0
SAVE_S = 5.0
SAVE_AGAIN_S = 60.0
"""Also without a change: how old it is decides whether the next run believes it."""
MAX_LOGGED = 8


@dataclass(slots=True)
class Told:
    """What one source has said of one pool."""

    detail: str
    members: tuple[Member, ...] = ()
    told_unix_s: float | None = None
    problem: str | None = None
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """It has said something in this run."""


class Members:
    """`start` before requests are served, `follow` after every reload, `aclose` at the end. `reader` None: a gateway
    that was not started by the command, in which nothing is found."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        reader: ConfigReader | None,
        reload: Callable[..., Awaitable[Settings]],
        drains: Drains,
        state_dir: Path | None,
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._reload = reload
        self._drains = drains
        self._state_dir = state_dir
        self.registry = Registry()
        self._told: dict[tuple[str, str], Told] = {}
        self._running: dict[tuple[str, str], tuple[object, asyncio.Task[None]]] = {}
        self._placed: dict[str, list[Placed]] = {}
        self._known: dict[str, tuple[MemberDefaults | None, Known]] = {}
        self._found: Found = {}
        """As a reload reads it: another thread does so, so it is replaced as a whole."""
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._pace = Pace()
        self._problem = ""
        """Why what was found could not be put into force at the last attempt."""
        self._tasks: list[asyncio.Task[None]] = []
        self._saved: tuple[object, float] = (None, 0.0)
        """What is on disk, and since when."""

    # -- life

    async def start(self) -> None:
        """Begin with what was known, look for a moment, and put that into force."""
        if self._reader is None:
            return
        self._reader.found = lambda: self._found
        settings = self._settings()
        if any(backend.discovery or backend.launch for backend in settings.backends.values()):
            await self._recall(settings)
        self.follow(settings)
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_S):
                await asyncio.gather(*(self._told[key].heard.wait() for key in self._running))
        self.recompute()
        if self._changed.is_set():
            await self._put_in_force()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._follow_changes(), name="members: changes"),
            loop.create_task(self._look(), name="members: look"),
        ]

    def follow(self, settings: Settings) -> None:
        """Run the sources that these settings name: those that stay the same go on."""
        if self._reader is None:
            return
        wanted: dict[tuple[str, str], tuple[object, Callable[[], tuple[str, Source]]]] = {}
        for pool, backend in settings.backends.items():
            for kind, section, make in sources_of(pool, backend.discovery, self._reader.path):
                wanted[pool, kind] = (section, make)
        for key in [each for each in self._running if each not in wanted]:
            self._running.pop(key)[1].cancel()
            self._told.pop(key, None)
        for key, (wish, make) in wanted.items():
            running = self._running.get(key)
            if running is not None and running[0] == wish and not running[1].done():
                continue
            if running is not None:
                running[1].cancel()
            detail, source = make()
            told = self._told.setdefault(key, Told(detail))
            told.detail = detail
            task = asyncio.get_running_loop().create_task(self._run(key, source, told), name=f"members: {key}")
            self._running[key] = (wish, task)
        for key in [each for each in self._told if each not in wanted]:
            del self._told[key]
        if self._tasks:
            self.recompute()

    async def aclose(self) -> None:
        """End every source, and write down what was found."""
        tasks = [*self._tasks, *(task for _, task in self._running.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._running = [], {}
        await self._save()

    # -- what others look at

    @property
    def told(self) -> Mapping[tuple[str, str], Told]:
        """By pool and source."""
        return self._told

    def of(self, pool: str) -> Sequence[Placed]:
        """The members of a pool, with what became of each."""
        return self._placed.get(pool, ())

    def left_out(self, pool: str, name: str) -> str:
        """Why a member does not go with the rest of the configuration; empty: it does."""
        return "" if self._reader is None else self._reader.last.left_out.get((pool, name), "")

    async def settled(self, within_s: float) -> None:
        """Wait until what is known is in force, but not for long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), within_s)

    @property
    def storming(self) -> bool:
        """Whether so many come that what changes now is put into force later than usual."""
        return self._pace.storming(time.monotonic())

    # -- sources

    async def _run(self, key: tuple[str, str], source: Source, told: Told) -> None:
        def tell(members: Sequence[Member]) -> None:
            if told.problem is not None:
                logger.info("%s: %s answers again", *key)
            told.problem, told.told_unix_s = None, time.time()
            told.heard.set()
            if tuple(members) != told.members:
                told.members = tuple(members)
                if self._tasks:
                    self.recompute()

        def trouble(reason: str) -> None:
            if told.problem is None:
                logger.warning("%s: %s: %s; what was found last holds", *key, reason)
            told.problem = reason
            told.heard.set()

        while True:
            try:
                await source.run(tell, trouble)
            except Exception as error:
                logger.exception("%s: looking for replicas (%s) failed; it goes on in a moment", *key)
                trouble(f"a defect: {error!r}")
            await asyncio.sleep(LOOK_S)

    def recompute(self) -> None:
        """Find out what the members are now; a change is put into force in a moment."""
        settings = self._settings()
        found: dict[str, list[Mapping[str, Any]]] = {}
        now_placed: dict[str, list[Placed]] = {}
        for pool, backend in settings.backends.items():
            told = {kind: each.members for (name, kind), each in self._told.items() if name == pool}
            registered, refused = self._registered(pool, backend)
            told[REGISTRATION] = registered
            if not any(told.values()) and not refused:
                continue
            discovery = backend.discovery or Discovery()
            defaults, known = self._known.get(pool, (None, {}))
            if defaults != discovery.defaults:
                known = {}
            self._known[pool] = (discovery.defaults, known)
            now_placed[pool] = [*placed(pool, discovery.defaults, told, known), *refused]
            entries = [each.entry for each in now_placed[pool] if each.entry is not None]
            if entries:
                found[pool] = entries
        self._say_refused(now_placed)
        self._placed = now_placed
        self._drains.want(now_placed)
        if found != self._found:
            self._say_changes(found)
            self._found = found
            self._changed.set()
            self._settled.clear()

    def _registered(self, pool: str, backend: Backend) -> tuple[tuple[Member, ...], list[Placed]]:
        """Those that have a lease, and those of them that may not be here: gateways that share a store may have
        different settings, and each goes by its own."""
        registration = accepting(backend)
        members: list[Member] = []
        refused: list[Placed] = []
        if registration is None:
            return (), []
        for lease in self.registry.of(pool).values():
            problem = not_here(lease.member, registration)
            if problem:
                refused.append(Placed(lease.member, REGISTRATION, lease.member.name, None, problem))
            else:
                members.append(lease.member)
        return tuple(members), refused

    def _say_refused(self, now: Mapping[str, Sequence[Placed]]) -> None:
        before = {(each.source, each.member.url, each.refused) for several in self._placed.values() for each in several}
        for pool, several in now.items():
            for each in several:
                if each.refused and (each.source, each.member.url, each.refused) not in before:
                    logger.warning("%s: %s (%s) is left out: %s", pool, each.member.url, each.source, each.refused)

    def _say_changes(self, found: Found) -> None:
        for pool in dict.fromkeys((*self._found, *found)):
            old = {str(each["name"]) for each in self._found.get(pool, ())}
            new = {str(each["name"]) for each in found.get(pool, ())}
            for names, what in ((sorted(new - old), "found"), (sorted(old - new), "gone")):
                if names:
                    more = f" and {len(names) - MAX_LOGGED} more" if len(names) > MAX_LOGGED else ""
                    logger.info("%s: %s: %s%s", pool, what, ", ".join(names[:MAX_LOGGED]), more)

    # -- putting into force

    async def _follow_changes(self) -> None:
        while True:
            await self._changed.wait()
            # Thousands that come one by one are not to keep the gateway from doing anything else.
            await asyncio.sleep(self._pace.pause_s(time.monotonic()))
            began_s = time.monotonic()
            await self._put_in_force()
            ended_s = time.monotonic()
            self._pace.reloaded(ended_s, ended_s - began_s)

    async def _put_in_force(self) -> None:
        assert self._reader is not None
        self._changed.clear()
        try:
            await self._reload(self._reader.again)
            self._problem = ""
        except Exception as error:
            if repr(error) != self._problem:
                self._problem = repr(error)
                text = "the replicas that were found cannot be put into force, which is tried again every %g s:\n%s"
                logger.error(text, AGAIN_S, error, exc_info=not isinstance(error, ConfigError))
            asyncio.get_running_loop().call_later(AGAIN_S, self._changed.set)
        finally:
            if not self._changed.is_set():
                self._settled.set()

    async def _look(self) -> None:
        """What time changes: what holds no longer, and what is to be kept on disk."""
        saved_s = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._forget_old():
                    self.recompute()
                if time.monotonic() - saved_s >= SAVE_S:
                    saved_s = time.monotonic()
                    await self._save()
            except Exception:
                logger.exception("members: a look around failed; it goes on in a moment")

    def _forget_old(self) -> bool:
        """Drop what a source has told that has not answered for too long; whether there was some."""
        dropped, now_unix_s = False, time.time()
        backends = self._settings().backends
        for (pool, kind), told in self._told.items():
            discovery = None if pool not in backends else backends[pool].discovery
            keep_s = Discovery().keep_s if discovery is None else discovery.keep_s
            if told.problem and told.members and now_unix_s - (told.told_unix_s or 0.0) > keep_s:
                logger.warning("%s: %s has not answered for %g s: what it told is dropped", pool, kind, keep_s)
                told.members, dropped = (), True
        return dropped

    # -- over restarts

    async def _recall(self, settings: Settings) -> None:
        if self._state_dir is None:
            return
        now_unix_s, now_s = time.time(), time.monotonic()
        for seen in await asyncio.to_thread(kept.load, self._state_dir):
            backend = settings.backends.get(seen.pool)
            if backend is None:
                continue
            discovery = backend.discovery or Discovery()
            age_s = now_unix_s - seen.told_unix_s
            if seen.source == REGISTRATION:
                if age_s < discovery.keep_s:
                    self.registry.recall(seen.pool, seen.members, ttl_of(backend), now_s)
            elif getattr(discovery, seen.source, None) is not None and age_s < discovery.keep_s:
                self._told[seen.pool, seen.source] = Told("", tuple(seen.members), seen.told_unix_s)

    async def _save(self) -> None:
        if self._state_dir is None or self._reader is None:
            return
        now_unix_s = time.time()
        seen = [
            kept.Seen(pool, kind, list(told.members), told.told_unix_s or now_unix_s)
            for (pool, kind), told in self._told.items()
            if told.members
        ]
        leases: dict[str, list[Member]] = {}
        for (pool, _), lease in self.registry.leases.items():
            leases.setdefault(pool, []).append(lease.member)
        seen += [kept.Seen(pool, REGISTRATION, members, now_unix_s) for pool, members in leases.items()]
        content = [(each.pool, each.source, each.members) for each in seen]
        before, at_unix_s = self._saved
        old = not self._tasks or abs(now_unix_s - at_unix_s) >= SAVE_AGAIN_S
        if (content != before or old) and (content or before is not None):
            self._saved = content, now_unix_s
            await asyncio.to_thread(kept.save, self._state_dir, seen)
