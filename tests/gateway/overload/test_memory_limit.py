"""A real gateway process in a cgroup of 256 MiB, and more large requests than fit: it refuses, lives, and recovers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT as BODY
from tests.gateway.overload.test_descriptor_ceiling import PATH, config
from tests.support.client import RawClient, connect, post
from tests.support.process import gateway_process, write_config

pytestmark = pytest.mark.quiet

LIMIT_BYTES = 256 << 20
CLIENTS = 30


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup below our own with that limit on its memory, of either kind."""
    folder = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        top = Path("/sys/fs/cgroup") if not controllers else Path("/sys/fs/cgroup/memory")
        limit = "memory.max" if not controllers else "memory.limit_in_bytes"
        if controllers and "memory" not in controllers.split(","):
            continue
        made = top / path.strip("/") / f"tidegate-test-{os.getpid()}"
        try:
            made.mkdir()
        except OSError:
            continue
        try:
            (made / limit).write_text(str(LIMIT_BYTES))
        except OSError:  # the controller is not there, or not given to those below
            made.rmdir()
            continue
        folder = made
        break
    if folder is None:
        pytest.skip("no cgroup with a limit on memory can be made here")
    yield folder
    for _ in range(200):
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.05)


def resident_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


async def answer_within(client: RawClient, within_s: float) -> int:
    """The status of the reply that has come; 0 when none has."""
    try:
        async with asyncio.timeout(within_s):
            return (await client.reply()).status
    except TimeoutError:
        return 0


async def test_more_large_bodies_than_memory_are_refused_and_nobody_is_killed(tmp_path: Path, cgroup: Path) -> None:
    def enter() -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    body = json.dumps({**BODY, "messages": [{"role": "user", "content": "x" * 9_500_000}]}).encode()
    async with FakeEngine(record=False, hang=True) as engine:
        path = write_config(tmp_path / "tidegate.yaml", config(engine.url))
        async with gateway_process("--config", str(path), preexec=enter) as gateway:
            assert "of request bodies at once, not 512" in gateway.log
            assert "(cgroup)" in gateway.log
            pid = gateway.process.pid
            before_mib = resident_mib(pid)
            async with contextlib.AsyncExitStack() as held:
                clients = [await held.enter_async_context(connect("127.0.0.1", gateway.port)) for _ in range(CLIENTS)]
                for client in clients:
                    await client.send(post(PATH, body))
                statuses = await asyncio.gather(*(answer_within(client, 3.0) for client in clients))
                assert set(statuses) == {0, 503}  # held by the engine, or refused
                assert 2 <= statuses.count(0) <= 16
                await gateway.logged("overload level")
            engine.script = engine.script.__class__()
            await gateway.logged("overload is over", within_s=30)
            async with connect("127.0.0.1", gateway.port) as client:
                await client.send(post(PATH, BODY))
                assert (await client.reply()).status == 200
            assert gateway.process.returncode is None
            # The allocator keeps about 110 MiB, in pieces, and uses them again: four rounds ended at the same figure.
            assert resident_mib(pid) < min(before_mib + 140, 0.8 * (LIMIT_BYTES >> 20))
