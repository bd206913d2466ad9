"""What the container and the process give away when something goes wrong: nothing is written, nothing is dumped."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest

from loadtests.engine import FakeEngine
from tests.support.client import connect, post
from tests.support.command import serve_process
from tests.support.process import ROOT, gateway_process
from tests.support.talking import ASK


@pytest.mark.parametrize("workers", [1, 2])
async def test_neither_the_gateway_nor_its_workers_write_core_dumps(tmp_path: Path, workers: int) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", str(workers)) as gateway:
        await gateway.url()
        pids = [gateway.process.pid, *children_of(gateway.process.pid)]
        assert len(pids) >= (1 if workers == 1 else 3)
        for pid in pids:
            assert core_limits_of(pid) == ("0", "0")


def core_limits_of(pid: int) -> tuple[str, str]:
    """The soft and the hard one."""
    ((soft, hard),) = re.findall(r"Max core file size +(\S+) +(\S+)", Path(f"/proc/{pid}/limits").read_text())
    return soft, hard


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def can_make_namespaces() -> bool:
    """Whether a mount namespace with a read-only root can be had here."""
    tried = await asyncio.create_subprocess_exec(
        *READ_ONLY, "true", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await tried.wait() == 0


READ_ONLY = ("unshare", "--mount", "--", "sh", "-c", 'mount -o remount,bind,ro / / && exec "$@"', "sh")
"""Runs a command with a root file system that cannot be written to."""


async def test_it_serves_where_nothing_can_be_written_and_there_is_no_home(tmp_path: Path) -> None:
    """A working directory without write permission, no HOME, no place for a token: served all the same, admin closed.

    Permissions do not stop root; the test below makes the whole file system read-only.
    """
    async with FakeEngine() as engine:
        config = tmp_path / "tidegate.yaml"
        config.write_text(
            json.dumps(
                {
                    "server": {"port": 0},
                    "admin": {"port": 0},
                    "models": {"m": {"backend": "pool"}},
                    "backends": {"pool": {"engine": "openai", "replicas": [{"url": engine.url}]}},
                }
            )
        )
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        async with gateway_process("--config", str(config), env=env, preexec=lambda: os.chdir(folder)) as gateway:
            async with connect("127.0.0.1", gateway.port) as client:
                await client.send(post("/v1/chat/completions", ASK))
                assert (await client.reply()).status == 200
            assert not list(folder.iterdir())


async def test_it_serves_from_a_read_only_file_system(tmp_path: Path) -> None:
    if not await can_make_namespaces():
        pytest.skip("no mount namespaces here: not shown on this machine")
    async with (
        FakeEngine() as engine,
        serve_process(
            tmp_path, [engine.url], wrapper=READ_ONLY, environ={"HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
        ) as gateway,
    ):
        port = int((await gateway.url()).rsplit(":", 1)[1])
        async with connect("127.0.0.1", port) as client:
            await client.send(post("/v1/chat/completions", ASK))
            assert (await client.reply()).status == 200
        assert not (tmp_path / "state").exists()
        assert any("admin stays closed" in line for line in gateway.log)
