"""The agent of one machine: its pools, the gateways it talks to, signals, and what it writes down."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from backends.discovery.registrar import AgentReport, Orders, Registrar
from gateway.agent.keeping import Hurry, Leave, Phase
from gateway.agent.links import Link, reachable
from gateway.agent.places import NoRoom, Room
from gateway.agent.pool import LaunchedPool
from gateway.agent.server import Server
from gateway.agent.times import StartTimes, StateFile, take_orders
from gateway.config import ConfigError, Settings

TURN_S: Final = 0.5
"""Between two looks at the clock; whatever happens is seen to at once."""
FAREWELL_S: Final = 5.0
"""For the gateways to be told that the last server is gone."""
FAREWELL_LOOK_S: Final = 0.05

Say = Callable[[str, str], None]
"""Who or what, and what is to be said of it, for the terminal."""
Read = Callable[[], tuple[Settings, dict[str, Room]]]
"""The configuration as it is now, with the pools to launch. Blocks; raises `ConfigError` and `NoRoom`."""


@dataclass(frozen=True, slots=True)
class Where:
    """What the agent is called, and where it writes."""

    agent: str
    state: Path
    """Folder of its state files."""
    logs: Path


class Agent:
    """Runs until it is told to stop. One event loop's."""

    def __init__(
        self, where: Where, read: Read, registrars: Sequence[Registrar], say: Say, *, node_rank: int | None = None
    ) -> None:
        self._where, self._read, self._say, self._node_rank = where, read, say, node_rank
        self._file = StateFile(where.state, where.agent)
        self._times = StartTimes({})
        self._pools: dict[str, LaunchedPool] = {}
        self._turning = asyncio.Event()
        self._stopping = False
        self._written: dict[str, Any] = {}
        self._reload: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None
        self._links = [
            Link(each, where.agent, self._servers, self._report, self._obey, say, time.monotonic) for each in registrars
        ]

    async def run(self) -> None:
        """Start everything, and keep it running until SIGTERM or SIGINT. Raises `ConfigError`, `NoRoom`,
        `AlreadyRunning` and `OSError` before anything is started."""
        settings, rooms = await asyncio.to_thread(self._read)
        self._file.lock()
        try:
            known = self._file.read().get("start_times_s")
            self._times = StartTimes(known if isinstance(known, dict) else {})
            take_orders(self._where.state, self._where.agent)  # of a time before
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._take(settings, rooms)
                links = [group.create_task(link.run()) for link in self._links]
                with _signals(self._signalled):
                    await self._turns()
                    await self._farewell()
                for task in links:
                    task.cancel()
            self._write()
        finally:
            self._file.unlock()

    async def _turns(self) -> None:
        while True:
            self._turning.clear()
            for name, pool in list(self._pools.items()):
                pool.turn()
                if pool.closing and not pool.servers:
                    del self._pools[name]
            self._write()
            if self._stopping and not self._pools:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TURN_S):
                    await self._turning.wait()

    async def _farewell(self) -> None:
        """Tell the gateways that the last server is gone, where they can be told."""
        for _ in range(round(FAREWELL_S / FAREWELL_LOOK_S)):
            if all(link.settled for link in self._links):
                return
            await asyncio.sleep(FAREWELL_LOOK_S)

    # -- what others ask

    def _servers(self) -> list[Server]:
        return [server for pool in self._pools.values() for server in pool.servers.values()]

    def _report(self) -> AgentReport:
        return AgentReport(pools={name: pool.report() for name, pool in self._pools.items() if pool.answers})

    def _obey(self, link: Link, orders: Orders) -> None:
        """The first of the gateways that answers is obeyed: where they share a store, all say the same."""
        if self._stopping or any(other.obeyed for other in self._links[: self._links.index(link)]):
            return
        for name, wanted in orders.pools.items():
            pool = self._pools.get(name)
            if pool is not None and pool.answers and not pool.closing:
                pool.obey(wanted)
        self._turning.set()

    def _changed(self) -> None:
        self._turning.set()
        for link in self._links:
            link.changed.set()

    def _spawn(self, server: Server) -> None:
        assert self._group is not None
        self._group.create_task(server.run(), name=f"server {server.name}")

    # -- configuration

    def _take(self, settings: Settings, rooms: dict[str, Room]) -> None:
        for name, room in rooms.items():
            pool = self._pools.get(name)
            if pool is not None and not pool.closing:
                pool.take(settings, room)
                continue
            if pool is not None:
                self._say(name, "its servers are still on their way out; SIGHUP again starts new ones after that")
                continue
            self._pools[name] = LaunchedPool(
                settings,
                room,
                self._where.logs,
                self._times,
                node_rank=self._node_rank,
                clock=time.monotonic,
                say=self._say,
                changed=self._changed,
                gateways=lambda pool, server: reachable(self._links, pool, server),
                spawn=self._spawn,
            )
        for name, pool in self._pools.items():
            if name not in rooms and not pool.closing:
                self._say(name, "is launched here no longer")
                self._close(pool)
        self._turning.set()

    async def _read_again(self) -> None:
        try:
            settings, rooms = await asyncio.to_thread(self._read)
        except (ConfigError, NoRoom) as error:
            self._say("SIGHUP", f"the configuration stays as it was: {error}")
            return
        if not self._stopping:
            self._say("SIGHUP", "the configuration was read again")
            self._take(settings, rooms)

    # -- signals

    def _signalled(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP:
            if self._reload is None or self._reload.done():
                assert self._group is not None
                self._reload = self._group.create_task(self._read_again())
        elif number is signal.SIGUSR1:
            for what in take_orders(self._where.state, self._where.agent):
                self._take_down(what)
        elif self._stopping:
            self._say(number.name, "once more: nothing is waited for any longer")
            for server in self._servers():
                server.post(Hurry())
        else:
            self._stopping = True
            self._say(number.name, "stopping: each server finishes what it has; once more to end them now")
            for pool in self._pools.values():
                self._close(pool)
        self._turning.set()

    def _close(self, pool: LaunchedPool) -> None:
        pool.closing = True
        for server in pool.servers.values():
            server.post(Leave())
        self._turning.set()

    def _take_down(self, what: str) -> None:
        """`POOL` or `POOL/NAME`: these are not started again before the configuration is read anew."""
        name, _, wanted = what.partition("/")
        pool = self._pools.get(name)
        if pool is None:
            return
        for server in list(pool.servers.values()):
            if wanted in ("", server.name) and not server.keeper.leaving:
                pool.crew.fewer += 1
                server.post(Leave())

    # -- what is written down

    def _write(self) -> None:
        servers = [
            {
                "pool": server.pool,
                "name": server.name,
                "url": None if server.current is None else server.current.url,
                "phase": server.keeper.phase.value,
                "pid": None if server.process is None else server.process.pid,
                "restarts": server.keeper.restarts,
                "started_in_s": server.keeper.started_in_s,
                "log": str(server.log),
            }
            for server in self._servers()
            if server.keeper.phase is not Phase.GONE
        ]
        content = {
            "agent": self._where.agent,
            "pid": os.getpid(),
            "servers": servers,
            "start_times_s": {name: list(times) for name, times in self._times.of.items()},
        }
        if content != self._written:
            try:
                self._file.write(content)
            except OSError as error:
                self._say(str(self._file.path), f"cannot be written: {error.strerror}")
            self._written = content


@contextlib.contextmanager
def _signals(told: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Calls back for the agent's signals inside of the block."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    for number in numbers:
        loop.add_signal_handler(number, told, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
