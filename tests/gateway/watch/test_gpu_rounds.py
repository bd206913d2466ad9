"""The rounds at a replica's GPU exporter: what comes of its page, and of its silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from backends.gpus import Gpu
from gateway.config import ConfigError, load
from gateway.gpu_metrics import gpu_families
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.runtime import Runtime
from gateway.store.protocol import Fact
from gateway.watch import notes
from gateway.watch.board import Board
from gateway.watch.watcher import Watcher
from loadtests.engine import FakeEngine
from tests.support.serving import settings_for

PAGE = (Path(__file__).parents[2] / "backends" / "pages" / "dcgm-exporter.txt").read_bytes()


class Exporter:
    """Answers every request with one page."""

    def __init__(self, page: bytes, status: int = 200) -> None:
        self.page, self.status = page, status
        self.asked: list[bytes] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0])
        head = b"HTTP/1.1 %d OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        writer.write(head % (self.status, len(self.page)) + self.page)
        writer.close()


@asynccontextmanager
async def exporting(page: bytes = PAGE, status: int = 200) -> AsyncIterator[Exporter]:
    exporter = Exporter(page, status)
    server = await asyncio.start_server(exporter.serve, "127.0.0.1", 0)
    exporter.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
    async with server:
        yield exporter


@asynccontextmanager
async def watching(engine: FakeEngine, dcgm: dict[str, Any]) -> AsyncIterator[Runtime]:
    settings = settings_for([], backend={"replicas": [{"url": engine.url, "name": "pool-0", "dcgm": dcgm}]})
    runtime = Runtime(settings, None, Metrics(), Ledger(None))
    watcher = Watcher(runtime, Random(7))
    watcher.start()
    try:
        yield runtime
    finally:
        await watcher.aclose()
        await runtime.aclose()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_replicas_gpus_are_in_the_metrics() -> None:
    async with FakeEngine() as engine, exporting() as exporter:
        async with watching(engine, {"url": exporter.url, "gpus": [0, 1], "labels": {"pod": "chat-1"}}) as runtime:
            (upstream,) = runtime.fleet.upstreams()
            await until(lambda: upstream.gpus)
            shown = {
                family.name: [(sample.labels, sample.value) for sample in family.samples]
                for family in gpu_families(runtime.fleet.upstreams())
            }
        assert exporter.asked[0] == b"GET /metrics HTTP/1.1"
    labels = {"pool": "pool", "replica": "pool-0", "gpu": "1"}
    assert shown["tidegate_gpu_use_ratio"] == [(labels, 0.88)]
    assert shown["tidegate_gpu_memory_used_bytes"] == [(labels, 75362 << 20)]
    assert shown["tidegate_gpu_memory_bytes"] == [(labels, (75362 + 5632) << 20)]
    assert shown["tidegate_gpu_power_watts"] == [(labels, 402.118)]


@pytest.mark.parametrize(("page", "status"), [(PAGE, 500), (b"<html>", 200)])
async def test_an_exporter_that_says_nothing_of_them_is_named_and_ends_nothing(page: bytes, status: int) -> None:
    async with (
        FakeEngine() as engine,
        exporting(page, status) as exporter,
        watching(engine, {"url": exporter.url}) as runtime,
    ):
        (upstream,) = runtime.fleet.upstreams()
        await until(lambda: "gpus" in upstream.signals.lacking)
        assert upstream.gpus == ()
        assert all(not family.samples for family in gpu_families([upstream]))
        await until(lambda: engine.probes)


async def test_gpus_are_forgotten_with_the_note_of_them() -> None:
    async with FakeEngine() as engine:
        runtime = Runtime(settings_for([engine.url]), None, Metrics(), Ledger(None))
        (upstream,) = runtime.fleet.upstreams()
        board, key = Board(runtime, "me"), notes.key(notes.GPUS, upstream.replica)
        board.apply(Fact(key, b'{"gpus":[{"index":"0","use":0.5}]}'))
        assert list(upstream.gpus) == [Gpu("0", 0.5)]
        board.apply(Fact(key, None))
        assert list(upstream.gpus) == []
        await runtime.aclose()


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://user:secret-word@host:9400/metrics", "only host, port and path"),
        ("http://host:9400/metrics?token=secret-word", "only host, port and path"),
        ("ftp://host/metrics", "not a URL"),
        ("host:9400", "not a URL"),
        ("http://host:99999/", "not a URL"),
    ],
)
def test_an_address_that_is_none_of_a_page_is_refused(tmp_path: Path, url: str, hint: str) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(
        "models: {m: {backend: pool}}\n"
        f"backends: {{pool: {{engine: vllm, replicas: [{{url: 'http://h:1', dcgm: {{url: '{url}'}}}}]}}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert hint in str(caught.value)
    assert "secret-word" not in str(caught.value)


def test_a_page_without_a_path_is_metrics() -> None:
    dcgm = settings_for([], backend={"replicas": [{"url": "http://h:1", "dcgm": {"url": "http://[::1]:9400/"}}]})
    (entry,) = dcgm.backends["pool"].replicas
    assert entry.dcgm is not None
    assert (entry.dcgm.origin, entry.dcgm.path) == ("http://[::1]:9400", "/metrics")
