"""Gateways in the test's own loop whose Redis goes away and returns, and an engine that knows its busiest moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from gateway.config import Settings
from gateway.order import CHAT
from gateway.store.protocol import StoreError
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply, read_reply
from tests.gateway.admission.keyed import admitting, keyed
from tests.support.client import connect, post, until
from tests.support.serving import Serving, settings_for

LONG_S = 15.0
"""For what takes three seconds on an idle machine: a breaker opens after a second, and looks again every other one."""

HANG = {"fake": {"hang": True}}
"""Body fields of a request that runs until its client leaves."""


class Watched(FakeEngine):
    """Knows how many requests it ran when each one began."""

    def __init__(self, **defaults: Any) -> None:
        self.at_begin: list[int] = []
        """For each request in the order of their arrival: how many ran then, it included."""
        self._running = 0
        super().__init__(**defaults)

    async def __aenter__(self) -> Watched:
        await self.start()
        return self

    @property
    def running(self) -> int:
        return self._running

    @running.setter
    def running(self, value: int) -> None:
        if value > self._running:
            self.at_begin.append(value)
        self._running = value

    @property
    def peak(self) -> int:
        return max(self.at_begin, default=0)

    def notes(self) -> list[str]:
        """The `user` of each request, in the order of their arrival."""
        return [str(json.loads(request.body).get("user")) for request in self.requests]


class Crowd:
    """Clients of their own connections. Those that are left at the end of the block leave."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Reply]] = []

    async def __aenter__(self) -> Crowd:
        return self

    async def __aexit__(self, *_: object) -> None:
        await leave(self.tasks)

    def send(self, gate: Serving, count: int = 1, *headers: str, **fields: Any) -> list[asyncio.Task[Reply]]:
        begun = [asyncio.create_task(call(gate, *headers, **fields)) for _ in range(count)]
        self.tasks += begun
        return begun


async def call(gate: Serving, *headers: str, **fields: Any) -> Reply:
    """One chat request, and its whole reply, however long that takes to come."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    async with connect(gate.host, gate.port) as client:
        await client.send(post(CHAT, body, *headers))
        async with asyncio.timeout(2 * LONG_S):
            return await read_reply(client.reader)


async def leave(tasks: Iterable[asyncio.Task[Reply]]) -> None:
    """These clients hang up, if they have not got their replies."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def queueing(url: str, store: str, places: int, *, timeout_ms: int = 500, **sections: Any) -> Settings:
    """One replica that takes so many requests at once, for gateways that share a Redis. No keys, no limits.

    The machine is busy: half a second for Redis, not the default's 50 ms, where nothing is to fail.
    """
    backend = {"replicas": [{"url": url, "max_in_flight": places}], "queue": sections.pop("queue", {})}
    return settings_for([url], backend=backend, store=store, redis={"timeout_ms": timeout_ms}, **sections)


def limited(
    folder: Path, url: str, store: str, *keys: dict[str, Any], timeout_ms: int = 500, **sections: Any
) -> Settings:
    """Static keys with limits, no queue, for gateways that share a Redis and a database."""
    return keyed(folder, [url], *keys, store=store, redis={"timeout_ms": timeout_ms}, **sections)


@asynccontextmanager
async def two(settings: Settings) -> AsyncIterator[tuple[Serving, Serving]]:
    """Two gateways that know of each other."""
    async with admitting(settings) as one, admitting(settings) as other:
        await until(lambda: one.runtime.gate.home.gateways == other.runtime.gate.home.gateways == 2, LONG_S)
        yield one, other


async def away(*gates: Serving) -> None:
    """Until each of them has found out that its Redis does not answer."""
    async with asyncio.timeout(LONG_S):
        for gate in gates:
            home = gate.runtime.gate.home
            assert home.far is not None
            while home.mode != "local":
                asked = [home.far.places.standing("nobody") for _ in range(5)]
                await asyncio.gather(*asked, return_exceptions=True)
                await asyncio.sleep(0.001)


async def back(*gates: Serving) -> None:
    """Until Redis decides again at each of them."""
    await until(lambda: all(gate.runtime.gate.home.mode == "redis" for gate in gates), LONG_S)


async def standing(gate: Serving, pool: str = "pool") -> tuple[int, int]:
    """How many have a place and how many wait for one, as Redis knows it."""
    far = gate.runtime.gate.home.far
    assert far is not None
    found = await far.places.standing(pool)
    return sum(found.running), sum(found.waiting)


async def stands(gate: Serving, running: int, waiting: int) -> None:
    """Until Redis knows exactly so many."""
    found: tuple[int, int] | None = None

    async def as_told() -> bool:
        nonlocal found
        with suppress(StoreError):
            found = await standing(gate)
        return found == (running, waiting)

    await sooner_or_later(as_told, lambda: f"Redis knows {found} that run and wait, not {(running, waiting)}")


async def sooner_or_later(true: Callable[[], Awaitable[bool]], said: Callable[[], str]) -> None:
    """Until something that has to be asked for is true."""
    end = asyncio.get_running_loop().time() + LONG_S
    while not await true():
        assert asyncio.get_running_loop().time() < end, said()
        await asyncio.sleep(0.01)


def waiting_at(*gates: Serving) -> int:
    return sum(gate.runtime.gate.waiting for gate in gates)
