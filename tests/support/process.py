"""The real `tidegate serve` as a child process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Gateway:
    """A running `serve`. `url` and `port` are known once it serves."""

    def __init__(self, process: asyncio.subprocess.Process, started_at: float) -> None:
        self.process = process
        self.started_at = started_at
        self.log = ""
        self.url = ""
        self.port = 0
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log += line.decode()
            self._changed.set()
        self._changed.set()

    async def logged(self, text: str, within_s: float = 10.0) -> None:
        """Wait until the log has this text."""
        async with asyncio.timeout(within_s):
            while text not in self.log:
                assert not self._reading.done(), self.log
                self._changed.clear()
                await self._changed.wait()

    def send(self, number: signal.Signals) -> float:
        """Send a signal; returns when."""
        self.process.send_signal(number)
        return time.monotonic()

    async def exit_code(self, within_s: float = 10.0) -> int:
        async with asyncio.timeout(within_s):
            await self._reading
            return await self.process.wait()

    async def stop(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self._reading
        await self.process.wait()


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """The configuration as a file. JSON is YAML."""
    path.write_text(json.dumps(config))
    return path


def environment(**added: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return {**kept, "PYTHONPATH": str(ROOT), **added}


async def run_serve(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """For a start that is meant to fail: the exit code and what was said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        "serve",
        "--log-format=text",
        *arguments,
        env=env or environment(),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(20.0):
        _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


@contextlib.asynccontextmanager
async def gateway_process(
    *arguments: str, env: Mapping[str, str] | None = None, preexec: Callable[[], None] | None = None
) -> AsyncIterator[Gateway]:
    """`tidegate serve` with these arguments, from the moment it serves; killed at the end if it still runs."""
    started_at = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        "serve",
        "--log-format=text",
        *arguments,
        env=env or environment(),
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=preexec,
    )
    gateway = Gateway(process, started_at)
    try:
        await gateway.logged("serving on ")
        address = gateway.log.split("serving on ", 1)[1].split()[0]
        gateway.url = address
        if address.startswith("http://"):
            gateway.port = int(address.rsplit(":", 1)[1])
        yield gateway
    finally:
        await gateway.stop()
