"""Runs `tidegate fleet up` as a user would: a process of its own, whose lines are waited for."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from tests.support.command import PATIENCE_S, ServeProcess, clean_environ

ENGINE = [sys.executable, "-m", "loadtests.engine", "--port", "{port}", "--model", "m"]
"""A `launch.command`: a fake engine, to which options can be added."""


class Fleet:
    """A running `fleet up`, with every wait for it bounded."""

    def __init__(self, process: asyncio.subprocess.Process, state: Path) -> None:
        self.process = process
        self.state = state
        self.lines: list[str] = []
        self._read_to = 0
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode().rstrip("\n"))
            self._changed.set()
        self._changed.set()

    async def said(self, pattern: str) -> re.Match[str]:
        """The next line that matches, after the one that matched last."""
        try:
            async with asyncio.timeout(2 * PATIENCE_S):
                while True:
                    for number in range(self._read_to, len(self.lines)):
                        if found := re.search(pattern, self.lines[number]):
                            self._read_to = number + 1
                            return found
                    assert not self._reading.done(), "\n".join([f"ended without saying {pattern!r}:", *self.lines])
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError("\n".join([f"did not say {pattern!r}:", *self.lines])) from None

    def again(self) -> None:
        """Look for the next lines from the first one on."""
        self._read_to = 0

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.timeout(2 * PATIENCE_S):
            await self._reading
            return await self.process.wait()


@contextlib.asynccontextmanager
async def fleet_up(config: Path, state: Path, gateway: str, *options: str, agent: str = "box") -> AsyncIterator[Fleet]:
    """`tidegate fleet up --config ... OPTIONS`, killed at the end of the block if it still runs then."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "fleet", "up", "--config", str(config), "--agent", agent),
        *("--gateway", gateway, *options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=clean_environ({"TIDEGATE_STATE_DIR": str(state)}),
    )
    fleet = Fleet(process, state)
    try:
        yield fleet
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        async with asyncio.timeout(PATIENCE_S):
            await fleet._reading


def launching(port: int, command: Sequence[str] = ENGINE, *, engine: str = "openai", **launch: Any) -> dict[str, Any]:
    """`backends` with one pool `pool` that is launched by this command."""
    settings = {"model": "m", "port": port, "stop_timeout_s": 20, "command": list(command)} | launch
    return {"pool": {"engine": engine, "launch": settings}}


async def members(gateway: ServeProcess, client: httpx2.AsyncClient) -> dict[str, Mapping[str, Any]]:
    """Those of the pool `pool`, by name."""
    answer = (await gateway.admin(client, "/admin/members")).json()
    return {each["name"]: each for pool in answer["pools"] if pool["pool"] == "pool" for each in pool["members"]}


async def until_members(
    gateway: ServeProcess, client: httpx2.AsyncClient, states: Mapping[str, str]
) -> dict[str, Mapping[str, Any]]:
    """Wait until exactly these are there, in these states, and those that are ready among the replicas."""
    found: dict[str, Mapping[str, Any]] = {}
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            while True:
                found = await members(gateway, client)
                in_force = all(each["in_pool"] for each in found.values() if each["state"] == "ready")
                if in_force and {name: each["state"] for name, each in found.items()} == states:
                    return found
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"wanted {dict(states)}, found {found}") from None


def processes_with(text: str) -> list[int]:
    """Processes with this in their command line or environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_bytes().rpartition(b")")[2].split()[0]
                said = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
                if state not in (b"Z", b"X") and text.encode() in said:
                    found.append(int(folder.name))
    return found


async def none_left(text: str) -> None:
    """Wait until no process has this in its command line or environment."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while processes_with(text):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"still there: {processes_with(text)}") from None
