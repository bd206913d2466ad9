"""The implementations of the store behind one face: open connections, let time pass, lose everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from gateway.listener import bind_uds
from gateway.store import MemoryStore, Store
from gateway.store.redis.address import parse_address
from gateway.store.redis.client import RedisClient
from gateway.store.redis.scripts import Script, load, script
from gateway.store.redis.store import RedisStore
from gateway.store.remote import RemoteStore
from gateway.store.server import StoreServer
from tests.support.redis_server import RedisServer

TOMBSTONES = 4
"""Few, so that readers fall behind within a short test."""


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Half(Protocol):
    """One implementation. A store that measures real time would wait in `pass_time`."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def open(self) -> Store:
        """Another worker's way to the same store."""

    async def pass_time(self, seconds: float) -> None: ...

    async def restart(self) -> None:
        """Have the store forget everything. What was opened before may be of no use any more."""


class Memory:
    """All workers in one process use the same object."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.store = MemoryStore(self.clock, max_tombstones=TOMBSTONES)

    async def start(self) -> None: ...

    async def stop(self) -> None:
        await self.store.aclose()

    def open(self) -> Store:
        return self.store

    async def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    async def restart(self) -> None:
        await self.store.aclose()
        self.store = MemoryStore(self.clock, max_tombstones=TOMBSTONES)


class Remote:
    """Each worker has a connection to a memory store behind a real socket."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "store.sock")
        self.clock = Clock()
        self.store = MemoryStore(self.clock, max_tombstones=TOMBSTONES)
        self.server: StoreServer | None = None
        self.opened: list[RemoteStore] = []

    async def start(self) -> None:
        self.server = StoreServer(self.store, bind_uds(self.path, "store"))
        await self.server.start()

    async def stop(self) -> None:
        for store in self.opened:
            await store.aclose()
        await self.stop_server()

    async def stop_server(self) -> None:
        assert self.server is not None
        await self.server.aclose()

    def open(self) -> RemoteStore:
        self.opened.append(RemoteStore(self.path, clock=self.clock))
        return self.opened[-1]

    async def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    async def restart(self) -> None:
        await self.stop_server()
        self.store = MemoryStore(self.clock, max_tombstones=TOMBSTONES)
        await self.start()


def on_test_clock(name: str) -> Script:
    """The script, which takes the time from a key instead of Redis' clock."""
    given = load(name)
    return script(name, given.text.replace("redis.call('TIME')", "redis.call('HMGET', 'clock', 's', 'us')"))


class Redis:
    """Each worker has a client of a real Redis."""

    def __init__(self, folder: Path) -> None:
        self.now_us = 1_800_000_000_000_000
        self.server = RedisServer()
        self.opened: list[RedisStore] = []

    async def start(self) -> None:
        self.server.start()
        await self.pass_time(0.0)

    async def stop(self) -> None:
        for store in self.opened:
            await store.aclose()
        self.server.close()

    def open(self) -> RedisStore:
        client = RedisClient(parse_address(self.server.url), timeout_s=10.0)
        self.opened.append(RedisStore(client, max_tombstones=TOMBSTONES, load=on_test_clock))
        return self.opened[-1]

    async def pass_time(self, seconds: float) -> None:
        self.now_us += round(seconds * 1_000_000)
        seconds_now, us_now = divmod(self.now_us, 1_000_000)
        self.server.command("HSET", "clock", "s", seconds_now, "us", us_now)

    async def restart(self) -> None:
        self.server.restart()
        await self.pass_time(0.0)


class LastingRedis(Redis):
    """A Redis that goes on from one example to the next: starting one takes longer than most examples do."""

    def __init__(self, server: RedisServer) -> None:
        self.now_us = 1_800_000_000_000_000
        self.server = server
        self.opened = []

    async def start(self) -> None:
        self.server.empty()
        await self.pass_time(0.0)

    async def stop(self) -> None:
        for store in self.opened:
            await store.aclose()

    async def restart(self) -> None:
        """All that its clients see of a restart: no data, no scripts, no connections."""
        self.server.empty()
        for kind in ("normal", "pubsub"):
            self.server.command("CLIENT", "KILL", "TYPE", kind)
        await self.pass_time(0.0)


HALVES: dict[str, Callable[[Path], Half]] = {"memory": Memory, "remote": Remote, "redis": Redis}
