"""A fake model server with an OpenAI-shaped API that misbehaves on request.

For tests, in the test's own event loop::

    async with FakeEngine(chunks=3) as engine:          # any Behaviour field sets the default script
        ...                                             # talk to engine.url
        engine.script = Behaviour(status=503)           # from now on
        engine.queue.append(Behaviour(cut_after=2))     # for the next request only
        request = await engine.received(1)              # the first request, as soon as it is completely read
        await request.gone.wait()                       # the peer dropped the connection before the end

For load, as a process of its own: ``python -m loadtests.engine --port 19001 --port 19002 --chunks 50``.
A single request changes the script with the header ``x-fake`` or the body field ``fake``, see `Behaviour`.

Routes: POST /v1/chat/completions, /v1/completions, /v1/embeddings, /abort_request, and with `adapters` set
/load_lora_adapter, /unload_lora_adapter;
GET /v1/models, /health, /stats. With `scriptable`: POST /script.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from loadtests.behaviour import BadBehaviour, Behaviour
from loadtests.connection import Connection, Request
from loadtests.ports import free_port
from loadtests.replies import Call, Json
from loadtests.served_log import Event, writing_to


class FakeEngine:
    """Listens on loopback ports or a unix socket between `start` and `stop`; it can be started again."""

    def __init__(
        self,
        script: Behaviour | None = None,
        *,
        ports: tuple[int, ...] = (0,),
        uds: str | None = None,
        models: tuple[str, ...] = ("fake-model",),
        record: bool = True,
        **defaults: Any,
    ) -> None:
        """``record=False`` keeps no requests: for load. Other keywords are fields of `Behaviour`."""
        self.answers: dict[Call, bytes] = {}
        self.record = record
        self.log: Callable[[Event, Request], None] | None = None
        """Told of every model request (`loadtests.served_log`). Set `script` after it: that ends the quick way."""
        self.script = dataclasses.replace(script or Behaviour(), **defaults)
        self.queue: deque[Behaviour] = deque()
        """Behaviours for the next requests, one each; the script when it is empty."""
        self.probe = Behaviour()
        """What GET requests get (health, models): status, delays, hang and the HTTP fields matter."""
        self.models = models
        self.adapters: dict[str, str] | None = None
        """LoRA adapters by name, each with its path; None for an engine that cannot load any. SGLang's endpoints."""
        self.adapter_delay_s = 0.0
        """How long loading or unloading one takes."""
        self.pace: Callable[[bytes, Behaviour, float], Behaviour] | None = None
        """Sets tokens and times of each request's behaviour from its body and the time it came (`loadtests.pacing`)."""
        self.reports: dict[str, Callable[[], Json]] = {}
        """More that GET requests are answered with, by path: what a real engine says of itself."""
        self.scriptable = False
        """``POST /script`` with ``{"script": {...}, "probe": {...}}`` changes both, for engines in other processes."""
        self.uds = uds
        self.requests: list[Request] = []
        """Requests for a model's work, fully read; neither probes nor aborts."""
        self.probes: list[Request] = []
        self.aborted_rids: list[str] = []
        self.running = 0
        """Model requests read and not yet answered completely."""
        self.served = 0
        self.accepted = 0
        """Connections accepted since the beginning."""
        self.connections: set[Connection] = set()
        self._ports = ports
        self._servers: list[asyncio.Server] = []
        self._waiting: set[asyncio.Event] = set()

    @property
    def script(self) -> Behaviour:
        """What a request gets that no script of its own came with."""
        return self._script

    @script.setter
    def script(self, behaviour: Behaviour) -> None:
        self._script = behaviour
        self.answers.clear()
        self.quick = not (self.record or self.log or behaviour.split or behaviour.keepalive_s is not None)

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        if self.uds is not None:
            return ["http+unix://" + self.uds.replace("/", "%2F")]
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    @property
    def ports(self) -> tuple[int, ...]:
        """The real port numbers, once started; a restart listens on them again."""
        return self._ports

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def connect() -> Connection:
            return Connection(self, loop)

        if self.uds is not None:
            self._servers = [await loop.create_unix_server(connect, self.uds)]
            return
        ports: list[int] = []
        try:
            for port in self._ports:
                server, listening_at = await _listen(loop, connect, port)
                self._servers.append(server)
                ports.append(listening_at)
        except OSError:
            await self.stop()
            raise
        self._ports = tuple(ports)

    async def stop(self) -> None:
        """Refuse new connections and drop the open ones."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        self.drop_connections()
        await self.until(lambda: not self.connections)
        for server in servers:
            await server.wait_closed()
        if self.uds is not None:
            _remove(self.uds)

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def drop_connections(self) -> None:
        """Close every open connection now, idle or not, as a crashed engine would."""
        for connection in list(self.connections):
            connection.abort()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something about the engine is true; looked at again whenever anything happens to it."""
        changed = asyncio.Event()
        self._waiting.add(changed)
        try:
            while not condition():
                changed.clear()
                await changed.wait()
        finally:
            self._waiting.discard(changed)

    async def received(self, count: int = 1) -> Request:
        """The count-th model request, waiting for it if it has not come yet."""
        await self.until(lambda: len(self.requests) >= count)
        return self.requests[count - 1]

    def changed(self) -> None:
        for waiting in self._waiting:
            waiting.set()


async def _listen(
    loop: asyncio.AbstractEventLoop, connect: Callable[[], Connection], port: int
) -> tuple[asyncio.Server, int]:
    """A server on this port, or for 0 on one that is free, even if somebody else takes it at the same time."""
    for _ in range(0 if port else 20):
        chosen = free_port()
        with contextlib.suppress(OSError):
            return await loop.create_server(connect, "127.0.0.1", chosen, backlog=4096), chosen
    chosen = port or free_port()
    return await loop.create_server(connect, "127.0.0.1", chosen, backlog=4096), chosen


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# -- the command line


def _arguments(argv: list[str] | None) -> tuple[FakeEngine, bool]:
    parser = argparse.ArgumentParser(prog="python -m loadtests.engine", description="A fake engine.")
    parser.add_argument("--port", type=int, action="append", help="listen here on 127.0.0.1; may be repeated")
    parser.add_argument("--uds", help="listen on this unix socket instead")
    parser.add_argument("--model", action="append", help="name in GET /v1/models; may be repeated")
    parser.add_argument("--no-uvloop", action="store_true")
    parser.add_argument("--log", type=Path, help="append every request's events to this file (loadtests.served_log)")
    parser.add_argument("--scriptable", action="store_true", help="POST /script changes the script while it runs")
    script = parser.add_argument_group("the default script (see loadtests/behaviour.py)")
    names = [field.name for field in dataclasses.fields(Behaviour)]
    for name in names:
        script.add_argument("--" + name.replace("_", "-"), dest=name, nargs="?", const="true", metavar="VALUE")
    options = parser.parse_args(argv)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        behaviour = Behaviour().updated(given)
    except BadBehaviour as error:
        parser.error(str(error))
    engine = FakeEngine(
        behaviour,
        ports=tuple(options.port or (0,)),
        uds=options.uds,
        models=tuple(options.model or ("fake-model",)),
        record=False,
    )
    engine.scriptable = options.scriptable
    if options.log is not None:
        engine.log = writing_to(options.log)
        engine.script = behaviour
    return engine, not options.no_uvloop


async def _serve(engine: FakeEngine) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with engine:
        print("fake engine ready:", *engine.urls, flush=True)
        gc.freeze()
        await stopping.wait()


def run(main: Awaitable[None], *, fast: bool = True) -> None:
    """Run a coroutine on uvloop where it is installed, else on asyncio's own loop."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if fast:
        try:
            import uvloop
        except ImportError:
            pass
        else:
            factory = uvloop.new_event_loop

    async def wrapped() -> None:
        await main

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(wrapped())


def main(argv: list[str] | None = None) -> None:
    engine, fast = _arguments(argv)
    run(_serve(engine), fast=fast)


if __name__ == "__main__":
    main()
