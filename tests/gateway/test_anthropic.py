"""The stock OpenAI SDK on a gateway whose model is Anthropic's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from backends.usage import Usage
from tests.backends.dialects.anthropic.server import KEY, FakeAnthropic, error_body, fake_anthropic
from tests.backends.dialects.anthropic.talking import MODEL, block_start, end, message, sse, start, text_delta
from tests.support.serving import Serving, serving, settings_for

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüß Gott"},
]
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TEXT = {"type": "text", "text": "Servus, wie geht's?"}
THINKING = {"type": "thinking", "thinking": "Ask the tool.", "signature": "sig"}
CALLS = [
    {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Köln"}},
    {"type": "tool_use", "id": "toolu_2", "name": "get_weather", "input": {}},
]
SPOKEN = message([TEXT])
CALLING = message([THINKING, TEXT, *CALLS], stop_reason="tool_use")


@asynccontextmanager
async def sdk(
    answer: Mapping[str, Any], key: str = KEY
) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeAnthropic, Serving]]:
    """The stock client, not retrying, on a gateway on a small Anthropic."""
    models = {"m": {"backend": "pool", "upstream_model": MODEL}}
    async with (
        fake_anthropic(answer) as fake,
        serving(settings_for([fake.url], engine="anthropic", backend={"api_key": key}, models=models)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-client", max_retries=0) as client,
    ):
        yield client, fake, gateway


async def test_chat() -> None:
    async with sdk(SPOKEN) as (client, fake, gateway):
        answer = await client.chat.completions.create(model="m", messages=MESSAGES, temperature=1.2, stop="\n")
        (record,) = await gateway.settled()
    assert answer.choices[0].message.content == TEXT["text"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1110, 7)
    assert record.usage == Usage(1110, 7, 100, 1000)
    assert fake.requests == [
        {
            "model": MODEL,
            "max_tokens": 32_000,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Grüß Gott"}]}],
        }
    ]


@pytest.mark.parametrize("asked", [True, False])
async def test_chat_as_a_stream(asked: bool) -> None:
    async with sdk(SPOKEN) as (client, fake, gateway):
        stream = await client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": asked}
        )
        chunks = [chunk async for chunk in stream]
        (record,) = await gateway.settled()
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == TEXT["text"]
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "stop"
    assert [each.usage.total_tokens for each in chunks if each.usage is not None] == ([1117] if asked else [])
    assert record.usage == Usage(1110, 7, 100, 1000)
    assert fake.requests[0]["stream"] is True


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_tool_loop(streamed: bool) -> None:
    async with sdk(CALLING) as (client, fake, _):
        if streamed:
            async with client.chat.completions.stream(model="m", messages=MESSAGES, tools=[TOOL]) as stream:
                answer: Any = await stream.get_final_completion()
        else:
            answer = await client.chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL])
        (choice,) = answer.choices
        calls = choice.message.tool_calls
        assert [(each.id, json.loads(each.function.arguments)) for each in calls] == [
            ("toolu_1", {"city": "Köln"}),
            ("toolu_2", {}),
        ]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.reasoning_content == THINKING["thinking"]
        fake.answer = SPOKEN
        results: list[ChatCompletionMessageParam] = [
            {"role": "tool", "tool_call_id": each.id, "content": "18 °C"} for each in calls
        ]
        said = choice.message.model_dump(exclude_none=True)
        said.pop("parsed", None)
        last = await client.chat.completions.create(model="m", messages=[*MESSAGES, said, *results], tools=[TOOL])
    assert last.choices[0].message.content == TEXT["text"]
    _, back, answered = fake.requests[1]["messages"]
    assert back == {"role": "assistant", "content": [THINKING, TEXT, *CALLS]}
    assert [each["tool_use_id"] for each in answered["content"]] == ["toolu_1", "toolu_2"]


class City(BaseModel):
    city: str


async def test_structured_outputs() -> None:
    async with sdk(message([{"type": "text", "text": '{"city":"Paris"}'}])) as (client, fake, _):
        parsed = await client.chat.completions.parse(model="m", messages=MESSAGES, response_format=City)
    assert parsed.choices[0].message.parsed == City(city="Paris")
    assert fake.requests[0]["output_config"]["format"]["schema"]["additionalProperties"] is False


async def test_what_has_no_translation_is_refused_by_name() -> None:
    async with sdk(SPOKEN) as (client, fake, _):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=MESSAGES, n=2)
        with pytest.raises(openai.BadRequestError) as embeddings:
            await client.embeddings.create(model="m", input="a")
    assert (caught.value.param, embeddings.value.param) == ("n", "model")
    assert fake.requests == []


async def test_anthropics_own_refusal_reaches_the_client() -> None:
    async with sdk(error_body("invalid_request_error", "prompt is too long: 9 tokens > 8 maximum")) as (
        client,
        fake,
        _,
    ):
        fake.status = 400
        with pytest.raises(openai.BadRequestError, match="prompt is too long"):
            await client.chat.completions.create(model="m", messages=MESSAGES)


async def test_our_refused_key_is_not_shown_as_the_clients() -> None:
    async with sdk(SPOKEN, key="sk-ant-wrong") as (client, _, _):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="m", messages=MESSAGES)
    assert caught.value.status_code == 502
    assert "sk-ant" not in str(caught.value)


@pytest.mark.parametrize("begun", [True, False])
async def test_an_overload_in_the_stream(begun: bool) -> None:
    events = [start(), block_start(0, {"type": "text", "text": ""}), text_delta(0, "Half")] if begun else [start()]
    async with sdk(SPOKEN) as (client, fake, gateway):
        fake.events = sse([*events, error_body("overloaded_error", "Overloaded")])
        said = ""
        with pytest.raises(openai.APIError, match="Overloaded"):  # noqa: PT012
            async for chunk in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True):
                said += chunk.choices[0].delta.content or ""
        await gateway.settled()
    assert said == ("Half" if begun else "")


async def test_a_stream_that_breaks_off_is_no_answer() -> None:
    async with sdk(SPOKEN) as (client, fake, _):
        fake.events = sse([start(), block_start(0, {"type": "text", "text": ""}), text_delta(0, "Half")])
        with pytest.raises(openai.APIError):
            async for _ in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True):
                pass


async def test_a_refusal_is_a_content_filter() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "Not this."}
    async with sdk(message([], stop_reason="refusal", stop_details=details)) as (client, fake, _):
        answer = await client.chat.completions.create(model="m", messages=MESSAGES)
        fake.events = sse([start(), *end("refusal", stop_details=details)])
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
    assert (answer.choices[0].finish_reason, answer.choices[0].message.refusal) == ("content_filter", "Not this.")
    assert chunks[-1].finish_reason == "content_filter"
    assert "".join(each.delta.refusal or "" for each in chunks) == "Not this."
