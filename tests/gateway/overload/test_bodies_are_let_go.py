"""A large body is freed when its request is over, however that ended, and not when the garbage collector comes by.

The collector counts objects, and a worker has it look seldom: ten bodies of 10 MB are ten objects to it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT as BODY
from tests.support.client import connect, post, until
from tests.support.serving import serving, settings_for

CHAT = "/v1/chat/completions"
SIZE_BYTES = 2_000_000
REQUESTS = 5


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


def held_bytes() -> int:
    """By allocations of the gateway's own; the fake engine in the same process keeps what it likes."""
    ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/gateway/*")])
    return sum(each.size for each in ours.statistics("filename"))


async def let_go(before: int) -> None:
    """Wait for the last tasks to end; nothing that waits for the collector would be gone by then."""
    ends_at = time.monotonic() + 10
    while held_bytes() - before >= SIZE_BYTES:
        assert time.monotonic() < ends_at, f"{held_bytes() - before} bytes are still held"
        await asyncio.sleep(0.1)


def large(**fields: Any) -> bytes:
    return json.dumps({**BODY, "messages": [{"role": "user", "content": "x" * SIZE_BYTES}], **fields}).encode()


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
@pytest.mark.parametrize(
    ("script", "fields"),
    [
        (Behaviour(), {}),
        (Behaviour(), {"stream": True}),
        (Behaviour(status=500), {}),
        (Behaviour(), {"model": "unknown"}),
        (Behaviour(cut_after=2), {"stream": True}),
    ],
    ids=["served", "streamed", "failed", "refused", "broken"],
)
async def test_a_body_is_let_go_once_its_request_was_answered(
    edge: str, script: Behaviour, fields: dict[str, Any], no_collector: None
) -> None:
    async with FakeEngine(script, record=False) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        before = held_bytes()
        async with AsyncExitStack() as held:  # the connections stay open
            for _ in range(REQUESTS):
                client = await held.enter_async_context(connect(gateway.host, gateway.port))
                await client.send(post(CHAT, large(**fields)))
                await client.reply()
            await until(lambda: gateway.runtime.in_flight == 0)
            await let_go(before)


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_body_is_let_go_when_its_client_has_left(edge: str, no_collector: None) -> None:
    async with FakeEngine(hang=True, record=False) as engine, serving(settings_for([engine.url], edge=edge)) as gateway:
        before = held_bytes()
        async with AsyncExitStack() as held:
            for _ in range(REQUESTS):
                client = await held.enter_async_context(connect(gateway.host, gateway.port))
                await client.send(post(CHAT, large()))
            await until(lambda: gateway.runtime.in_flight == REQUESTS, within_s=20)
            assert held_bytes() - before > REQUESTS * SIZE_BYTES
        await until(lambda: gateway.runtime.in_flight == 0, within_s=20)
        await let_go(before)


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_body_that_is_refused_half_way_is_let_go_at_once(edge: str, no_collector: None) -> None:
    server = {"max_in_flight_bytes": SIZE_BYTES, "max_body_bytes": SIZE_BYTES}
    async with (
        FakeEngine(record=False) as engine,
        serving(settings_for([engine.url], edge=edge, server=server)) as gateway,
        AsyncExitStack() as held,
    ):
        gateway.runtime.body_budget.take(SIZE_BYTES // 10)
        before = held_bytes()
        for _ in range(REQUESTS):
            client = await held.enter_async_context(connect(gateway.host, gateway.port))
            await client.send(post(CHAT, large()[: SIZE_BYTES - 1000]))
            assert (await client.reply()).status == 503
        assert held_bytes() - before < SIZE_BYTES
