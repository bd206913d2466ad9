"""Reading a stream of events while its bytes pass through."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.sse import EventTooLarge
from backends.usage import Usage
from gateway.sse import StreamReader

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}


def chunk(*deltas: tuple[int, dict[str, Any], str | None], spaces: bool = False, **more: Any) -> bytes:
    """A chat chunk's JSON, as engines write it."""
    choices = [{"index": index, "delta": delta, "finish_reason": finish} for index, delta, finish in deltas]
    value = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": choices, **more}
    return json.dumps(value, separators=(", ", ": ") if spaces else (",", ":")).encode()


def data(payload: bytes, end: bytes = b"\n") -> bytes:
    return b"data: " + payload + end + end


ROLE = data(chunk((0, {"role": "assistant", "content": ""}, None)))
TEXT = data(chunk((0, {"content": "Hi"}, None)))
FINISH = data(chunk((0, {}, "stop")))
USAGE_EVENT = data(chunk(usage=USAGE))
DONE = data(b"[DONE]")
PING = b": ping\n\n"


def read(*pieces: bytes, **options: Any) -> tuple[bytes, StreamReader]:
    reader = StreamReader(**options)
    return b"".join([reader.feed(piece) for piece in pieces]), reader


def state(reader: StreamReader) -> dict[str, Any]:
    """All that a reader has learnt."""
    names = ("content_started", "content_events", "malformed_events", "usage", "done", "error", "complete")
    return {name: getattr(reader, name) for name in names}


# A whole stream.


def test_a_healthy_stream_passes_unchanged_and_is_complete() -> None:
    stream = ROLE + TEXT + TEXT + FINISH + USAGE_EVENT + DONE
    passed, reader = read(stream)
    assert passed == stream
    assert reader.complete
    assert reader.done
    assert reader.usage == Usage(7, 3, 4)
    assert reader.content_events == 2


def test_the_usage_event_is_hidden_from_who_did_not_ask() -> None:
    passed, reader = read(ROLE + TEXT + FINISH + USAGE_EVENT + DONE, hide_usage=True)
    assert passed == ROLE + TEXT + FINISH + DONE
    assert reader.usage == Usage(7, 3, 4)


def test_usage_beside_choices_is_read_and_never_hidden() -> None:
    last = data(chunk((0, {}, "stop"), usage=USAGE))
    passed, reader = read(TEXT, last, hide_usage=True)
    assert passed == TEXT + last
    assert reader.usage == Usage(7, 3, 4)


def test_an_event_without_choices_and_usage_passes() -> None:
    first = data(chunk(usage=None, prompt_filter_results=[]))
    assert read(first, hide_usage=True)[0] == first


def test_usage_is_read_from_an_ordinary_delta_that_carries_it() -> None:
    counted = data(chunk((0, {"content": "x"}, None), usage=USAGE))
    passed, reader = read(TEXT, counted + counted)
    assert passed == TEXT + counted + counted
    assert reader.usage == Usage(7, 3, 4)


# When content begins.


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x"},
        {"content": " "},
        {"reasoning_content": "x"},
        {"reasoning": "x"},
        {"refusal": "no"},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
        {"function_call": {"name": "f"}},
        {"audio": {"id": "a"}},
        {"role": "assistant", "content": "x"},
    ],
    ids=lambda delta: next(iter(reversed(delta))),
)
def test_this_delta_is_content(delta: dict[str, Any]) -> None:
    assert read(data(chunk((0, delta, None))))[1].content_started


@pytest.mark.parametrize(
    "event",
    [
        ROLE,
        PING,
        b": OPENROUTER PROCESSING\n\n",
        b"event: start\n\n",
        b"retry: 100\n\n",
        data(chunk((0, {"role": "assistant", "content": None, "tool_calls": None}, None))),
        data(chunk((0, {}, None))),
        data(chunk()),
        data(b"{}"),
        data(b"null"),
        data(b"{broken"),
        data(b'{"choices":7}'),
        data(b'{"choices":[7,{"delta":7}]}'),
    ],
)
def test_this_event_passes_without_being_content(event: bytes) -> None:
    passed, reader = read(event)
    assert passed == event
    assert not reader.content_started
    assert reader.error is None


def test_a_finish_reason_counts_as_content() -> None:
    assert read(FINISH)[1].content_started


def test_text_of_the_completions_route_is_content() -> None:
    assert read(data(b'{"choices":[{"index":0,"text":"x","finish_reason":null}]}'))[1].content_started


def test_malformed_events_are_passed_on_and_counted() -> None:
    passed, reader = read(TEXT + data(b"{broken") + FINISH)
    assert passed == TEXT + data(b"{broken") + FINISH
    assert reader.malformed_events == 1


# When a stream is complete.


def test_done_while_a_choice_is_unfinished_is_held_back() -> None:
    passed, reader = read(TEXT, DONE, FINISH)
    assert passed == TEXT
    assert reader.done
    assert not reader.complete


def test_done_in_the_same_read_as_content_is_held_back() -> None:
    passed, reader = read(TEXT, TEXT + DONE + FINISH)
    assert passed == TEXT + TEXT
    assert not reader.complete


def test_all_of_n_choices_must_finish() -> None:
    one, two = data(chunk((0, {}, "stop"))), data(chunk((1, {}, "length")))
    assert not read(TEXT + one + one, expected_choices=2)[1].complete
    assert read(TEXT + one + two, expected_choices=2)[1].complete
    assert read(TEXT + data(chunk((0, {}, "stop"), (1, {}, "stop"))), expected_choices=2)[1].complete


@pytest.mark.parametrize("index", [b"[1]", b"{}", b"null", b'"0"', b"1e30"])
def test_an_index_that_is_no_number_counts_as_the_first(index: bytes) -> None:
    reader = StreamReader(expected_choices=2)
    event = b'data: {"choices":[{"index":%b,"finish_reason":"stop"}]}\n\n'
    assert reader.feed(event % index) == event % index
    assert not reader.complete
    reader.feed(event % b"1")
    assert reader.complete


def test_nothing_after_done_is_passed_on() -> None:
    assert read(FINISH + DONE + TEXT)[0] == FINISH + DONE
    assert read(FINISH, DONE, TEXT)[0] == FINISH + DONE


def test_an_early_done_is_held_back_even_beside_an_event_of_two_choices() -> None:
    # As many finish_reason keys as events, and twice "data:": counting these alone would take it for two deltas.
    both = data(chunk((0, {"content": "data:"}, None), (1, {"content": "b"}, None)))
    passed, reader = read(both, both + DONE, expected_choices=2)
    assert passed == both + both
    assert reader.done


def test_a_flat_error_is_found_even_beside_an_event_of_two_choices() -> None:
    both = data(chunk((0, {"content": "data:"}, None), (1, {"content": "b"}, None)))
    error = b'event: error\ndata: {"message":"broken"}\n\n'
    passed, reader = read(both, both + error, expected_choices=2)
    assert passed == both + both
    assert reader.error == {"message": "broken"}


# Errors in the stream.

ERRORS = {
    "nested": (data(b'{"error":{"message":"full","code":503}}'), {"message": "full", "code": 503}),
    "nested beside choices": (data(b'{"choices":[],"error":{"message":"full"}}'), {"message": "full"}),
    "a bare string": (data(b'{"error":"full"}'), {"message": "full"}),
    "flat": (data(b'{"object":"error","message":"full"}'), {"object": "error", "message": "full"}),
    "named": (b'event: error\ndata: {"message":"full"}\n\n', {"message": "full"}),
    "named afterwards": (b'data: {"message":"full"}\nevent: error\n\n', {"message": "full"}),
    "named with CRLF": (b'event: error\r\ndata: {"message":"full"}\r\n\r\n', {"message": "full"}),
    "without a space": (b'data:{"error":{"message":"full"}}\n\n', {"message": "full"}),
    "over two lines": (b'data: {"error":\ndata: {"message":"full"}}\n\n', {"message": "full"}),
}


@pytest.mark.parametrize(("event", "error"), ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("before", [b"", TEXT], ids=["first", "after content"])
def test_an_error_event_is_held_back_and_ends_the_stream(before: bytes, event: bytes, error: dict[str, Any]) -> None:
    passed, reader = read(before, event + DONE, TEXT)
    assert passed == before
    assert reader.error == error
    assert not reader.done


@pytest.mark.parametrize("value", [b"null", b"false", b'""', b"{}"])
def test_an_empty_error_key_is_no_error(value: bytes) -> None:
    event = data(b'{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}],"error":%b}' % value)
    passed, reader = read(TEXT, event)
    assert passed == TEXT + event
    assert reader.error is None


def test_text_that_quotes_the_protocol_changes_nothing() -> None:
    text = '"finish_reason":"stop" "error":{"a":1} "usage":{"a":1} data: [DONE]\n\ndata: {}'
    quoting = data(chunk((0, {"content": text}, None)))
    passed, reader = read(TEXT, quoting, quoting[:40], quoting[40:])
    assert passed == TEXT + quoting + quoting
    assert not reader.complete
    assert not reader.done
    assert reader.error is None
    assert reader.usage is None


# Chunking and line endings.

payloads = st.sampled_from(
    [
        chunk((0, {"role": "assistant", "content": ""}, None)),
        chunk((0, {"content": "Hi"}, None)),
        chunk((0, {"content": "Grüße"}, None), spaces=True),
        chunk((1, {"content": "\r\n\r\n\n\n"}, None)),
        chunk((0, {"reasoning_content": "hm"}, None), usage=None),
        chunk((0, {"content": "a"}, None), (1, {"content": "data: b"}, None)),
        chunk((0, {}, "stop")),
        chunk((1, {}, "length")),
        chunk((0, {}, "stop"), (1, {}, "stop"), spaces=True),
        chunk(usage=USAGE),
        chunk(usage=USAGE, spaces=True),
        b'{"error":{"message":"broken"}}',
        b"[DONE]",
        b"{broken",
    ]
)
kinds = st.sampled_from(["plain", "plain", "plain", "no space", "ping", "named", "two lines", "error name"])


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Events of every kind, each with one of the three line endings."""
    events = []
    endings = st.sampled_from(draw(st.sampled_from([[b"\n"], [b"\r\n"], [b"\r"], [b"\n", b"\r\n", b"\r"]])))
    for payload in draw(st.lists(payloads, max_size=10)):
        end = draw(endings)
        lines = {
            "plain": [b"data: " + payload],
            "no space": [b"data:" + payload],
            "ping": [b": ping"],
            "named": [b"event: message", b"id: 1", b"data: " + payload],
            "two lines": [b"data: " + payload, b"data: "],
            "error name": [b"event: error", b'data: {"message":"broken"}'],
        }[draw(kinds)]
        events.append(b"".join([line + end for line in lines]) + end)
    return b"".join(events)


def feed_all(stream: bytes, cuts: list[int], hide_usage: bool, choices: int) -> tuple[bytes, dict[str, Any]]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]
    passed, reader = read(*pieces, hide_usage=hide_usage, expected_choices=choices)
    return passed, state(reader)


@given(streams(), st.lists(st.integers(0, 5000), max_size=30), st.booleans(), st.integers(1, 2))
def test_any_chunking_reads_the_same(stream: bytes, cuts: list[int], hide_usage: bool, choices: int) -> None:
    every_byte = feed_all(stream, list(range(len(stream))), hide_usage, choices)
    assert feed_all(stream, [], hide_usage, choices) == every_byte
    assert feed_all(stream, cuts, hide_usage, choices) == every_byte


@given(streams(), st.lists(st.integers(1, 3), min_size=10, max_size=10), st.booleans(), st.integers(1, 2))
def test_whole_events_in_each_read_take_the_fast_path_to_the_same_end(
    stream: bytes, sizes: list[int], hide_usage: bool, choices: int
) -> None:
    cuts = list(itertools.accumulate(map(len, split_events(stream))))
    some = [cuts[at - 1] for at in itertools.accumulate(sizes) if at <= len(cuts)]
    passed, learnt = feed_all(stream, some, hide_usage, choices)
    expected, all_learnt = feed_all(stream, [], hide_usage, choices)
    # The fast path does not look inside: a delta that comes empty after content has begun counts as content there.
    assert learnt.pop("content_events") >= all_learnt.pop("content_events")
    assert (passed, learnt) == (expected, all_learnt)


@given(streams(), st.lists(st.integers(0, 5000), max_size=30), st.integers(1, 2))
def test_what_is_shown_to_who_asked_is_the_stream_itself_up_to_its_end(
    stream: bytes, cuts: list[int], choices: int
) -> None:
    passed, learnt = feed_all(stream, cuts, hide_usage=False, choices=choices)
    assert stream.startswith(passed)
    if learnt["error"] is None and not learnt["done"]:
        assert passed == stream


@given(streams(), st.lists(st.integers(0, 5000), max_size=30), st.integers(1, 2))
def test_hiding_takes_away_whole_usage_events_and_nothing_else(stream: bytes, cuts: list[int], choices: int) -> None:
    shown, _ = feed_all(stream, [], hide_usage=False, choices=choices)
    hidden, _ = feed_all(stream, cuts, hide_usage=True, choices=choices)
    expected = b"".join([event for event in split_events(shown) if not is_usage_event(event)])
    assert hidden == expected


def split_events(stream: bytes) -> list[bytes]:
    """An independent, slow reading of the specification: an event ends with an empty line."""
    events, event, line = [], b"", b""
    position = 0
    while position < len(stream):
        end = next((each for each in (b"\r\n", b"\n", b"\r") if stream.startswith(each, position)), None)
        step = end or stream[position : position + 1]
        position += len(step)
        event += step
        if end is None:
            line += step
        elif line:
            line = b""
        else:
            events.append(event)
            event = b""
    assert not event
    return events


def is_usage_event(event: bytes) -> bool:
    return b'"choices":[]' in event.replace(b" ", b"") and b"prompt_tokens" in event


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_every_line_ending_passes_as_it_came(end: bytes) -> None:
    stream = b"".join([event.replace(b"\n", end) for event in (ROLE, PING, TEXT, FINISH, DONE)])
    for size in (1, 2, 3, 7, len(stream)):
        passed, reader = read(*[stream[at : at + size] for at in range(0, len(stream), size)])
        assert passed == stream
        assert reader.complete
        assert reader.done


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_an_event_is_passed_on_as_soon_as_its_last_byte_is_there(end: bytes) -> None:
    reader = StreamReader()
    event = TEXT.replace(b"\n", end)
    assert reader.feed(event[:-1]) in (b"", event[:-1])  # CR LF CR already ends a line
    reader.feed(event[-1:])
    assert reader.content_started
    assert reader.feed(event) == event


def test_the_fast_path_and_the_slow_one_learn_the_same() -> None:
    parts = [TEXT, TEXT, TEXT + TEXT, PING + TEXT, TEXT + FINISH, USAGE_EVENT + DONE]
    whole, fast = read(*parts, hide_usage=True)
    pieces, slow = read(*[bytes([byte]) for byte in b"".join(parts)], hide_usage=True)
    assert whole == pieces
    assert state(fast) == state(slow)


# Bounds.


def test_an_event_that_never_ends_is_refused() -> None:
    reader = StreamReader(max_event_bytes=1000)
    reader.feed(b"data: " + b"x" * 900)
    with pytest.raises(EventTooLarge):
        reader.feed(b"x" * 101)


@pytest.mark.parametrize("before", [b"", TEXT], ids=["first", "after content"])
def test_a_large_event_that_came_in_one_read_is_refused_too(before: bytes) -> None:
    reader = StreamReader(max_event_bytes=1000)
    reader.feed(before)
    with pytest.raises(EventTooLarge):
        reader.feed(data(chunk((0, {"content": "x" * 1000}, None))))


def test_many_small_events_in_one_read_are_not_one_large_event() -> None:
    reader = StreamReader(max_event_bytes=1000)
    many = TEXT * 100
    assert reader.feed(many) == many
    assert reader.feed(many) == many
    assert reader.feed(many[:-1]) + reader.feed(many[-1:]) == many


def test_a_huge_event_in_tiny_pieces_costs_time_in_proportion() -> None:
    def cost_s(size: int) -> float:
        reader = StreamReader(max_event_bytes=10_000_000)
        event = data(chunk((0, {"content": "x" * size}, None)))
        started = time.perf_counter()
        for at in range(len(event)):
            reader.feed(event[at : at + 1])
        assert reader.content_started
        return time.perf_counter() - started

    small = min(cost_s(30_000) for _ in range(3))
    assert cost_s(300_000) < 25 * small  # quadratic would be 100


def test_a_byte_order_mark_before_the_stream_is_no_part_of_its_first_event() -> None:
    reader = StreamReader()
    event = b'\xef\xbb\xbfdata: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    assert reader.feed(event) == event
    assert reader.complete
