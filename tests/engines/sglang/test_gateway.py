"""What only SGLang shows: its stream's bytes, its full queue, its way to stop, and two replicas of which one dies."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from tests.engines.conftest import Served
from tests.engines.gateway_process import MODEL, eventually, running_gateway
from tests.engines.replica import NAME, RUNNING_LIMIT, Replica
from tests.engines.sglang.replica import QUEUE_LIMIT
from tests.engines.tap import tapped

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me all about the sea."}]
LONG = 3000


async def start_stream(client: AsyncOpenAI, max_tokens: int = LONG) -> tuple[str, AsyncStream[ChatCompletionChunk]]:
    """Begin a stream; the replica that serves it, and the stream."""
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=max_tokens, temperature=0, stream=True
    )
    return raw.headers["x-tidegate-replica"], raw.parse()


async def read_whole(stream: AsyncStream[ChatCompletionChunk]) -> tuple[int, str | None]:
    """Read to the end: how many pieces of content came, and the finish reason."""
    pieces, finish_reason = 0, None
    async for chunk in stream:
        for choice in chunk.choices:
            pieces += bool(choice.delta.content)
            finish_reason = choice.finish_reason or finish_reason
    return pieces, finish_reason


@pytest.mark.parametrize("shown", [False, True], ids=["usage hidden", "usage shown"])
@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}], ids=str)
async def test_stream_is_the_engines_own_byte_for_byte(
    sglang_replica: Replica, tmp_path: Path, options: dict[str, Any], shown: bool
) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "stream": True, **options}
    if shown:
        body["stream_options"] = {"include_usage": True}
    async with tapped(sglang_replica.url) as tap, httpx2.AsyncClient(trust_env=False, timeout=120) as client:
        with running_gateway(
            tmp_path / "gateway", engine="sglang", upstream_model=NAME, replicas={"tapped": tap.url}
        ) as gateway:
            answer = await client.post(f"{gateway.url}/v1/chat/completions", json=body)
        sent = tap.body()
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert sent.count(b"\n\n") > 10
    assert sent.endswith(b"data: [DONE]\n\n")
    usage = [event for event in sent.split(b"\n\n") if b'"choices":[]' in event]
    assert len(usage) == 1
    assert answer.content == (sent if shown else sent.replace(usage[0] + b"\n\n", b""))


async def test_embeddings_it_does_not_serve_are_refused_in_openais_shape(served_sglang: Served) -> None:
    async with served_sglang.gateway.async_sdk() as client:
        with pytest.raises(openai.BadRequestError, match="embedding"):
            await client.embeddings.create(model=MODEL, input="tide")


async def test_full_queue_is_a_503_on_a_stream_too(served_sglang: Served) -> None:
    """SGLang itself answers 200 and puts its refusal into the stream."""
    async with served_sglang.gateway.async_sdk() as client:

        async def occupy() -> None:
            _, stream = await start_stream(client)
            await read_whole(stream)

        full = RUNNING_LIMIT + QUEUE_LIMIT
        async with asyncio.TaskGroup() as group:
            # One by one: the limit is on those that wait, and all are waiting at first.
            tasks = []
            for count in range(1, full + 1):
                tasks.append(group.create_task(occupy()))
                await eventually(lambda: served_sglang.running() == count, limit_s=30, what=f"{count} in the engine")  # noqa: B023
            with pytest.raises(openai.InternalServerError) as caught:
                await start_stream(client)
            for task in tasks:
                task.cancel()
    assert caught.value.status_code == 503
    assert caught.value.code == "upstream_overloaded"
    assert "queue is full" in str(caught.value)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    await eventually(lambda: served_sglang.running() == 0, limit_s=10, what="the engine is idle")


async def test_a_replica_told_to_stop_still_finishes_its_streams(sglang_replica: Replica, tmp_path: Path) -> None:
    """SGLang drains on SIGTERM: the answer under way comes whole. Once it is gone, the client is told so."""
    with running_gateway(
        tmp_path / "gateway", engine="sglang", upstream_model=NAME, replicas={"leaving": sglang_replica.url}
    ) as gateway:
        async with gateway.async_sdk() as client:
            _, stream = await start_stream(client, max_tokens=400)
            await anext(aiter(stream))
            sglang_replica.terminate()
            _, finish_reason = await read_whole(stream)
            assert finish_reason == "length"
            await asyncio.to_thread(sglang_replica.process.wait, sglang_replica.kind.stop_limit_s)
            began_at = time.monotonic()
            with pytest.raises(openai.InternalServerError) as caught:
                await start_stream(client)
            assert time.monotonic() - began_at < 3
    assert caught.value.status_code in (502, 503)


async def test_a_killed_replica_breaks_its_stream_and_nothing_else(
    sglang_pair: tuple[Replica, Replica], tmp_path: Path
) -> None:
    steady, doomed = sglang_pair
    with running_gateway(
        tmp_path / "gateway",
        engine="sglang",
        upstream_model=NAME,
        replicas={"steady": steady.url, "doomed": doomed.url},
    ) as gateway:
        async with gateway.async_sdk() as client:
            # Least outstanding: with one stream on one of them, the second goes to the other.
            streams = dict([await start_stream(client, 500), await start_stream(client, 500)])
            assert set(streams) == {"steady", "doomed"}
            await anext(aiter(streams["doomed"]))
            doomed.kill()
            with pytest.raises(openai.APIError) as caught:
                await read_whole(streams["doomed"])
            assert caught.value.code == "upstream_disconnected"
            _, finish_reason = await read_whole(streams["steady"])
            assert finish_reason == "length"
            for _ in range(4):
                replica, stream = await start_stream(client, 2)
                assert replica == "steady"
                assert (await read_whole(stream))[1] == "length"
            broken = await gateway.record(lambda record: record["replica"] == "doomed")
    assert broken["outcome"] == "upstream_interrupted"
    assert broken["content_events"] > 0
