"""What clients and operators see of a worker that is short of something."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from gateway.config.overload import Overload as OverloadSettings
from gateway.errors import Overloaded
from gateway.overload.levels import CALM_S
from gateway.overload.service import EVERY_S, Overload
from gateway.runtime import ByteBudget
from gateway.state import LocalSource
from gateway.store.places import Band
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT as BODY
from loadtests.rawclient import Reply
from tests.support.client import connect, post, until
from tests.support.http import ask
from tests.support.serving import Serving, serving, settings_for

CHAT = "/v1/chat/completions"
CLASSES = ("critical", "standard", "batch", "sheddable")
SHED = {
    0: (),
    1: ("sheddable",),
    2: ("batch", "sheddable"),
    3: ("standard", "batch", "sheddable"),
}


def shed_at(overload: Overload) -> tuple[str, ...]:
    shed = []
    for band in Band:
        try:
            overload.check(band)
        except Overloaded:
            shed.append(CLASSES[band])
    return tuple(shed)


def worker(used: int = 0, **settings: Any) -> tuple[Overload, ByteBudget]:
    budget = ByteBudget(1000)
    budget.take(used)
    return Overload(OverloadSettings(**settings), budget, Random(1)), budget


def test_each_level_sheds_its_classes_and_never_the_critical_one() -> None:
    for used, level in ((0, 0), (800, 1), (900, 2), (950, 3), (1000, 3)):
        overload, _ = worker(used)
        overload.sample(0.0, 0.0)
        assert overload.level == level
        assert shed_at(overload) == SHED[level]
        assert overload.closing == (level >= 2)


def test_retries_are_spread_over_two_seconds() -> None:
    overload, _ = worker(1000)
    overload.sample(0.0, 0.0)
    waits = []
    for _ in range(200):
        with pytest.raises(Overloaded) as raised:
            overload.check(Band.BATCH)
        assert raised.value.retry_after_s is not None
        waits.append(raised.value.retry_after_s)
    assert 1.0 <= min(waits) < 1.2 < 2.8 < max(waits) <= 3.0


def test_one_line_is_logged_for_each_change_of_level_with_the_figure(caplog: pytest.LogCaptureFixture) -> None:
    overload, budget = worker()
    with caplog.at_level(logging.INFO):
        for step in range(20):
            budget.used_bytes = 920 if step < 10 else 960
            overload.sample(step * EVERY_S, 0.0)
        budget.used_bytes = 0
        for step in range(20, 80):
            overload.sample(step * EVERY_S, 0.0)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        "overload level 2 (was 0)",
        "overload level 3 (was 2)",
        "overload level 2 (was 3)",
        "overload level 1 (was 2)",
        "overload is over (level was 1)",
    ]
    assert "request bytes held are at 92.0%" in lines[0]
    assert "only critical requests are served" in lines[1]


def test_bytes_that_slow_clients_have_not_fetched_count_as_held() -> None:
    overload, _ = worker(500)
    overload._unsent = lambda: 400
    overload.sample(0.0, 0.0)
    assert overload.level == 2
    assert overload.reading.held_bytes == 0.9


def test_switched_off_it_measures_and_sheds_nothing() -> None:
    overload, _ = worker(1000, enabled=False)
    overload.sample(0.0, 0.0)
    assert (overload.level, overload.reading.held_bytes) == (0, 1.0)
    assert shed_at(overload) == ()


def test_a_reload_changes_thresholds_and_can_switch_it_off() -> None:
    overload, _ = worker(850)
    overload.sample(0.0, 0.0)
    assert overload.level == 1
    overload.reload(OverloadSettings(shed_batch_at=0.85))
    overload.sample(0.25, 0.0)
    assert overload.level == 2
    overload.reload(OverloadSettings(enabled=False))
    overload.sample(0.5, 0.0)
    assert (overload.level, overload.closing) == (0, False)


# Over real sockets.


@asynccontextmanager
async def short_of_bytes(share: float, edge: str = "protocol") -> AsyncIterator[tuple[FakeEngine, Serving]]:
    """A gateway of which that share of the request bytes is taken by others."""
    async with FakeEngine(chunks=2) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        budget = gateway.runtime.body_budget
        taken = int(budget.limit_bytes * share)
        budget.take(taken)
        try:
            gateway.runtime.overload.sample(time.monotonic(), 0.0)
            yield engine, gateway
        finally:
            budget.give_back(taken)


async def of_class(gateway: Serving, name: str, stream: bool = False) -> Reply:
    return await ask(gateway, {**BODY, "stream": stream}, CHAT, f"x-tidegate-class: {name}")


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_shed_request_gets_503_and_a_time_and_never_reaches_a_replica(edge: str, stream: bool) -> None:
    async with short_of_bytes(0.91, edge) as (engine, gateway):
        reply = await of_class(gateway, "batch", stream)
        assert reply.status == 503
        assert reply.json["error"]["code"] == "overloaded_bytes"
        assert reply.json["error"]["type"] == "server_error"
        assert 1 <= int(reply.headers["retry-after"]) <= 3
        assert reply.headers["connection"] == "close"
        assert reply.headers["x-request-id"]
        assert (await of_class(gateway, "standard")).status == 200
        assert len(engine.requests) == 1
        shed, served = await gateway.settled(2)
        assert (shed.outcome, shed.error_code, shed.attempts) == ("unavailable", "overloaded_bytes", 0)
        assert served.outcome == "completed"
        assert gateway.runtime.in_flight == 0


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_large_body_of_a_class_that_is_shed_is_not_even_read(edge: str) -> None:
    async with short_of_bytes(0.96, edge) as (_, gateway), connect(gateway.host, gateway.port) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        await client.send(f"{head}content-length: 9000000\r\n\r\n".encode())
        reply = await client.reply()
        assert (reply.status, reply.json["error"]["code"]) == (503, "overloaded_bytes")
        assert gateway.runtime.in_flight == 0
        assert len(gateway.records) == 0


async def test_a_large_body_is_judged_by_the_class_in_its_head() -> None:
    async with short_of_bytes(0.91) as (_, gateway):
        body = {**BODY, "messages": [{"role": "user", "content": "x" * 100_000}]}
        assert (await ask(gateway, body, CHAT)).status == 200
        assert (await ask(gateway, body, CHAT, "x-tidegate-class: batch")).status == 503
        assert (await ask(gateway, body, CHAT, "x-tidegate-class: none")).status == 400


async def test_from_level_two_on_replies_that_are_served_close_their_connection_as_well() -> None:
    async with short_of_bytes(0.85) as (_, gateway), connect(gateway.host, gateway.port) as client:
        for _ in range(2):
            await client.send(post(CHAT, BODY))
            assert "connection" not in (await client.reply()).headers
        gateway.runtime.body_budget.take(int(gateway.runtime.body_budget.limit_bytes * 0.06))
        gateway.runtime.overload.sample(time.monotonic(), 0.0)
        await client.send(post(CHAT, BODY))
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.rest() == b""
        gateway.runtime.body_budget.give_back(int(gateway.runtime.body_budget.limit_bytes * 0.06))


async def test_health_is_answered_while_next_to_everything_is_shed() -> None:
    async with short_of_bytes(0.96) as (_, gateway):
        assert (await of_class(gateway, "standard")).status == 503
        for path in ("/livez", "/readyz"):
            async with connect(gateway.host, gateway.port) as client:
                await client.send(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
                reply = await client.reply()
                assert (reply.status, reply.headers["connection"]) == (200, "close")


async def test_streams_under_way_go_on_when_the_level_rises() -> None:
    async with short_of_bytes(0.0) as (engine, gateway):
        engine.script = engine.script.__class__(chunks=20, interval_s=0.02)
        streaming = asyncio.create_task(of_class(gateway, "sheddable", stream=True))
        await until(lambda: engine.running)
        gateway.runtime.body_budget.used_bytes += gateway.runtime.body_budget.limit_bytes
        gateway.runtime.overload.sample(time.monotonic(), 0.0)
        assert gateway.runtime.overload.level == 3
        reply = await streaming
        assert reply.status == 200
        assert b"[DONE]" in reply.body
        gateway.runtime.body_budget.give_back(gateway.runtime.body_budget.limit_bytes)


async def test_operators_see_the_level_the_pressures_and_who_was_shed() -> None:
    async with short_of_bytes(0.91) as (_, gateway):
        for name in ("batch", "batch", "sheddable"):
            assert (await of_class(gateway, name)).status == 503
        source = LocalSource(gateway.runtime)
        shown = (await source.fleet())["overload"]
        assert (shown["level"], shown["cause"]) == (2, "held_bytes")
        assert shown["pressure"]["held_bytes"] == 0.91
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in await source.metrics()
            for sample in family.samples
        }
        assert samples["tidegate_overload_level",] == 2
        assert samples["tidegate_overload_shed_total", "batch", "held_bytes"] == 2
        assert samples["tidegate_overload_shed_total", "sheddable", "held_bytes"] == 1
        assert samples["tidegate_overload_pressure_ratio", "held_bytes"] == pytest.approx(0.91)


# Its timer.


async def test_it_samples_by_itself_between_start_and_close() -> None:
    overload, budget = worker()
    overload.start(descriptors=1_000_000, unsent=int)
    budget.used_bytes = 960
    await until(lambda: overload.level == 3)
    assert overload.reading.descriptors > 0
    assert overload.state()["memory_limit_bytes"] > 0
    budget.used_bytes = 0
    overload.close()
    await asyncio.sleep(2 * EVERY_S)
    assert overload.level == 3


@pytest.mark.quiet
async def test_an_event_loop_that_is_held_up_again_and_again_sheds_batch_until_it_is_not() -> None:
    overload, _ = worker()
    overload.start(descriptors=1_000_000, unsent=int)
    try:
        ends_at = time.monotonic() + 15
        while not overload.level and time.monotonic() < ends_at:
            time.sleep(0.7)  # noqa: ASYNC251 - that is what is tested
            await asyncio.sleep(0)
        assert overload.level == 2
        assert shed_at(overload) == ("batch", "sheddable")
        await until(lambda: overload.level == 0, within_s=CALM_S + 20)
    finally:
        overload.close()


async def test_a_worker_with_little_memory_holds_fewer_request_bytes_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    budget = ByteBudget(512 << 20)
    overload = Overload(OverloadSettings(max_memory_bytes=1 << 30), budget, Random(1))
    with caplog.at_level(logging.INFO):
        overload.start(descriptors=1_000_000, unsent=int, largest_bytes=10 << 20)
    assert 10 << 20 < budget.limit_bytes < 512 << 20
    assert "of request bodies at once, not 512 (server.max_in_flight_bytes)" in caplog.text
    overload.reload(OverloadSettings(max_memory_bytes=64 << 30))
    assert budget.limit_bytes == 512 << 20
    overload.close()
