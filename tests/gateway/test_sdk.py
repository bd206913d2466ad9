"""The stock OpenAI SDK works against the gateway unchanged."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from gateway.order import EMBEDDINGS
from loadtests.behaviour import Behaviour
from loadtests.replies import ANSWER
from tests.support.sdk import sdk

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Grüß Gott"}]
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "tool_0", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@EDGES
async def test_chat(edge: str) -> None:
    async with sdk(edge) as (client, _, gateway):
        answer = await client.chat.completions.create(model="m", messages=MESSAGES)
        (record,) = await gateway.settled()
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 256
    assert answer._request_id == record.request_id


@EDGES
async def test_chat_as_a_stream(edge: str) -> None:
    async with sdk(edge) as (client, _, _):
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) == 16
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


@EDGES
async def test_stream_options_show_the_usage(edge: str) -> None:
    async with sdk(edge) as (client, _, _):
        stream = await client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 128


@EDGES
async def test_the_streaming_helper_accumulates(edge: str) -> None:
    async with (
        sdk(edge, Behaviour(tool_calls=2)) as (client, _, _),
        client.chat.completions.stream(model="m", messages=MESSAGES, tools=[TOOL]) as stream,
    ):
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [(each.function.name, each.function.arguments) for each in calls] == [
        ("tool_0", '{"city":"Paris"}'),
        ("tool_1", '{"city":"Paris"}'),
    ]


@EDGES
async def test_n_choices(edge: str) -> None:
    async with sdk(edge) as (client, _, _):
        answer = await client.chat.completions.create(model="m", messages=MESSAGES, n=2)
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, n=2, stream=True)
        finished = [each.index async for chunk in stream for each in chunk.choices if each.finish_reason]
    assert [each.index for each in answer.choices] == [0, 1]
    assert sorted(finished) == [0, 1]


@EDGES
async def test_tools(edge: str) -> None:
    async with sdk(edge, Behaviour(tool_calls=1)) as (client, engine, _):
        answer = await client.chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL], tool_choice="auto")
        assert engine.requests[0].json()["tools"] == [TOOL]
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.arguments == '{"city":"Paris"}'
    assert answer.choices[0].finish_reason == "tool_calls"


class City(BaseModel):
    city: str


PARIS = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": '{"city":"Paris"}'}, "finish_reason": "stop"},
    ],
}


def whole(value: Any) -> Behaviour:
    """Answer with this JSON."""
    text = json.dumps(value)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    return Behaviour(raw=head + text)


@EDGES
async def test_structured_outputs(edge: str) -> None:
    async with sdk(edge, whole(PARIS)) as (client, engine, _):
        parsed = await client.chat.completions.parse(model="m", messages=MESSAGES, response_format=City)
        sent = engine.requests[0].json()["response_format"]
    assert parsed.choices[0].message.parsed == City(city="Paris")
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["schema"]["properties"] == {"city": {"title": "City", "type": "string"}}


@EDGES
async def test_logprobs(edge: str) -> None:
    logprobs = {"content": [{"token": "P", "logprob": -0.5, "bytes": [80], "top_logprobs": []}], "refusal": None}
    choices = [{**PARIS["choices"][0], "logprobs": logprobs}]  # type: ignore[index]
    async with sdk(edge, whole({**PARIS, "choices": choices})) as (client, engine, _):
        answer = await client.chat.completions.create(model="m", messages=MESSAGES, logprobs=True, top_logprobs=2)
        assert (engine.requests[0].json()["logprobs"], engine.requests[0].json()["top_logprobs"]) == (True, 2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert found.content[0].logprob == -0.5


@EDGES
async def test_completions(edge: str) -> None:
    async with sdk(edge) as (client, _, _):
        answer = await client.completions.create(model="m", prompt=["a", "b"], n=2)
        stream = await client.completions.create(model="m", prompt="a", stream=True)
        texts = [chunk.choices[0].text async for chunk in stream]
    assert len(answer.choices) == 4
    assert answer.choices[0].text == ANSWER
    assert sum(map(bool, texts)) == 16


@EDGES
async def test_embeddings(edge: str) -> None:
    async with sdk(edge) as (client, _, gateway):
        answer = await client.embeddings.create(model="m", input=["a", "b"])
        (record,) = await gateway.settled()
    assert [each.embedding for each in answer.data] == [[0.25, -0.5, 1.0]] * 2
    assert (record.route, record.stream) == (EMBEDDINGS, False)
    assert record.usage is not None
    assert record.usage.prompt_tokens == 512


@EDGES
async def test_the_raw_response_carries_how_it_came_about(edge: str) -> None:
    async with sdk(edge) as (client, engine, gateway):
        raw = await client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
        (record,) = await gateway.settled()
        assert engine.requests[0].header("x-request-id") == record.request_id
    assert raw.headers["x-request-id"] == raw.request_id == record.request_id
    assert raw.headers["x-tidegate-replica"] == "pool-0"
    assert raw.headers["x-tidegate-attempts"] == "1"
    assert raw.headers["x-tidegate-route-reason"] == "least_outstanding"
    assert "server" not in raw.headers or raw.headers["server"] != "fake"


@EDGES
async def test_models(edge: str) -> None:
    async with sdk(edge) as (client, _, _):
        listed = [model async for model in client.models.list()]
        one = await client.models.retrieve("org/name:tag")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("unknown")
    assert {each.id for each in listed} == {"m", "gpt-4o-mini", "org/name:tag", "renamed"}
    assert all((each.object, each.owned_by) == ("model", "pool") and each.created > 0 for each in listed)
    assert one.id == "org/name:tag"
    assert caught.value.code == "model_not_found"


@EDGES
async def test_the_synchronous_sdk(edge: str) -> None:
    async with sdk(edge) as (_, _, gateway):

        def use() -> tuple[str | None, int, list[float], int]:
            with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as client:
                answer = client.chat.completions.create(model="m", messages=MESSAGES)
                chunks = list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
                embedded = client.embeddings.create(model="m", input="a")
                return (
                    answer.choices[0].message.content,
                    len(chunks),
                    embedded.data[0].embedding,
                    len(client.models.list().data),
                )

        assert await asyncio.to_thread(use) == (ANSWER, 18, [0.25, -0.5, 1.0], 4)


@EDGES
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_sdk(edge: str, stream: bool) -> None:
    async with sdk(edge) as (client, engine, _):
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as missing:
            await create(model="unknown", messages=MESSAGES, stream=stream)
        with pytest.raises(openai.BadRequestError) as wrong:
            await create(model="m", messages=MESSAGES, stream=stream, extra_body={"stream": "yes"})
        assert engine.requests == []
        engine.queue.append(Behaviour(status=500))
        with pytest.raises(openai.InternalServerError) as failed:
            await create(model="m", messages=MESSAGES, stream=stream)
        engine.queue.append(Behaviour(status=429, retry_after="1"))
        with pytest.raises(openai.RateLimitError):
            await create(model="m", messages=MESSAGES, stream=stream)
    assert (missing.value.status_code, missing.value.code, missing.value.param) == (404, "model_not_found", "model")
    assert missing.value.type == "invalid_request_error"
    assert missing.value.request_id
    assert (wrong.value.code, wrong.value.param) == ("invalid_type", "stream")
    assert (failed.value.status_code, failed.value.code) == (502, "upstream_error")


@EDGES
async def test_the_sdks_own_retry_reaches_an_engine_that_recovered(edge: str) -> None:
    async with sdk(edge) as (client, engine, _):
        engine.queue.append(Behaviour(status=503, retry_after="0"))
        patient = client.with_options(max_retries=1)
        assert (await patient.chat.completions.create(model="m", messages=MESSAGES)).choices
        assert len(engine.requests) == 2
