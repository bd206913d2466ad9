"""The stock OpenAI SDK, unchanged, against real engines through the gateway: what an application would write.

Every test runs with llama.cpp, and under `make test-engines` with SGLang as well. The answers' sense is the models'
business (SGLang's has random weights); their shape, their completeness and their usage are the gateway's.
"""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from openai.types.chat import (
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageParam,
    ChatCompletionNamedToolChoiceParam,
)
from pydantic import BaseModel, ConfigDict

from tests.engines.conftest import Served
from tests.engines.gateway_process import MODEL

pytestmark = pytest.mark.engine

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What makes the tides?"}]


class Tide(BaseModel):
    """A schema with few possible answers, so that any model under its grammar ends soon."""

    model_config = ConfigDict(extra="forbid")

    tide: Literal["high", "low"]
    rising: bool


TIDE_AT: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {
        "name": "tide_at",
        "description": "The tide at a port",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"port": {"enum": ["Brest", "Dover"]}},
            "required": ["port"],
            "additionalProperties": False,
        },
    },
}
CALL_TIDE_AT: ChatCompletionNamedToolChoiceParam = {"type": "function", "function": {"name": "tide_at"}}


class TideAt(BaseModel):
    port: Literal["Brest", "Dover"]


def test_chat(served: Served) -> None:
    with served.gateway.sdk() as client:
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 5


async def test_chat_async_and_by_alias(served: Served) -> None:
    async with served.gateway.async_sdk() as client:
        answer = await client.chat.completions.create(model="gpt-4o-mini", messages=QUESTION, max_tokens=4)
    assert answer.choices[0].finish_reason == "length"


def test_stream_says_what_the_whole_answer_says(served: Served) -> None:
    with served.gateway.sdk() as client:
        whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0)
        stream = client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=12, temperature=0, stream=True
        )
        chunks = list(stream)
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert len(pieces) > 6
    assert "".join(pieces) == whole.choices[0].message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert all(chunk.choices for chunk in chunks), "the usage chunk, which nobody asked for, was shown"


async def test_stream_async_with_usage(served: Served) -> None:
    async with served.gateway.async_sdk() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_repeated_prompt_comes_from_the_engines_cache(served: Served) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "The moon pulls the sea, the sea follows late, and the shore waits. " * 3}
    ]
    with served.gateway.sdk() as client:
        client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert answer.usage.prompt_tokens - 16 <= cached < answer.usage.prompt_tokens  # SGLang caches pages of 16


async def test_record_has_the_usage_that_the_caller_did_not_ask_for(served: Served) -> None:
    async with served.gateway.async_sdk() as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=QUESTION, max_tokens=6, stream=True
        )
        async for _ in raw.parse():
            pass
    record = await served.gateway.record(lambda record: record["id"] == raw.headers["x-request-id"])
    assert record["outcome"] == "completed"
    assert record["completion_tokens"] == 6
    assert record["prompt_tokens"] > 5
    assert record["replica"] == raw.headers["x-tidegate-replica"] == "shared"


def test_completions(served: Served) -> None:
    with served.gateway.sdk() as client:
        whole = client.completions.create(model=MODEL, prompt="The tide", max_tokens=6, temperature=0)
        stream = client.completions.create(model=MODEL, prompt="The tide", max_tokens=6, temperature=0, stream=True)
        chunks = list(stream)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


# The SDK serialises the answer on the way, and SGLang's has a field of its own where OpenAI's type is another.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
def test_structured_output(served: Served) -> None:
    with served.gateway.sdk() as client:
        answer = client.chat.completions.parse(
            model=MODEL, messages=QUESTION, response_format=Tide, max_tokens=100, temperature=0
        )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Tide)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
async def test_structured_output_streamed(served: Served) -> None:
    async with (
        served.gateway.async_sdk() as client,
        client.chat.completions.stream(
            model=MODEL, messages=QUESTION, response_format=Tide, max_tokens=100, temperature=0
        ) as stream,
    ):
        answer = await stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, Tide)


# SmolLM2's chat template knows no tools: llama.cpp leaves them out of its prompt without a word.
@pytest.mark.slow
def test_tool_call(served_sglang: Served) -> None:
    with served_sglang.gateway.sdk() as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[TIDE_AT],
            tool_choice=CALL_TIDE_AT,
            parallel_tool_calls=False,
            max_tokens=150,
            temperature=0,
        )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "tide_at"
    TideAt.model_validate_json(call.function.arguments)


@pytest.mark.slow
async def test_tool_call_streamed(served_sglang: Served) -> None:
    arguments = ""
    names = []
    async with served_sglang.gateway.async_sdk() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[TIDE_AT],
            tool_choice=CALL_TIDE_AT,
            parallel_tool_calls=False,
            max_tokens=150,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                assert call.function is not None
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
    assert names == ["tide_at"]
    TideAt.model_validate_json(arguments)


def test_logprobs(served: Served) -> None:
    with served.gateway.sdk() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs.content)


def test_two_choices(served: Served) -> None:
    with served.gateway.sdk() as client:
        whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4, n=2)
        stream = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4, n=2, stream=True)
        chunks = list(stream)
    assert [choice.index for choice in whole.choices] == [0, 1]
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == [0, 1]


def test_unknown_model_is_refused_by_the_gateway(served: Served) -> None:
    with served.gateway.sdk() as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="smollm2-but-misspelt", messages=QUESTION, max_tokens=1)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_models_are_the_gateways(served: Served) -> None:
    with served.gateway.sdk() as client:
        # Beside them, names with an adapter of the engine's after a colon.
        assert {model.id for model in client.models.list() if ":" not in model.id} == {MODEL, "gpt-4o-mini"}
        assert client.models.retrieve(MODEL).id == MODEL


def test_refusal_by_the_engine_has_openais_shape(served: Served) -> None:
    with served.gateway.sdk() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"temperature": "warm"})
    body = caught.value.body
    assert isinstance(body, dict)
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    assert "site-packages" not in body["message"]
