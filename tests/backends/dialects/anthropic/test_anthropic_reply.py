"""Anthropic's answers, whole or streamed, become OpenAI's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from anthropic.types import StopReason

from backends.dialects.anthropic.reply import FINISH_REASONS
from backends.dialects.protocol import TranslationError
from backends.usage import Usage
from gateway.sse import StreamReader
from tests.backends.dialects.anthropic.blocks import FOUND, REDACTED, SEARCH, THINKING, TOOL, text
from tests.backends.dialects.anthropic.talking import (
    EVENTS,
    NOW,
    USER,
    block_delta,
    block_start,
    block_stop,
    body_of,
    chunks_in,
    dialect,
    end,
    message,
    put_together,
    sse,
    start,
    streamed,
    text_delta,
    translation,
    whole,
)

FIXTURES = Path(__file__).parent / "fixtures"
USAGE = {
    "prompt_tokens": 1110,
    "completion_tokens": 7,
    "total_tokens": 1117,
    "prompt_tokens_details": {"cached_tokens": 100, "cache_write_tokens": 1000},
}


def test_a_whole_answer() -> None:
    assert whole(message([text("Grüß "), text("Gott")])) == {
        "id": "msg_1",
        "object": "chat.completion",
        "created": int(NOW),
        "model": "claude-sonnet-5-5",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Grüß Gott", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }


def test_tools_and_thinking_in_a_whole_answer() -> None:
    blocks = [THINKING, REDACTED, text("Let me see."), SEARCH, FOUND, TOOL, {**TOOL, "id": "toolu_2", "input": {}}]
    (choice,) = whole(message(blocks, stop_reason="tool_use"))["choices"]
    said = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (said["content"], said["reasoning_content"]) == ("Let me see.", "Hm.")
    assert said["thinking_blocks"] == [THINKING, REDACTED]
    assert [(each["id"], each["function"]["name"]) for each in said["tool_calls"]] == [
        ("toolu_1", "f"),
        ("toolu_2", "f"),
    ]
    assert [json.loads(each["function"]["arguments"]) for each in said["tool_calls"]] == [TOOL["input"], {}]


def test_an_answer_of_tools_alone_has_no_content() -> None:
    assert whole(message([TOOL], stop_reason="tool_use"))["choices"][0]["message"]["content"] is None
    assert whole(message([]))["choices"][0]["message"]["content"] == ""


def test_a_number_of_any_size_stays_as_the_model_wrote_it() -> None:
    body = json.dumps(message([{**TOOL, "input": {"id": 12345678901234567890123}}])).encode()
    (call,) = json.loads(translation().whole(body))["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"id": 12345678901234567890123}'


def test_every_published_reason_to_stop_has_a_word() -> None:
    assert FINISH_REASONS.keys() == set(get_args(StopReason))
    assert whole({**message([text("a")]), "stop_reason": "new_one"})["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("reason", FINISH_REASONS)
def test_the_reason_is_the_same_in_a_stream(reason: str) -> None:
    answer = message([text("a")], stop_reason=reason)
    (choice,) = whole(answer)["choices"]
    together = put_together(translation().feed(sse(streamed(answer))))
    assert together["finish_reason"] == choice["finish_reason"] == FINISH_REASONS[reason]


def test_a_refusal_is_told_in_anthropics_words() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "Not this."}
    (choice,) = whole(message([], stop_reason="refusal", stop_details=details))["choices"]
    assert (choice["finish_reason"], choice["message"]["refusal"]) == ("content_filter", "Not this.")
    assert choice["message"]["content"] is None
    together = put_together(translation().feed(sse([start(), *end("refusal", stop_details=details)])))
    assert (together["finish_reason"], together["message"]["refusal"]) == ("content_filter", "Not this.")


@pytest.mark.parametrize(
    ("counts", "usage"),
    [
        ({"input_tokens": 5, "output_tokens": 2}, (5, 2, None)),
        ({"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 0}, (5, 2, (0, 0))),
        ({"input_tokens": 5, "output_tokens": 2, "cache_creation_input_tokens": 7}, (12, 2, (None, 7))),
        ({"input_tokens": 0, "output_tokens": 2, "cache_read_input_tokens": 9}, (9, 2, (9, 0))),
    ],
)
def test_prompt_tokens_are_all_of_them(counts: dict[str, int], usage: tuple[int, int, Any]) -> None:
    told = whole(message([], usage=counts))["usage"]
    prompt, completion, details = usage
    assert (told["prompt_tokens"], told["completion_tokens"]) == (prompt, completion)
    assert told["total_tokens"] == prompt + completion
    found = told.get("prompt_tokens_details")
    assert (found and (found.get("cached_tokens"), found["cache_write_tokens"])) == details
    read, written = details or (None, 0)
    assert dialect().read_usage({"usage": told}) == Usage(prompt, completion, read, written)


def test_thinking_tokens_are_told() -> None:
    counts = {"input_tokens": 5, "output_tokens": 9, "output_tokens_details": {"thinking_tokens": 4}}
    assert whole(message([], usage=counts))["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


# Streams.


@pytest.mark.parametrize("name", ["text", "tools", "thinking"])
def test_golden_stream(name: str) -> None:
    given = (FIXTURES / f"{name}.sse").read_bytes()
    for line in given.splitlines():
        if line.startswith(b"data: ") and b'"ping"' not in line:
            EVENTS.validate_json(line[6:])
    wanted = (FIXTURES / f"{name}.openai.sse").read_bytes()
    assert translation().feed(given) == wanted
    chunks_in(wanted)
    for place in range(len(given)):
        split = translation()
        assert split.feed(given[:place]) + split.feed(given[place:]) == wanted
    bytewise = translation()
    assert b"".join(bytewise.feed(given[i : i + 1]) for i in range(len(given))) == wanted
    for line_end in (b"\r\n", b"\r"):
        assert translation().feed(given.replace(b"\n", line_end)) == wanted


def test_ordinary_deltas_are_recognised_without_parsing() -> None:
    talker, reader = translation(), StreamReader()
    reader.feed(talker.feed(sse([start(), block_start(0, text("")), text_delta(0, "a")])))
    assert reader.content_started
    tricky = 'b"finish_reason":null,"choices":[{"usage":{"error":'
    data = talker.feed(sse([text_delta(0, tricky), text_delta(0, "c")]))
    assert reader._is_ordinary(data)  # which counts them
    reader.feed(talker.feed(sse([block_stop(0), *end()])))
    assert (reader.complete, reader.done, reader.content_events) == (True, True, 3)
    assert reader.usage == Usage(1110, 7, 100, 1000)


def test_thinking_between_calls_keeps_its_place() -> None:
    blocks: list[dict[str, Any]] = [
        THINKING,
        TOOL,
        {**THINKING, "thinking": "", "signature": "later"},
        {**TOOL, "id": "toolu_2"},
    ]
    answer = message(blocks, stop_reason="tool_use")
    streaming = put_together(translation().feed(sse(streamed(answer))))["message"]
    for said in (whole(answer)["choices"][0]["message"], streaming):
        assert [each.get("tool_calls_before") for each in said["thinking_blocks"]] == [None, 1]
        _, back = body_of({"messages": [USER, said]})["messages"]
        assert back["content"] == blocks


def test_unsigned_thinking_is_shown_and_not_offered_for_sending_back() -> None:
    answer = message([{**THINKING, "signature": ""}, text("a")])
    streaming = put_together(translation().feed(sse(streamed(answer))))["message"]
    for said in (whole(answer)["choices"][0]["message"], streaming):
        assert said["reasoning_content"] == "Hm."
        assert "thinking_blocks" not in said


def test_a_call_without_arguments_is_an_empty_object() -> None:
    events = [
        start(),
        block_start(0, {**TOOL, "input": {}}),
        block_delta(0, "input_json_delta", "partial_json", ""),
        block_stop(0),
        *end("tool_use"),
    ]
    (call,) = put_together(translation().feed(sse(events)))["message"]["tool_calls"]
    assert call["function"]["arguments"] == "{}"


def test_arguments_that_come_with_the_start_are_not_lost() -> None:
    events = [start(), block_start(0, TOOL), block_stop(0), *end("tool_use")]
    (call,) = put_together(translation().feed(sse(events)))["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == TOOL["input"]


def test_what_anthropic_runs_itself_is_passed_over() -> None:
    events = [
        start(),
        block_start(0, SEARCH),
        block_delta(0, "input_json_delta", "partial_json", '{"query":'),
        block_stop(0),
        block_start(1, FOUND),
        block_stop(1),
        *streamed(message([text("a")]))[1:],
    ]
    assert put_together(translation().feed(sse(events)))["message"] == {"role": "assistant", "content": "a"}


def test_what_is_unknown_is_passed_over() -> None:
    unknown: list[dict[str, Any]] = [
        {"type": "message_annotation", "delta": 7, "message": "x"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "hologram", "text": {"a": 1}, "id": []}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "hologram_delta", "thinking": [1]}},
        {"type": "content_block_stop", "index": 0, "delta": None, "new": 1},
        {"type": "message_delta", "delta": {"new": 1}},
    ]
    stream = b"".join(b"event: x\ndata: " + json.dumps(each).encode() + b"\n\n" for each in unknown)
    talker = translation()
    assert talker.feed(sse([start()])) != b""
    assert talker.feed(stream) == b""
    answer = {**message([text("a")]), "content": [{"type": "hologram", "text": 7, "input": [1]}, text("a")], "x": 1}
    assert whole(answer)["choices"][0]["message"]["content"] == "a"


def test_nothing_follows_the_end() -> None:
    talker = translation()
    assert talker.feed(sse([start(), *end()])).endswith(b"data: [DONE]\n\n")
    assert talker.feed(sse([text_delta(0, "late"), *end()])) == b""


def test_a_stream_that_breaks_off_invents_nothing_and_keeps_its_count() -> None:
    assert translation().usage is None
    talker = translation()
    sent = talker.feed(sse([start(), block_start(0, text("")), text_delta(0, "Half an ans")]))
    chunks, done = chunks_in(sent)
    assert not done
    assert all(chunk["choices"][0]["finish_reason"] is None and "usage" not in chunk for chunk in chunks)
    assert talker.usage == Usage(1110, 1, 100, 1000)
    assert talker.assembled() is None


def test_a_stop_without_a_reason_is_no_finish() -> None:
    sent = translation().feed(sse([start(), {"type": "message_stop"}]))
    reader = StreamReader()
    reader.feed(sent)
    assert (reader.done, reader.complete) == (True, False)


def test_there_is_one_reason_to_stop() -> None:
    events = [start(), *end("max_tokens")[:1], *end("end_turn")]
    assert put_together(translation().feed(sse(events)))["finish_reason"] == "length"


def test_later_counts_replace_earlier_ones_and_silence_does_not() -> None:
    events = [start(), *end()]
    events[1]["usage"] = {"output_tokens": 50, "input_tokens": 11}
    assert put_together(translation().feed(sse(events)))["usage"] == {
        **USAGE,
        "prompt_tokens": 1111,
        "completion_tokens": 50,
        "total_tokens": 1161,
    }


# Errors.

ERRORS = [
    ("invalid_request_error", 400),
    ("authentication_error", 401),
    ("billing_error", 402),
    ("permission_error", 403),
    ("not_found_error", 404),
    ("conflict_error", 409),
    ("request_too_large", 413),
    ("rate_limit_error", 429),
    ("api_error", 500),
    ("timeout_error", 504),
    ("overloaded_error", 529),
    ("unheard_of_error", 500),
]


@pytest.mark.parametrize(("kind", "status"), ERRORS)
def test_an_error_in_the_stream(kind: str, status: int) -> None:
    error = {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "req_1"}
    wanted = {"message": "No.", "type": kind, "param": None, "code": status}
    talker = translation()
    talker.feed(sse([start()]))
    with pytest.raises(TranslationError) as caught:
        talker.feed(sse([error]))
    assert caught.value.error == wanted
    assert talker.feed(sse([text_delta(0, "late")])) == b""
    with pytest.raises(TranslationError) as caught:
        translation().whole(json.dumps(error).encode())
    assert caught.value.error == wanted


def test_what_came_before_an_error_in_the_same_read_is_not_lost() -> None:
    events = [
        start(),
        block_start(0, text("")),
        text_delta(0, "Half"),
        {"type": "error", "error": {"type": "overloaded_error"}},
    ]
    reader = StreamReader()
    passed = reader.feed(translation().feed(sse(events)))
    assert b"Half" in passed
    assert b"overloaded" not in passed
    assert reader.error == {"message": "overloaded_error", "type": "overloaded_error", "param": None, "code": 529}


BAD_EVENTS: list[bytes] = [
    b"{",
    b"7",
    b"[]",
    b"\xff",
    b'{"type":7}',
    b"[" * 100_000,
    b'{"type":"message_start"}',
    b'{"type":"message_start","message":{"id":7,"model":"m"}}',
    b'{"type":"message_stop"}',
    b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}',
    b'{"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}',
    b'{"type":"content_block_delta","index":0}',
    b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":7}}',
    b'{"type":"content_block_start","index":0}',
    b'{"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":7,"name":"f","input":{}}}',
    b'{"type":"message_delta","delta":{"stop_reason":"end_turn"}}',
    b'{"type":"message_delta","delta":"x"}',
    b'{"type":"ping","pad":"' + b"x" * (2 << 20),
]


@pytest.mark.parametrize("event", BAD_EVENTS)
def test_a_stream_that_breaks_the_rules_is_an_error(event: bytes) -> None:
    with pytest.raises(TranslationError) as caught:
        translation().feed(b"data: " + event + b"\n\n" if event[-1:] != b"x" else b"data: " + event)
    assert caught.value.error["code"] == 502


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"7",
        b"[" * 100_000,
        b'"\xff"',
        b"{}",
        b'{"type":"message"}',
        json.dumps({**message([]), "stop_reason": None}).encode(),
        json.dumps({**message([]), "id": 7}).encode(),
        json.dumps({**message([]), "content": "a"}).encode(),
        json.dumps({**message([]), "content": [{"type": "text", "text": 7}]}).encode(),
        json.dumps({**message([]), "content": [{"type": "tool_use", "id": "a"}]}).encode(),
        json.dumps({**message([]), "usage": 7}).encode(),
    ],
)
def test_a_whole_answer_that_breaks_the_rules_is_an_error(body: bytes) -> None:
    with pytest.raises(TranslationError) as caught:
        translation().whole(body)
    assert caught.value.error["code"] == 502
