"""Starts a whole gateway listener in the test's own event loop, on a real loopback socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from gateway.api import build_app
from gateway.config import Settings
from gateway.ledger import Ledger
from gateway.listener import Listener, bind_tcp, inference_listener, listen
from gateway.metrics import Metrics
from gateway.record import Exchange
from gateway.runtime import Runtime
from routing.policies.balanced import LeastOutstanding
from routing.router import Router


@dataclass
class Serving:
    """A gateway that answers at `url`."""

    url: str
    host: str
    port: int
    runtime: Runtime
    listener: Listener

    @property
    def records(self) -> list[Exchange]:
        """The settled exchanges, oldest first."""
        return list(self.runtime.ledger.recent)

    async def settled(self, count: int = 1, timeout_s: float = 5.0) -> list[Exchange]:
        """Wait until `count` exchanges are settled and none is under way."""
        async with asyncio.timeout(timeout_s):
            while len(self.runtime.ledger.recent) < count or self.runtime.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return self.records


def settings_for(urls: Sequence[str], *, edge: str = "protocol", engine: str = "openai", **sections: Any) -> Settings:
    """Settings with one model `m` over one pool of these replica URLs; `sections` override or add top-level ones."""
    backend = {"engine": engine, "replicas": [{"url": url} for url in urls], **sections.pop("backend", {})}
    data: dict[str, Any] = {
        "models": {"m": {"backend": "pool"}},
        "backends": {"pool": backend},
        "server": {"edge": edge, **sections.pop("server", {})},
        **sections,
    }
    return Settings(**data)


@asynccontextmanager
async def serving(
    settings: Settings, *, usage_log: Path | None = None, own_policies: bool = False
) -> AsyncIterator[Serving]:
    """Serve until the block ends; then everything is closed at once.

    Replicas are chosen by their outstanding requests, or with `own_policies` as the settings say.
    """
    ledger = Ledger(usage_log)
    policy = None if own_policies else Router(LeastOutstanding(Random(7)))
    runtime = Runtime(settings, policy, Metrics(), ledger)
    ledger.start()
    listener, sweep = inference_listener(build_app(runtime), runtime)
    runtime.ticker.add(sweep)
    sock: socket.socket = bind_tcp("127.0.0.1", 0, "server.port")
    listen([sock])
    host, port = sock.getsockname()[:2]
    task = asyncio.create_task(listener.serve([sock]))
    try:
        yield Serving(f"http://{host}:{port}", host, port, runtime, listener)
    finally:
        while not listener.started:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        listener.stop_accepting()
        listener.cut()
        # uvicorn's own way out sleeps a third of a second, which hundreds of tests would wait for.
        task.cancel()
        await asyncio.wait([task])
        async with asyncio.timeout(5.0):
            while listener.server_state.connections or listener.server_state.tasks:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await runtime.aclose()
