"""A client that leaves stops the engine: by the engine's own count, streaming and not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.engines.conftest import Served
from tests.engines.gateway_process import MODEL, eventually
from tests.engines.replica import Replica

pytestmark = pytest.mark.engine

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me all about the sea."}]
# Far longer than the tests wait, so that only a cancellation can end it in time.
LONG = 1500
ENDLESS = {"ignore_eos": True}
STOPS_WITHIN_S = 1.0
"""The gateway takes at most 250 ms of it; the rest is the engine's, on a busy machine."""


async def stream_it(client: AsyncOpenAI, n: int = 1) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=LONG, n=n, stream=True, extra_body=ENDLESS
    )
    async for _ in stream:
        pass


async def wait_for_it(client: AsyncOpenAI, n: int = 1) -> None:
    await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=LONG, n=n, extra_body=ENDLESS)


async def leave(served: Served, request: Coroutine[Any, Any, None], *, stops_within_s: float, running: int = 1) -> None:
    """Send the request, leave while the engine works on it, and see the engine become idle in time."""
    began_at_unix_s = time.time() - 0.001  # records are rounded to milliseconds
    asking = asyncio.create_task(request)
    await eventually(lambda: served.running() == running, limit_s=30, what="the engine works on the request")
    asking.cancel()
    await eventually(lambda: served.running() == 0, limit_s=stops_within_s, what="the engine has stopped")
    with pytest.raises(asyncio.CancelledError):
        await asking
    record = await served.gateway.record(lambda record: record["time_unix_s"] >= began_at_unix_s)
    assert record["outcome"] == "client_left"


async def test_engine_stops_when_the_reader_of_a_stream_is_gone(served: Served) -> None:
    async with served.gateway.async_sdk() as client:
        await leave(served, stream_it(client), stops_within_s=STOPS_WITHIN_S)


async def test_engine_stops_when_a_stream_is_closed_halfway(served: Served) -> None:
    async with served.gateway.async_sdk() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=LONG, stream=True, extra_body=ENDLESS
        )
        chunks = aiter(stream)
        for _ in range(5):
            await anext(chunks)
        assert await asyncio.to_thread(served.running) == 1
        await stream.close()
        await eventually(lambda: served.running() == 0, limit_s=STOPS_WITHIN_S, what="the engine has stopped")


async def test_engine_stops_when_nobody_waits_for_a_whole_answer(served: Served) -> None:
    """Neither would by itself in this time: llama.cpp is asked to stream, SGLang is told with `/abort_request`."""
    async with served.gateway.async_sdk() as client:
        await leave(served, wait_for_it(client), stops_within_s=STOPS_WITHIN_S)


@pytest.mark.slow
async def test_sglang_stops_all_choices(served_sglang: Served) -> None:
    """With `n` it makes up ids of its own, which nobody can abort by; the closed connection has to do."""
    async with served_sglang.gateway.async_sdk() as client:
        await leave(served_sglang, stream_it(client, n=2), running=2, stops_within_s=STOPS_WITHIN_S)
        await leave(served_sglang, wait_for_it(client, n=2), running=2, stops_within_s=6)


@pytest.mark.slow
async def test_sglang_counts_an_aborted_request(served_sglang: Served, sglang_replica: Replica) -> None:
    before = (await asyncio.to_thread(sglang_replica.counts)).aborted
    assert before is not None
    async with served_sglang.gateway.async_sdk() as client:
        await leave(served_sglang, stream_it(client), stops_within_s=STOPS_WITHIN_S)
    await eventually(lambda: sglang_replica.counts().aborted == before + 1, limit_s=10, what="the counter has risen")
