"""What the agent tells each gateway, and is told: registrations that are renewed, reports that orders answer.

A gateway that is away changes nothing for the servers: they go on, and it is told of them again when it is back. Every
gateway has tasks of its own, so that one that hangs holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from backends.discovery.member import Member
from backends.discovery.registrar import (
    AgentReport,
    GatewayAway,
    Orders,
    Registrar,
    RegistrarError,
    RegistrationRefused,
)
from gateway.agent.server import Server

FIRST_AGAIN_S: Final = 1.0
LONGEST_AGAIN_S: Final = 5.0
"""A gateway that is back should have its replicas before the first client is; and one question costs it nothing."""
REFUSED_AGAIN_S: Final = 5.0
"""A pool that the gateway does not know yet: somebody is about to give it the same configuration."""
REPORT_S: Final = 2.0
"""Until a gateway says how often it wants to hear."""
DRAINING_LOOK_S: Final = 0.5
"""How soon a gateway is asked again whether a server that goes is empty."""
PROGRESS_S: Final = 1.0
"""How often progress alone is told."""
AT_ONCE: Final = 16
"""Questions to one gateway at a time."""


class Link:
    """One gateway, as the agent talks to it."""

    def __init__(
        self,
        registrar: Registrar,
        agent: str,
        servers: Callable[[], Iterable[Server]],
        report: Callable[[], AgentReport],
        obey: Callable[[Link, Orders], None],
        say: Callable[[str, str], None],
        clock: Callable[[], float],
    ) -> None:
        self.address = registrar.address
        self.away = False
        """It does not answer, or refuses what it is told."""
        self.obeyed = False
        """It has answered the last report."""
        self.changed = asyncio.Event()
        """Set when a server may have to be told of."""
        self._registrar, self._agent = registrar, agent
        self._servers, self._report, self._obey, self._say, self._clock = servers, report, obey, say, clock
        self._sent: dict[tuple[str, str], tuple[Member, float, float]] = {}
        """What was told last of each server, when, and when it is to be told again."""
        self._refused: dict[str, str] = {}
        self._again_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._register())
                group.create_task(self._tell_and_obey())
        finally:
            await self._registrar.aclose()

    @property
    def settled(self) -> bool:
        """It has been told of everything that has gone, as far as it can be told."""
        return self.away or not self._sent

    # -- registrations

    async def _register(self) -> None:
        while True:
            self.changed.clear()
            try:
                await self._round()
            except GatewayAway as away:
                await asyncio.sleep(self._lost(away))
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s()):
                    await self.changed.wait()
            await asyncio.sleep(0.02)  # what changes together is told together

    async def _round(self) -> None:
        """Tell of what is due. Raises `GatewayAway`."""
        now = self._clock()
        known: dict[tuple[str, str], tuple[Server, Member]] = {}
        for server in self._servers():
            member = server.member()
            if member is not None:
                known[server.pool, server.name] = (server, member)
        due = [(key, *told) for key, told in known.items() if self._is_due(key, told[1], now)]
        gone = [key for key in self._sent if key not in known]
        limit = asyncio.Semaphore(AT_ONCE)

        async def put(key: tuple[str, str], server: Server, member: Member) -> None:
            async with limit:
                await self._put(key, server, member)

        async def remove(key: tuple[str, str]) -> None:
            async with limit:
                await self._remove(key)

        answers = await asyncio.gather(
            *(put(*each) for each in due), *(remove(key) for key in gone), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    def _is_due(self, key: tuple[str, str], member: Member, now: float) -> bool:
        told = self._sent.get(key)
        if told is None:
            return True
        before, at, until = told
        if now >= until:
            return True
        if (before.state, before.phase, before.url, before.restarts) != (
            member.state,
            member.phase,
            member.url,
            member.restarts,
        ):
            return True
        return before != member and now - at >= PROGRESS_S

    async def _put(self, key: tuple[str, str], server: Server, member: Member) -> None:
        try:
            lease = await self._registrar.put(key[0], member)
        except RegistrationRefused as refused:
            now = self._clock()
            self._sent[key] = (member, now, now + REFUSED_AGAIN_S)
            self._refuse(f"{key[0]}/{key[1]}", f"does not take {key[1]}: {refused}")
            return
        self._found()
        if self._refused.pop(f"{key[0]}/{key[1]}", None):
            self._say(self.address, f"takes {key[1]} now")
        now = self._clock()
        renew_in_s = lease.renew_in_s if member.state != "draining" else min(DRAINING_LOOK_S, lease.renew_in_s)
        self._sent[key] = (member, now, now + renew_in_s)
        server.heard(self.address, member, lease)

    async def _remove(self, key: tuple[str, str]) -> None:
        try:
            await self._registrar.remove(*key)
        except RegistrationRefused as refused:
            self._refuse(f"{key[0]}/{key[1]}", f"does not take {key[1]} out: {refused}")
        else:
            self._found()
        self._sent.pop(key, None)

    def _wait_s(self) -> float:
        now = self._clock()
        return min([PROGRESS_S, *(max(0.05, until - now) for _, _, until in self._sent.values())])

    # -- reports

    async def _tell_and_obey(self) -> None:
        while True:
            wait_s = REPORT_S
            try:
                orders = await self._registrar.report(self._agent, self._report())
            except GatewayAway as away:
                self.obeyed = False
                wait_s = self._lost(away)
            except RegistrarError as refused:
                self.obeyed = False
                self._refuse("", f"gives no orders: {refused}")
                wait_s = REFUSED_AGAIN_S
            else:
                self._found()
                self._refused.pop("", None)
                self.obeyed = True
                wait_s = orders.renew_in_s
                self._obey(self, orders)
            await asyncio.sleep(wait_s)

    # -- what people are told

    def _lost(self, away: GatewayAway) -> float:
        """Seconds until it is asked again."""
        if not self.away:
            self.away = True
            self._say(self.address, f"does not answer ({away.reason}); the servers go on")
        self._again_s = min(max(FIRST_AGAIN_S, self._again_s * 1.5), LONGEST_AGAIN_S)
        return self._again_s * random.uniform(0.8, 1.2)

    def _found(self) -> None:
        if self.away:
            self._say(self.address, "is back")
        self.away, self._again_s = False, 0.0

    def _refuse(self, what: str, text: str) -> None:
        if self._refused.get(what) != text:
            self._refused[what] = text
            self._say(self.address, text)

    def cannot_say(self, pool: str, name: str) -> bool:
        """Whether it cannot be asked if a server is empty."""
        return self.away or f"{pool}/{name}" in self._refused


def reachable(links: Sequence[Link], pool: str, name: str) -> list[tuple[str, bool]]:
    """Each gateway's address, and whether it can say what is under way at a server."""
    return [(link.address, not link.cannot_say(pool, name)) for link in links]
