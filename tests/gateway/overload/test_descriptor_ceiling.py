"""A real gateway process with few descriptors: it takes fewer clients, tells the rest so, and stays quiet and quick."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from pathlib import Path
from typing import Any

import httpx2
import pytest

from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.support.client import connect, post
from tests.support.process import Gateway, gateway_process, write_config

pytestmark = pytest.mark.quiet

FILES = 128
CLIENTS = 200
PATH = "/v1/chat/completions"


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))


def config(url: str, **sections: Any) -> dict[str, Any]:
    return {
        "server": {"port": 0, **sections.pop("server", {})},
        "admin": {"enabled": False},
        "models": {"m": {"backend": "pool"}},
        "backends": {"pool": {"engine": "openai", "replicas": [{"url": url}]}},
        **sections,
    }


def cpu_s(gateway: Gateway) -> float:
    fields = Path(f"/proc/{gateway.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_files(gateway: Gateway) -> tuple[str, str]:
    limits = Path(f"/proc/{gateway.process.pid}/limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if "open files" in line).split()[3:5]
    return soft, hard


async def crowd(gateway: Gateway, stack: contextlib.AsyncExitStack) -> dict[str, int]:
    """Connects all clients at once, each of which asks, and keeps its connection; what each of them got."""

    async def one() -> str:
        try:
            client = await stack.enter_async_context(connect("127.0.0.1", gateway.port))
            await client.send(post(PATH, CHAT))
            reply = await client.reply()
        except (OSError, EOFError):
            return "closed"
        code = "" if reply.status == 200 else reply.json["error"]["code"]
        return f"{reply.status} {code}".strip()

    found = await asyncio.gather(*(one() for _ in range(CLIENTS)))
    return {outcome: found.count(outcome) for outcome in set(found)}


async def answers(gateway: Gateway) -> int:
    async with httpx2.AsyncClient(trust_env=False) as client:
        return (await client.post(f"{gateway.url}{PATH}", json=CHAT)).status_code


async def test_more_clients_than_descriptors_are_refused_and_nothing_spins(tmp_path: Path) -> None:
    async with FakeEngine(record=False) as engine:
        quiet = config(engine.url, server={"max_connections": 10_000}, logging={"requests": False})
        path = write_config(tmp_path / "tidegate.yaml", quiet)
        async with gateway_process("--config", str(path), preexec=few_files) as gateway:
            assert "WARNING" in gateway.log
            said = next(line for line in gateway.log.splitlines() if "RLIMIT_NOFILE" in line)
            ceiling = int(said.split(" takes ")[1].split()[0])
            assert 10 <= ceiling <= FILES // 2
            async with contextlib.AsyncExitStack() as held:
                found = await crowd(gateway, held)
                # Those that came in the same turn of the event loop as too many others are closed by libuv itself.
                assert set(found) <= {"200", "503 overloaded", "closed", "503 overloaded_descriptors"}, found
                assert 1 <= found["200"] <= ceiling
                assert found["200"] + sum(found.get(each, 0) for each in set(found) - {"200"}) == CLIENTS
                written, spent_s = len(gateway.log), cpu_s(gateway)
                await asyncio.sleep(2.0)  # while the clients that got in keep their connections, and no others come
                assert cpu_s(gateway) - spent_s < 0.5
                assert len(gateway.log) - written < 2000
            async with asyncio.timeout(20.0):
                while await answers(gateway) != 200:  # noqa: ASYNC110 - the connections are being closed
                    await asyncio.sleep(0.05)
            assert "Too many open files" not in gateway.log
            assert "is ejected" not in gateway.log
            assert len(gateway.log.splitlines()) < 30, gateway.log


async def test_the_soft_limit_is_raised_as_far_as_is_needed_and_allowed(tmp_path: Path) -> None:
    def soft_only() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, 4096))

    async with FakeEngine(record=False) as engine:
        path = write_config(tmp_path / "tidegate.yaml", config(engine.url, server={"max_connections": 300}))
        async with gateway_process("--config", str(path), preexec=soft_only) as gateway:
            soft, hard = open_files(gateway)
            assert 600 <= int(soft) <= 800
            assert hard == "4096"
            assert "RLIMIT_NOFILE" not in gateway.log
            async with contextlib.AsyncExitStack() as held:
                assert await crowd(gateway, held) == {"200": CLIENTS}
