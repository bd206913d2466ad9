"""The store of several workers, in real processes that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from gateway import control
from gateway.listener import bind_tcp, bind_uds, listen
from gateway.store import START, Fact, MemoryStore
from gateway.store.remote import RemoteStore
from gateway.store.server import StoreServer
from tests.support.command import PATIENCE_S, ServeProcess, serve_process
from tests.support.serving import settings_for

WORKER = """
import asyncio, sys
from gateway.store.remote import RemoteStore

async def main(path, holder, lease, ttl_s):
    store = RemoteStore(path)
    print(await store.claim(lease, holder, ttl_s), flush=True)
    await store.post(f"from/{holder}", holder.encode(), ttl_s)
    await store.post("shared", holder.encode())
    cursor, known = "", set()
    while True:
        facts = await store.read_since(cursor, 10.0)
        cursor = facts.cursor
        for fact in facts.changes:
            print(fact.key, (fact.value or b"-").decode(), flush=True)

asyncio.run(main(*sys.argv[1:4], float(sys.argv[4])))
"""


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[tuple[str, StoreServer]]:
    """A store behind a socket, and the socket's path."""
    path = str(folder / "store.sock")
    server = StoreServer(MemoryStore(), bind_uds(path, "store"))
    await server.start()
    yield path, server
    await server.aclose()


@asynccontextmanager
async def worker(path: str, holder: str, lease: str, ttl_s: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that claims the lease, states a fact of its own and one that all state, then tells what it reads."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, path, holder, lease, str(ttl_s)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def says(process: asyncio.subprocess.Process, *lines: str) -> None:
    """Wait until the process has said all of these, in any order and among others."""
    assert process.stdout is not None
    missing = set(lines)
    async with asyncio.timeout(PATIENCE_S):
        while missing:
            said = (await process.stdout.readline()).decode()
            assert said, f"ended without saying {missing}"
            missing.discard(said.rstrip("\n"))


async def test_a_killed_worker_loses_its_leases_and_facts(served: tuple[str, StoreServer]) -> None:
    path, server = served
    async with worker(path, "first", "job", 4.0) as first, worker(path, "second", "other", 600.0) as second:
        await says(first, "True", "from/first first", "from/second second")
        await says(second, "from/first first")
        store = RemoteStore(path)
        killed_at = asyncio.get_running_loop().time()
        first.kill()
        while not await store.claim("job", "heir", 600.0):  # noqa: ASYNC110 - the lease has to run out
            await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - killed_at < 5.0
        await says(second, "from/first -")
        facts = {fact.key: fact.value for fact in (await store.read_since(START)).changes}
        assert facts["from/second"] == b"second"
        assert "from/first" not in facts
        await until_alone(server)
        await store.aclose()


async def until_alone(server: StoreServer) -> None:
    """The killed worker's connection is gone; those of the second worker and of the test stay."""
    async with asyncio.timeout(PATIENCE_S):
        while len(server._connections) != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def store_path(gateway: ServeProcess) -> str:
    """The socket in the only folder that the gateway made; nobody else may look into that."""
    (folder,) = gateway.runtime.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    return str(folder / "store.sock")


async def test_the_supervisor_keeps_the_store_while_workers_come_and_go(tmp_path: Path) -> None:
    async with (
        serve_process(tmp_path, ["http://127.0.0.1:9"], "--workers", "2") as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await gateway.url()
        store = RemoteStore(store_path(gateway))
        assert await store.claim("test job", "a", 60.0)
        await store.post("test fact", b"1")
        before = (await gateway.fleet(client))[0]["pid"]
        os.kill(before, signal.SIGKILL)
        await gateway.logged("worker 0 .* was ended by SIGKILL")
        async with asyncio.timeout(PATIENCE_S):
            while (await gateway.fleet(client))[0].get("pid") in (before, None):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert not await RemoteStore(store_path(gateway)).claim("test job", "b", 60.0)
        assert Fact("test fact", b"1") in (await store.read_since(START)).changes
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        assert os.listdir(gateway.runtime) == []
        with pytest.raises(Exception, match="unavailable"):
            await store.withdraw("test fact")


TALKATIVE = """
import sys
from gateway import worker_process

class Talkative(worker_process.Worker):
    async def run(self, on_ready, on_served=None):
        store, name, cursor, known = self._runtime.store, f"worker {sys.argv[1]}", "", set()
        await store.post(name, b"here")
        while len(known) < 2:
            facts = await store.read_since(cursor, 10.0)
            cursor = facts.cursor
            known.update(fact.key for fact in facts.changes if fact.key.startswith("worker "))
        print(*sorted(known), sep=" and ", flush=True)
        await super().run(on_ready, on_served)

worker_process.Worker = Talkative
sys.exit(worker_process.serve_supervised(int(sys.argv[1]), [int(fd) for fd in sys.argv[2:]]))
"""


async def test_workers_see_each_others_facts_in_the_store_they_are_told_of(
    folder: Path, served: tuple[str, StoreServer]
) -> None:
    """Workers as the supervisor starts them, but for what they say; this test is the supervisor."""
    path, _ = served
    settings = settings_for(["http://127.0.0.1:9"], shutdown={"grace_s": 0, "drain_s": 1})
    begin = control.encode(control.Begin(os.getpid(), settings, 1, path))
    async with AsyncExitStack() as at_exit:
        for_clients = at_exit.enter_context(bind_tcp("127.0.0.1", 0, "server.port"))
        workers: list[asyncio.subprocess.Process] = []
        for index in range(2):
            ours, theirs = (at_exit.enter_context(each) for each in socket.socketpair())
            admin = at_exit.enter_context(bind_uds(str(folder / f"worker-{index}.sock"), "admin"))
            fds = [theirs.fileno(), admin.fileno(), for_clients.fileno()]
            listen([admin])
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", TALKATIVE, str(index), *map(str, fds)),
                stdout=asyncio.subprocess.PIPE,
                pass_fds=fds,
            )
            workers.append(process)
            at_exit.push_async_callback(process.wait)
            at_exit.callback(process.send_signal, signal.SIGTERM)
            ours.sendall(begin)
        listen([for_clients])
        for process in workers:
            await says(process, "worker 0 and worker 1")
    assert [process.returncode for process in workers] == [0, 0]
