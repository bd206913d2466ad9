"""OpenAI's requests become Anthropic's, or are refused by the name of what has no translation."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from pydantic import ValidationError

from backends.dialects.anthropic import DEFAULT_MAX_TOKENS
from backends.dialects.anthropic.conversation import tool_id
from backends.dialects.protocol import Untranslatable
from tests.backends.dialects.anthropic.parts import (
    MARK,
    PNG,
    TOOL,
    F,
    answered,
    call,
    file,
    image,
    result,
    source,
    text,
    used,
    user,
)
from tests.backends.dialects.anthropic.schema import request_types
from tests.backends.dialects.anthropic.talking import MODEL, USER, body_of, prepare

REQUESTS = request_types()


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """The body, after the SDK's types have accepted it."""
    REQUESTS[body.get("stream", False)].validate_python(body)
    return body


def test_the_smallest_request() -> None:
    prepared = prepare({"messages": [USER]})
    assert (prepared.path, prepared.values) == ("/v1/messages", {})
    assert checked(body_of({"messages": [USER]})) == {
        "model": MODEL,
        "max_tokens": DEFAULT_MAX_TOKENS,
        "messages": [user(text("Hi"))],
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 1},
        {"temperature": "0.5"},
        {"tools": [{**F, "parameters": {}}]},
        {"tool_choice": {"type": "required"}},
        {"system": [{"type": "image", "source": {"type": "url", "url": "https://x/y"}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "name": "b"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "a"}]}]},
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
    ],
)
def test_the_types_find_what_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        checked({**body_of({"messages": [USER], "tools": [TOOL]}), **wrong})


def test_the_name_for_upstream_wins_and_a_stream_is_asked_for() -> None:
    body = checked(body_of({"messages": [USER], "stream_options": {"include_usage": True}}, stream=True, model="real"))
    assert (body["model"], body["stream"]) == ("real", True)
    assert "stream_options" not in body


CONVERSATIONS: list[tuple[str, list[Any], list[Any], list[Any]]] = [
    (
        "system messages wherever they stand",
        [{"role": "system", "content": "a"}, USER, {"role": "developer", "content": [text("b", cache_control=MARK)]}],
        [text("a"), text("b", cache_control=MARK)],
        [user(text("Hi"))],
    ),
    (
        "one side that speaks twice",
        [USER, USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, USER],
        [],
        [user(text("Hi"), text("Hi")), {"role": "assistant", "content": [text("a"), text("b")]}, user(text("Hi"))],
    ),
    (
        "parallel results in one turn, before any text",
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call("c1"), call("c2", "")]},
            answered("c2", "two"),
            USER,
            answered("c1", [text("one")]),
        ],
        [],
        [
            user(text("Hi")),
            {"role": "assistant", "content": [used("c1"), used("c2", {})]},
            user(result("c2", text("two")), result("c1", text("one")), text("Hi")),
        ],
    ),
    (
        "results of one turn do not move to another",
        [
            USER,
            {"role": "assistant", "content": "a", "tool_calls": [call("c1")]},
            answered("c1", "one"),
            {"role": "assistant", "content": "b", "tool_calls": [call("c2")]},
            answered("c2", ""),
        ],
        [],
        [
            user(text("Hi")),
            {"role": "assistant", "content": [text("a"), used("c1")]},
            user(result("c1", text("one"))),
            {"role": "assistant", "content": [text("b"), used("c2")]},
            user(result("c2")),
        ],
    ),
    (
        "ids of other providers",
        [
            USER,
            {"role": "assistant", "tool_calls": [call("functions.f:0")]},
            answered("functions.f:0", "x"),
        ],
        [],
        [
            user(text("Hi")),
            {"role": "assistant", "content": [used("functions_2e_f_3a_0")]},
            user(result("functions_2e_f_3a_0", text("x"))),
        ],
    ),
    (
        "signed thinking first, unsigned left out",
        [
            USER,
            {
                "role": "assistant",
                "content": "a",
                "reasoning_content": "hm",
                "thinking_blocks": [
                    {"index": 0, "type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "thinking", "thinking": "unsigned"},
                    {"type": "thinking", "thinking": "unsigned", "signature": ""},
                    {"type": "redacted_thinking", "data": "d"},
                ],
                "tool_calls": [call()],
            },
            answered("c1", "x"),
        ],
        [],
        [
            user(text("Hi")),
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "d"},
                    text("a"),
                    used(),
                ],
            },
            user(result("c1", text("x"))),
        ],
    ),
    (
        "an answer of thinking alone",
        [
            USER,
            {"role": "assistant", "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}]},
        ],
        [],
        [user(text("Hi"))],
    ),
    (
        "empty and blank text",
        [
            {"role": "system", "content": ""},
            user(text(""), text(" \n"), text("x")),
            {"role": "assistant", "content": ""},
            user(text("y")),
        ],
        [],
        [user(text("x"), text("y"))],
    ),
    (
        "a beginning for the answer loses the white space at its end",
        [USER, {"role": "assistant", "content": "It is \n"}],
        [],
        [user(text("Hi")), {"role": "assistant", "content": [text("It is")]}],
    ),
    (
        "an earlier refusal",
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER],
        [],
        [user(text("Hi")), {"role": "assistant", "content": [text("No.")]}, user(text("Hi"))],
    ),
    (
        "cache marks on messages",
        [
            {"role": "system", "content": "a", "cache_control": MARK},
            {"role": "user", "content": [text("x"), text("y")], "cache_control": MARK},
            {"role": "assistant", "tool_calls": [call()], "cache_control": MARK},
            answered("c1", "z", cache_control=MARK),
        ],
        [text("a", cache_control=MARK)],
        [
            user(text("x"), text("y", cache_control=MARK)),
            {"role": "assistant", "content": [{**used(), "cache_control": MARK}]},
            user(result("c1", text("z"), cache_control=MARK)),
        ],
    ),
]


@pytest.mark.parametrize(
    ("messages", "system", "turns"), [each[1:] for each in CONVERSATIONS], ids=[each[0] for each in CONVERSATIONS]
)
def test_conversation(messages: list[Any], system: list[Any], turns: list[Any]) -> None:
    before = json.dumps(messages)
    body = checked(body_of({"messages": messages, "tools": [TOOL]}))
    assert body.get("system", []) == system
    assert body["messages"] == turns
    assert json.dumps(messages) == before  # the same fields may be prepared for another replica


PARTS: list[tuple[Any, Any]] = [
    (
        image(f"data:image/png;base64,{PNG}", detail="low"),
        source("image", type="base64", media_type="image/png", data=PNG),
    ),
    (
        image(f"data:image/JPG;name=a.jpg;base64,{PNG}"),
        source("image", type="base64", media_type="image/jpeg", data=PNG),
    ),
    (image("https://x/y.webp"), source("image", type="url", url="https://x/y.webp")),
    (
        {**image("https://x/y.webp"), "cache_control": MARK},
        {**source("image", type="url", url="https://x/y.webp"), "cache_control": MARK},
    ),
    (
        file("data:application/pdf;base64,JVBERi0=", filename="a.pdf"),
        {**source("document", type="base64", media_type="application/pdf", data="JVBERi0="), "title": "a.pdf"},
    ),
    (
        file("data:text/plain;base64,R3LDvMOfZQ=="),
        source("document", type="text", media_type="text/plain", data="Grüße"),
    ),
    (file("https://x/y.pdf"), source("document", type="url", url="https://x/y.pdf")),
]


@pytest.mark.parametrize(("part", "block"), PARTS)
def test_content_part(part: Any, block: Any) -> None:
    body = checked(body_of({"messages": [user(part)]}))
    assert body["messages"] == [user(block)]


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
    ({"temperature": 0}, {"temperature": 0}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"temperature": 1}, {}),
    ({"temperature": 1.8}, {}),
    ({"top_p": 0.9}, {"top_p": 0.9}),
    ({"top_p": 1.0}, {}),
    ({"top_k": 40}, {"top_k": 40}),
    ({"top_k": -1}, {}),
    ({"stop": "END"}, {"stop_sequences": ["END"]}),
    ({"stop": ["\n", "", "a", " b"]}, {"stop_sequences": ["a", " b"]}),
    ({"stop": "\n\n"}, {}),
    ({"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
    ({"user": "u-1", "safety_identifier": "s-1"}, {"metadata": {"user_id": "s-1"}}),
    ({"user": "ann@example.org"}, {}),
    ({"user": "+49 (30) 1234567"}, {}),
    ({"user": "u" * 257}, {}),
    ({"service_tier": "default"}, {"service_tier": "standard_only"}),
    ({"service_tier": "flex"}, {}),
    ({"cache_control": MARK}, {"cache_control": MARK}),
    ({"reasoning_effort": "minimal"}, {"output_config": {"effort": "low"}}),
    ({"reasoning_effort": "high"}, {"output_config": {"effort": "high"}}),
    ({"reasoning_effort": "none"}, {"output_config": {"effort": "low"}}),
    ({"thinking": {"type": "adaptive"}}, {"thinking": {"type": "adaptive"}}),
    ({"response_format": {"type": "text"}}, {}),
    (
        {
            "reasoning_effort": "low",
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        },
        {"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}}},
    ),
    ({"tools": []}, {}),
    ({"tools": [TOOL]}, {"tools": [F]}),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tools": [F]}),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "description": "d", "strict": True, "parameters": {"properties": {}}},
                    "cache_control": MARK,
                }
            ]
        },
        {"tools": [{**F, "description": "d", "strict": True, "cache_control": MARK}]},
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": False, "cache_control": MARK}}]},
        {"tools": [{**F, "cache_control": MARK}]},
    ),
    ({"tools": [TOOL], "tool_choice": "auto"}, {"tools": [F], "tool_choice": {"type": "auto"}}),
    ({"tools": [TOOL], "tool_choice": "none"}, {"tools": [F], "tool_choice": {"type": "none"}}),
    ({"tools": [TOOL], "tool_choice": "required"}, {"tools": [F], "tool_choice": {"type": "any"}}),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": False},
        {"tools": [F], "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}},
    ),
    (
        {"tools": [TOOL], "parallel_tool_calls": False},
        {"tools": [F], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    (
        {"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": False},
        {"tools": [F], "tool_choice": {"type": "none"}},
    ),
    ({"tools": [TOOL], "parallel_tool_calls": True}, {"tools": [F]}),
    ({"tool_choice": "auto", "parallel_tool_calls": False}, {}),
    (
        {
            "n": 1,
            "seed": 1,
            "logprobs": False,
            "logit_bias": {},
            "presence_penalty": 1,
            "frequency_penalty": 1,
            "store": True,
            "metadata": {"a": "b"},
            "modalities": ["text"],
            "prediction": {},
            "verbosity": "low",
            "unheard_of": 1,
        },
        {},
    ),
]


@pytest.mark.parametrize(("fields", "changed"), FIELDS)
def test_field(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    plain = {"model": MODEL, "max_tokens": DEFAULT_MAX_TOKENS, "messages": [user(text("Hi"))]}
    assert checked(body_of({"messages": [USER], **fields})) == {**plain, **changed}


def test_null_is_as_good_as_absent() -> None:
    names = {name for fields, _ in FIELDS for name in fields} | {"functions", "audio", "n", "stream_options"}
    assert body_of({"messages": [USER], **dict.fromkeys(names)}) == body_of({"messages": [USER]})


def test_a_cache_mark_passes_over_thinking() -> None:
    last = {"type": "thinking", "thinking": "t", "signature": "s"}
    said = {"role": "assistant", "tool_calls": [call()], "thinking_blocks": [{**last, "tool_calls_before": 1}]}
    body = checked(body_of({"messages": [USER, {**said, "cache_control": MARK}, answered("c1", "x")]}))
    assert body["messages"][1]["content"] == [{**used(), "cache_control": MARK}, last]


def test_arguments_keep_every_digit() -> None:
    arguments = '{"id": 12345678901234567890123, "x": 0.10}'
    calls = [{"role": "assistant", "tool_calls": [call(arguments=arguments)]}, answered("c1", "x")]
    body = prepare({"messages": [USER, *calls]}).body
    assert body is not None
    assert arguments.encode() in body


def test_tens_of_thousands_of_tool_results_take_no_time() -> None:
    many = 50_000
    texts = [{"role": "user", "content": "a"}] * many
    began = time.process_time()
    (turn,) = body_of({"messages": [*texts, *[{"role": "tool", "tool_call_id": "t", "content": "b"}] * many]})[
        "messages"
    ]
    assert time.process_time() - began < 5  # half a second; minutes if each looked for its place
    assert [block["type"] for block in turn["content"]] == ["tool_result"] * many + ["text"] * many


def test_a_long_foreign_id_becomes_the_same_short_one_for_call_and_result() -> None:
    long = "functions.search:" + "+/" * 500_000
    began = time.process_time()
    used_as, other = tool_id(long, "id"), tool_id(long + "+", "id")
    assert time.process_time() - began < 0.2
    assert used_as == tool_id(long, "id") != other
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", used_as)
    assert tool_id("a" * 100, "id") == "a" * 100


def test_a_url_of_semicolons_is_refused_at_once() -> None:
    began = time.process_time()
    with pytest.raises(Untranslatable, match="base64 data"):
        body_of({"messages": [user(image("data:" + ";" * 10_000_000))]})
    assert time.process_time() - began < 0.2
