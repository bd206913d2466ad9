"""Any answer at all: a stream says the same as a whole answer, goes back as it came, and damage is an error."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.dialects.anthropic.reply import FINISH_REASONS
from backends.dialects.protocol import TranslationError
from tests.backends.dialects.anthropic.blocks import FOUND, REDACTED, SEARCH, THINKING, TOOL, text
from tests.backends.dialects.anthropic.talking import (
    USER,
    body_of,
    chunks_in,
    message,
    put_together,
    sse,
    streamed,
    translation,
    whole,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
WORD = st.text("abc_-", min_size=1, max_size=5)
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-5, 10**20) | TEXT, lambda x: st.lists(x, max_size=2))
BLOCKS = st.one_of(
    st.builds(text, TEXT),
    st.builds(lambda a, b: {**THINKING, "thinking": a, "signature": b}, TEXT, TEXT),
    st.builds(lambda a: {**REDACTED, "data": a}, WORD),
    st.builds(lambda a, b: {**TOOL, "id": a, "input": b}, WORD, st.dictionaries(WORD, VALUES, max_size=3)),
    st.sampled_from([SEARCH, FOUND]),
)
REASONS = st.sampled_from(sorted(FINISH_REASONS))
CUTS = st.lists(st.integers(0, 30), max_size=4)


def fed(stream: bytes, cuts: list[int]) -> bytes:
    talker = translation()
    places = [0, *sorted(min(each * 40, len(stream)) for each in cuts), len(stream)]
    return b"".join(talker.feed(stream[a:b]) for a, b in pairwise(places))


def comparable(said: dict[str, Any]) -> dict[str, Any]:
    """A message without what only its way of travelling leaves in it."""
    made = {key: value for key, value in said.items() if value not in (None, "", [])}
    for name in ("tool_calls", "thinking_blocks"):
        for each in made.get(name, ()):
            each.pop("index", None)
    for each in made.get("tool_calls", ()):
        each["function"]["arguments"] = json.loads(each["function"]["arguments"])
    return made


@settings(deadline=None)
@given(st.lists(BLOCKS, max_size=6), REASONS, CUTS, CUTS)
def test_a_stream_says_the_same_as_a_whole_answer(
    blocks: list[dict[str, Any]], reason: str, cut: list[int], cuts: list[int]
) -> None:
    answer = message(blocks, stop_reason=reason)
    completion = whole(answer)
    (choice,) = completion["choices"]
    together = put_together(fed(sse(streamed(answer, cut)), cuts))
    assert comparable(together["message"]) == comparable(choice["message"])
    assert together["finish_reason"] == choice["finish_reason"]
    assert together["usage"] == completion["usage"]
    assert "".join(each["text"] for each in blocks if each["type"] == "text") == (choice["message"]["content"] or "")


@given(st.lists(BLOCKS, max_size=6))
def test_an_answer_goes_back_as_it_came(blocks: list[dict[str, Any]]) -> None:
    """In a tool loop: Anthropic's blocks, as an OpenAI message, as Anthropic's blocks again."""
    said = whole(message(blocks, stop_reason="tool_use"))["choices"][0]["message"]
    if not said.get("tool_calls"):
        return
    _, back = body_of({"messages": [USER, said]})["messages"]
    spoken = "".join(each["text"] for each in blocks if each["type"] == "text")
    rest = [
        each
        for each in blocks
        if each["type"] in ("redacted_thinking", "tool_use") or (each["type"] == "thinking" and each["signature"])
    ]
    first = next(place for place, each in enumerate(rest) if each["type"] == "tool_use")
    # All text is one piece before the first call; what is signed, and the calls, stay as they stood.
    assert back["content"] == [*rest[:first], *([text(spoken)] if spoken.strip() else []), *rest[first:]]


MUTATIONS = st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=3)), min_size=1, max_size=4)


@settings(deadline=None)
@given(MUTATIONS, CUTS)
def test_a_damaged_stream_raises_nothing_but_its_own_error(damage: list[tuple[int, bytes]], cuts: list[int]) -> None:
    stream = bytearray(sse(streamed(message([THINKING, text("Hallo"), TOOL], stop_reason="tool_use"), [2, 3])))
    for place, junk in damage:
        stream[place : place + len(junk)] = junk
    with suppress(TranslationError):
        chunks_in(fed(bytes(stream), cuts))


@given(
    st.binary(max_size=50)
    | st.recursive(VALUES, lambda x: st.dictionaries(WORD, x)).map(lambda x: json.dumps(x).encode())
)
def test_a_damaged_answer_raises_nothing_but_its_own_error(body: bytes) -> None:
    with pytest.raises(TranslationError):
        translation().whole(body)
