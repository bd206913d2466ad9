"""How spans are sent: with what configuration and environment say, and what happens when nobody takes them."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gateway.config import ConfigError, Settings, load
from gateway.telemetry import export
from gateway.telemetry.content import Captured
from gateway.telemetry.service import Service
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from tests.support.http import ask
from tests.support.otlp import Collector, attributes
from tests.support.process import ROOT, write_config
from tests.support.serving import Serving, serving, settings_for

SECRET = "canary-collector-key-51ce7d"


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine() as fake:
        yield fake


@asynccontextmanager
async def traced(engine: FakeEngine, endpoint: str, **telemetry: Any) -> AsyncIterator[Serving]:
    told = {"endpoint": endpoint, "ratio": 1.0, **telemetry}
    async with serving(settings_for([engine.url], telemetry=told)) as gateway:
        yield gateway


def service(gateway: Serving) -> Service:
    assert gateway.runtime.telemetry is not None
    return gateway.runtime.telemetry


def counted(gateway: Serving) -> dict[str, float]:
    """Spans sent, and dropped by reason."""
    found = {}
    for family in service(gateway).families():
        for each in family.samples:
            if each.name.startswith("tidegate_spans"):
                found[each.labels.get("reason", "sent")] = each.value
    return found


async def until(condition: Any) -> None:
    async with asyncio.timeout(15.0):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.01)


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which connections are refused."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


LOADED = """
import asyncio, sys
from gateway import serve, worker_process, supervisor
from gateway.config import Settings
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.runtime import Runtime
async def main():
    await Runtime(Settings(telemetry={told}), None, Metrics(), Ledger(None)).aclose()
asyncio.run(main())
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"opentelemetry", "requests", "google"}}))
"""


@pytest.mark.parametrize(
    ("told", "loaded"),
    [("{}", "[]"), ("{'endpoint': 'http://127.0.0.1:9'}", "['google', 'opentelemetry', 'requests']")],
)
def test_nothing_of_opentelemetry_is_loaded_without_an_endpoint(told: str, loaded: str) -> None:
    asked = [sys.executable, "-c", LOADED.format(told=told)]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == loaded, done.stderr


async def test_what_is_left_is_sent_at_the_end(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    async with traced(engine, collector.url) as gateway:
        for _ in range(3):
            await ask(gateway, CHAT)
        await gateway.settled(3)
        assert collector.spans == []
    assert len(collector.spans) == 6


async def test_a_dead_collector_costs_a_counted_loss_and_one_line(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with nobody() as url, caplog.at_level(logging.DEBUG, "opentelemetry"):
        begun = time.monotonic()
        async with traced(engine, url, timeout_s=0.5) as gateway:
            for _ in range(3):
                assert (await ask(gateway, CHAT)).status == 200
                await gateway.settled()
                lost = counted(gateway)["export"]
                await until(lambda lost=lost: counted(gateway)["export"] > lost)
            assert counted(gateway) == {"sent": 0, "export": 6, "queue": 0, "rate": 0}
        assert time.monotonic() - begun < 10
    said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert said == [f"spans cannot be sent to {url}; from now on losses are only counted"]


async def test_a_collector_that_comes_back_is_said_to(
    engine: FakeEngine, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.telemetry")
    collector.status = 400
    async with traced(engine, collector.url) as gateway:
        await ask(gateway, CHAT)
        await until(lambda: counted(gateway)["export"] == 2)
        collector.status = 200
        await ask(gateway, CHAT)
        await until(lambda: counted(gateway)["sent"] == 2)
    assert [each.levelname for each in caplog.records] == ["WARNING", "INFO"]


async def test_a_collector_that_hangs_holds_a_bounded_queue_and_no_end(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_QUEUED", 600)
    collector.gate.clear()
    async with traced(engine, collector.url, max_spans_per_s=100_000, timeout_s=1.0) as gateway:
        runtime = gateway.runtime
        assert (await ask(gateway, CHAT)).status == 200
        record = (await gateway.settled())[0]
        for _ in range(1000):
            assert runtime.tracing is not None
            record.traced = runtime.tracing.begin([])
            service(gateway).settled(record)
        found = counted(gateway)
        assert found["queue"] >= 2 * 1001 - 600 - 600  # what was lost meanwhile has made room
        begun = time.monotonic()
    assert time.monotonic() - begun < 8  # its time-out for the flush, and the end of the listener


async def test_texts_that_wait_are_bounded_as_well(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_TEXT_BYTES", 5000)
    collector.gate.clear()
    async with traced(engine, collector.url, max_spans_per_s=100_000) as gateway:
        await ask(gateway, CHAT)
        record = (await gateway.settled())[0]

        def again() -> None:
            assert gateway.runtime.tracing is not None
            record.traced = gateway.runtime.tracing.begin([])
            record.traced.captured = Captured({"prompt": "z" * 1000}, 4096)
            service(gateway).settled(record)
            assert record.traced.captured is None  # the ledger keeps records

        def texts() -> int:
            return sum("gen_ai.input.messages" in attributes(each) for each in collector.spans)

        for _ in range(20):
            again()
        collector.gate.set()
        await until(lambda: counted(gateway)["sent"] == 42)
        assert texts() == 5
        again()
        await until(lambda: texts() == 6)


async def test_headers_and_token_reach_the_collector_and_no_log(
    tmp_path: Path, engine: FakeEngine, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = {"endpoint": collector.url + "/otlp/v1/", "ratio": 1.0, "token": {"env": "TOKEN"}}
    told["headers"] = {"X-Api-Key": {"env": "KEY"}}
    settings = load(
        write_config(
            tmp_path / "c.yaml",
            {
                "models": {"m": {"backend": "pool"}},
                "backends": {"pool": {"engine": "openai", "replicas": [{"url": engine.url}]}},
                "telemetry": told,
            },
        ),
        {"KEY": SECRET, "TOKEN": SECRET + "-token"},
    )
    assert SECRET not in repr(settings) + settings.model_dump_json()
    async with serving(settings) as gateway:
        await ask(gateway, CHAT)
        await collector.until(lambda: collector.spans)
    assert collector.headers[0]["x-api-key"] == SECRET
    assert collector.headers[0]["authorization"] == f"Bearer {SECRET}-token"
    assert SECRET not in caplog.text


async def test_the_standard_variables_hold_where_the_configuration_says_nothing(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-mine=1,x-both=environment")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=search,deployment.environment.name=dev")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-the-environment")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    told = {"headers": {"x-both": "file"}, "resource": {"deployment.environment.name": "production"}}
    async with traced(engine, collector.url, **told) as gateway:
        await ask(gateway, CHAT)
        await collector.until(lambda: collector.spans)
    sent = collector.headers[0]
    assert (sent["x-mine"], sent["x-both"], sent["content-encoding"]) == ("1", "file", "gzip")
    said = attributes(collector.traces[0].resource_spans[0].resource)
    assert said["service.name"] == "from-the-environment"
    assert said["deployment.environment.name"] == "production"
    assert (said["team"], said["tidegate.worker"]) == ("search", 0)
    assert said["service.instance.id"]


async def test_a_name_of_the_configuration_comes_first_and_tidegate_last(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with traced(engine, collector.url) as gateway:
        await ask(gateway, CHAT)
        await collector.until(lambda: collector.spans)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-the-environment")
    async with traced(engine, collector.url, service_name="edge-1") as gateway:
        await ask(gateway, CHAT)
        await collector.until(lambda: len(collector.traces) > 1)
    names = [attributes(each.resource_spans[0].resource)["service.name"] for each in collector.traces]
    assert names == ["tidegate", "edge-1"]


async def test_no_variable_but_the_one_to_turn_it_off_is_a_switch(
    engine: FakeEngine, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    async with serving(settings_for([engine.url])) as gateway:
        assert gateway.runtime.telemetry is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with traced(engine, collector.url) as gateway:
        assert gateway.runtime.telemetry is None
        assert (await ask(gateway, CHAT)).status == 200


async def test_a_collector_that_sends_elsewhere_is_not_followed_and_not_believed(engine: FakeEngine) -> None:
    asked = []

    class Moved(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(307)
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Moved) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        async with traced(engine, f"http://127.0.0.1:{server.server_address[1]}") as gateway:
            await ask(gateway, CHAT)
            await until(lambda: counted(gateway)["export"] == 2)
        server.shutdown()
        thread.join()
    assert asked == ["/v1/traces"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"endpoint": "http://u:p@x"}, "credentials"),
        ({"endpoint": "http://x:4318/v1/traces"}, "goes too far"),
        ({"endpoint": "unix:///run/x"}, "socket"),
        ({"endpoint": "http://x", "headers": {"x-api-key": "literal"}}, "secret"),
        ({"endpoint": "http://x", "headers": {"host": {"env": "KEY"}}}, "set by the gateway"),
        ({"endpoint": "http://x", "ratio": 1.5}, "ratio"),
        ({"endpoint": "http://x", "semconv": "1.0"}, "semconv"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    config = write_config(tmp_path / "c.yaml", {"telemetry": told})
    with pytest.raises(ConfigError, match=said):
        load(config, {"KEY": "x"})


def test_it_is_off_by_default() -> None:
    assert Settings().telemetry.endpoint is None
