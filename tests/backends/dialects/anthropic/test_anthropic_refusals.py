"""What has no translation is refused by its name, and nothing else ever happens."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.anthropic.conversation import tool_id
from backends.dialects.protocol import CHAT, COMPLETIONS, EMBEDDINGS, Untranslatable, Wish
from tests.backends.dialects.anthropic.parts import TOOL, call, file, image, text, user
from tests.backends.dialects.anthropic.talking import MODEL, USER, body_of, dialect, prepare

NAMES = [
    "audio",
    "cache_control",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "model",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream_options",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
    "unheard_of",
    "user",
    "verbosity",
    "web_search_options",
]


def saying(*parts: Any) -> dict[str, Any]:
    return {"messages": [user(*parts)]}


def calling(**members: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{**call(), **members}]}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "a"}}, "audio"),
    ({"web_search_options": {"a": 1}}, "web_search_options"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"reasoning_effort": ["low"]}, "reasoning_effort"),
    ({"thinking": "yes"}, "thinking"),
    ({"cache_control": True}, "cache_control"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"stop": 7}, "stop"),
    ({"stop": [7]}, "stop"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"model": 7}, "model"),
    ({"tools": {}}, "tools"),
    ({"tools": [7]}, "tools[0]"),
    ({"tools": [TOOL, {"type": "custom", "custom": {"name": "c"}}]}, "tools[1].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, "tools[0].function.parameters"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
    ({"messages": [7]}, "messages[0]"),
    ({"messages": [{"role": "judge", "content": "a"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "function", "name": "f", "content": "a"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "cache_control": 1}]}, "messages[0].cache_control"),
    ({"messages": [{"role": "system", "content": [image("https://x/y")]}]}, "messages[0]"),
    ({"messages": [USER, {"role": "assistant", "audio": {"id": "a"}}]}, "messages[1].audio"),
    ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]}, "messages[1].function_call"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 7}]}, "messages[1].tool_calls"),
    ({"messages": [USER, {"role": "tool", "content": "a"}]}, "messages[1].tool_call_id"),
    (saying(text("a"), {"type": "input_audio", "input_audio": {}}), "messages[0].content[1].input_audio"),
    (saying({"type": "hologram"}), "messages[0].content[0].type"),
    (saying("a"), "messages[0].content[0]"),
    (saying({"type": "text"}), "messages[0].content[0].text"),
    (saying(image("http://x/y.png")), "messages[0].content[0].image_url"),
    (saying(image("data:image/tiff;base64,AAAA")), "messages[0].content[0].image_url"),
    (saying(image("data:image/png,AAAA")), "messages[0].content[0].image_url"),
    (saying({"type": "image_url"}), "messages[0].content[0].image_url"),
    (saying({"type": "file", "file": {"file_id": "file-1"}}), "messages[0].content[0].file.file_id"),
    (saying({"type": "file"}), "messages[0].content[0].file"),
    (saying(file("AAAA")), "messages[0].content[0].file.file_data"),
    (saying(file("data:application/zip;base64,AAAA")), "messages[0].content[0].file.file_data"),
    (saying(file("data:text/plain;base64,/w==")), "messages[0].content[0].file.file_data"),
    (calling(type="custom"), "messages[1].tool_calls[0]"),
    (calling(id=""), "messages[1].tool_calls[0].id"),
    (calling(function={}), "messages[1].tool_calls[0].function"),
    (calling(function={"name": "f", "arguments": "{"}), "messages[1].tool_calls[0].function.arguments"),
    (calling(function={"name": "f", "arguments": "[1]"}), "messages[1].tool_calls[0].function.arguments"),
    (calling(function={"name": "f", "arguments": {}}), "messages[1].tool_calls[0].function.arguments"),
    (calling(function={"name": "f", "arguments": "[" * 9999}), "messages[1].tool_calls[0].function.arguments"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Untranslatable) as caught:
        prepare({"messages": [USER], **fields})
    assert caught.value.param == param
    assert str(caught.value)


@pytest.mark.parametrize("path", [COMPLETIONS, EMBEDDINGS])
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(Untranslatable, match=path) as caught:
        dialect().prepare(Wish(path, {"model": MODEL, "input": "a", "prompt": "a"}, "r1", False))
    assert caught.value.param == "model"


def test_an_adapter_is_refused() -> None:
    with pytest.raises(Untranslatable):
        dialect().prepare(Wish(CHAT, {"model": MODEL, "messages": [USER]}, "r1", False, adapter="a"))


@given(st.text(min_size=1), st.text(min_size=1))
def test_ids_stay_apart_and_fit(one: str, other: str) -> None:
    a, b = tool_id(one, "id"), tool_id(other, "id")
    assert all(each.isascii() and (each.isalnum() or each in "_-") for each in a)
    if "_" not in one + other:  # what stands for a foreign character is an ordinary one too
        assert (a == b) == (one == other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SAID = st.text() | st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", "file", "refusal", "input_audio", "x"]) | JSON},
        optional={name: JSON for name in ("text", "image_url", "file", "refusal", "cache_control")},
    )
)
ROLES = ["user", "assistant", "tool", "system", "developer", "function"]
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(ROLES), "content": SAID | JSON},
        optional={name: JSON for name in ("tool_calls", "tool_call_id", "thinking_blocks", "cache_control", "audio")},
    )
)
ANY_FIELDS = st.fixed_dictionaries(
    {"messages": MESSAGES | JSON},
    optional={name: JSON for name in NAMES},
)


@given(ANY_FIELDS, st.booleans())
def test_anything_else_is_refused_and_never_breaks(fields: dict[str, Any], stream: bool) -> None:
    with suppress(Untranslatable):
        body = body_of(fields, stream=stream)
        assert {"model", "max_tokens", "messages"} <= body.keys()
        assert all(each["content"] for each in body["messages"])
        roles = [each["role"] for each in body["messages"]]
        assert all(a != b for a, b in pairwise(roles))
