"""The sidecar: one gateway beside one application, over a Unix socket, quick to start and small."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from loadtests.engine import FakeEngine
from tests.support.process import ROOT, Gateway, environment, gateway_process, run_serve

LOOPS = ("uvloop",)

CONFIG = str(ROOT / "configs" / "sidecar.yaml")
READY_WITHIN_S = 1.0
MAX_RSS_BYTES = 80_000_000


@asynccontextmanager
async def sidecar(tmp_path: Path, engine: FakeEngine, uds: Path | None = None) -> AsyncIterator[tuple[Gateway, str]]:
    """The shipped configuration, with this engine behind it; yields the process and its socket's path."""
    path = str(uds or tmp_path / "tidegate.sock")
    replicas = json.dumps([{"url": engine.url, "max_in_flight": 4}])
    env = environment(TIDEGATE_BACKENDS__LOCAL__REPLICAS=replicas)
    async with gateway_process("--config", CONFIG, "--uds", path, env=env) as gateway:
        yield gateway, path


@asynccontextmanager
async def engine_on_a_socket(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    async with FakeEngine(uds=str(tmp_path / "engine.sock")) as engine:
        yield engine


def client_of(path: str) -> openai.AsyncOpenAI:
    """What the documentation shows: the stock SDK over the sidecar's socket."""
    transport = httpx2.AsyncHTTPTransport(uds=path)
    return openai.AsyncOpenAI(
        base_url="http://tidegate/v1", api_key="none", http_client=openai.DefaultAsyncHttpx2Client(transport=transport)
    )


def rss_bytes(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


async def ready_after_s(path: str, gateway_started_at: float) -> float:
    """Seconds from the process's start to the first `/readyz` that says yes."""
    async with httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds=path), base_url="http://tidegate") as client:
        while True:
            try:
                if (await client.get("/readyz")).status_code == 200:
                    return time.monotonic() - gateway_started_at
            except httpx2.TransportError:
                await asyncio.sleep(0.005)


@pytest.mark.alone
async def test_it_is_ready_within_a_second_and_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starts, sizes = [], []
    async with engine_on_a_socket(tmp_path) as engine:
        for number in range(3):
            async with sidecar(tmp_path, engine, tmp_path / f"{number}.sock") as (gateway, path):
                starts.append(await ready_after_s(path, gateway.started_at))
                async with client_of(path) as client:
                    for _ in range(50):
                        await client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi"}])
                sizes.append(rss_bytes(gateway.process.pid))
                gateway.send(signal.SIGTERM)
                assert await gateway.exit_code() == 0
    with capsys.disabled():
        times = ", ".join(f"{start:.2f} s" for start in starts)
        print(f"\nsidecar: ready after {times}; RSS {max(sizes) / 1e6:.0f} MB after 50 requests")
    assert statistics.median(starts) <= READY_WITHIN_S
    assert max(sizes) <= MAX_RSS_BYTES


async def test_the_stock_sdk_works_over_the_socket(tmp_path: Path) -> None:
    async with (
        engine_on_a_socket(tmp_path) as engine,
        sidecar(tmp_path, engine) as (_, path),
        client_of(path) as client,
    ):
        assert [model.id async for model in client.models.list()] == ["chat"]
        answer = await client.chat.completions.create(model="chat", messages=[])
        assert answer.choices[0].message.content
        stream = await client.chat.completions.create(model="chat", messages=[], stream=True)
        texts = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
        assert "".join(text for text in texts if text)
        embedding = await client.embeddings.create(model="chat", input="hi", encoding_format="float")
        assert embedding.data
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=[])


async def test_a_client_that_leaves_the_socket_takes_its_request_with_it(tmp_path: Path) -> None:
    async with engine_on_a_socket(tmp_path) as engine, sidecar(tmp_path, engine) as (_, path):
        engine.script = engine.script.updated({"hang_mid": 2})
        async with client_of(path) as client:
            stream = await client.chat.completions.create(model="chat", messages=[], stream=True)
            await anext(aiter(stream))
            request = await engine.received()
            left_at = time.monotonic()
            await stream.close()
            async with asyncio.timeout(5.0):
                await request.gone.wait()
            assert request.closed_at is not None
            assert request.closed_at - left_at <= 0.25


def internet_sockets(pid: int) -> set[str]:
    """The inodes of the process's TCP and UDP sockets."""
    links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6", "udp", "udp6")]
    known = {line.split()[9] for table in tables for line in table.splitlines()[1:]}
    return {link[8:-1] for link in links if link.startswith("socket:[")} & known


async def test_nobody_else_may_use_the_socket_and_no_port_is_open(tmp_path: Path) -> None:
    async with engine_on_a_socket(tmp_path) as engine, sidecar(tmp_path, engine) as (gateway, path):
        assert os.stat(path).st_mode & 0o007 == 0
        assert internet_sockets(gateway.process.pid) == set()


async def test_the_file_of_a_dead_gateway_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.sock"
    async with engine_on_a_socket(tmp_path) as engine:
        async with sidecar(tmp_path, engine, path) as (gateway, _):
            gateway.send(signal.SIGKILL)
            await gateway.exit_code()
        assert path.exists()
        async with sidecar(tmp_path, engine, path), client_of(str(path)) as client:
            assert (await client.chat.completions.create(model="chat", messages=[])).choices


async def test_a_clean_stop_leaves_no_file(tmp_path: Path) -> None:
    async with FakeEngine() as engine, sidecar(tmp_path, engine) as (gateway, _):
        gateway.send(signal.SIGTERM)
        assert await gateway.exit_code() == 0
        assert os.listdir(tmp_path) == []


async def test_a_socket_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        code, said = await run_serve("--config", CONFIG, "--uds", str(path))
        assert code == 2
        assert str(path) in said
        assert "server.uds" in said
        assert "Traceback" not in said
        assert path.exists()


async def test_a_file_that_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    code, said = await run_serve("--config", CONFIG, "--uds", str(path))
    assert code == 2
    assert str(path) in said
    assert path.read_text() == "mine"
