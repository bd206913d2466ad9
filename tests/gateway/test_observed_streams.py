"""What somebody who observes a stream is shown of it, and what passes in place of what was shown."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from backends.sse import EventTooLarge
from gateway.sse import StreamReader

HEAD = b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"'
ONE = HEAD + b'one"},"finish_reason":null}]}\n\n'
TWO = HEAD + b'two"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b": ping\n\n" + ONE + TWO + END + USAGE + DONE


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_every_chunk_is_shown_and_passes_as_it_came(size: int) -> None:
    seen: list[dict[str, Any]] = []
    reader = StreamReader(observe=seen.append)
    passed = b"".join(reader.feed(STREAM[start : start + size]) for start in range(0, len(STREAM), size))
    assert passed == STREAM
    assert seen == [orjson.loads(event[6:]) for event in (ONE, TWO, END, USAGE)]
    assert reader.complete


def test_what_is_observed_can_be_left_out_or_replaced() -> None:
    instead = {"one": b"", "two": b"data: {}\n\n"}

    def observe(chunk: dict[str, Any]) -> bytes | None:
        choices = chunk["choices"]
        return instead.get(choices[0]["delta"].get("content")) if choices else None

    reader = StreamReader(observe=observe)
    assert reader.feed(ONE + TWO + END + DONE) == b"data: {}\n\n" + END + DONE
    assert reader.content_events == 2, "they are counted all the same"


def test_usage_is_read_after_it_was_observed() -> None:
    def observe(chunk: dict[str, Any]) -> None:
        if "usage" in chunk:
            chunk["usage"]["completion_tokens"] = 9

    reader = StreamReader(hide_usage=True, observe=observe)
    assert reader.feed(USAGE) == b""
    assert reader.usage is not None
    assert reader.usage.completion_tokens == 9


def test_errors_are_not_shown_and_what_cannot_be_read_is_shown_as_nothing() -> None:
    seen: list[dict[str, Any]] = []
    reader = StreamReader(observe=seen.append)
    assert reader.feed(b"data: no JSON\n\ndata: null\n\n") == b"data: no JSON\n\ndata: null\n\n"
    assert reader.feed(b'data: {"error":{"message":"no"}}\n\n' + ONE) == b""
    assert seen == [{}, {}]


@pytest.mark.parametrize("end", ["", "\n\n"])
def test_an_event_that_is_too_large_is_shown_as_nothing_since_what_came_with_it_is_lost(end: str) -> None:
    seen: list[dict[str, Any]] = []
    reader = StreamReader(observe=seen.append, max_event_bytes=100)
    with pytest.raises(EventTooLarge):
        reader.feed(ONE + b"data: " + b"x" * 200 + end.encode())
    assert len(seen) == 2
    assert seen[-1] == {}
