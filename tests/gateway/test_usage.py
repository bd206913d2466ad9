"""Reading usage out of answers, and pricing it."""

from __future__ import annotations

import json
import time

import pytest

from backends.usage import Usage, read_openai_usage
from gateway.config import Price
from gateway.record import Exchange
from gateway.sse import StreamReader
from gateway.usage import cost_usd, from_stream, from_whole

USED = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 4}}


def test_usage_of_a_small_answer() -> None:
    assert from_whole(json.dumps({"choices": [], "usage": USED}).encode()) == Usage(10, 5, 4)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("last", [True, False])
def test_usage_of_a_large_answer_stands_before_or_after_the_data(separators: tuple[str, str], last: bool) -> None:
    vectors = {"data": [{"embedding": [0.125] * 10_000, "index": index} for index in range(3)]}
    value = {**vectors, "usage": USED} if last else {"usage": USED, **vectors}
    assert from_whole(json.dumps(value, separators=separators).encode()) == Usage(10, 5, 4)


def test_text_that_quotes_a_usage_object_is_not_taken_for_it() -> None:
    text = '"usage": {"prompt_tokens": 999} ' * 1000
    value = {"usage": USED, "choices": [{"message": {"content": text}}]}
    assert from_whole(json.dumps(value).encode()) == Usage(10, 5, 4)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"7",
        b"{}",
        b'{"usage":null}',
        b'{"usage":7}',
        b'{"data":"%b"}' % (b"x" * 20_000),
        b'{"data":"%b","usage":{"prompt_tokens":1' % (b"x" * 20_000),
        b'{"data":"%b","usage":null}' % (b"x" * 20_000),
        b'{"data":"%b","usage":{"a":%b' % (b"x" * 20_000, b"}" * 5000),
    ],
)
def test_an_answer_without_usage_has_none(body: bytes) -> None:
    assert from_whole(body) is None


def test_a_large_answer_is_not_parsed_whole() -> None:
    body = b'{"data":[%b],"usage":{"prompt_tokens":3}}' % b",".join([b"0.123456"] * 2_000_000)
    started = time.perf_counter()
    assert from_whole(body) == Usage(3)
    assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        ({}, Usage()),
        ({"prompt_tokens": None, "completion_tokens": None, "prompt_tokens_details": None}, Usage()),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": None}}, Usage(3)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}, Usage(3, 0, 2)),
    ],
)
def test_counts_that_engines_leave_out_are_zero(reported: dict[str, object], usage: Usage) -> None:
    assert read_openai_usage(reported) == usage


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("value", [2**64 - 1, 10**8 + 1, -1, 1.5, 12.0, True, "5", [], 10**400])
def test_a_number_that_cannot_be_a_count_makes_the_report_none(name: str, value: object) -> None:
    assert read_openai_usage({"prompt_tokens": 5, "completion_tokens": 7, name: value}) is None
    assert read_openai_usage({name: value}) is None
    assert read_openai_usage({"prompt_tokens": 10**8, "completion_tokens": 10**8}) == Usage(10**8, 10**8)
    details = {"cached_tokens": value, "cache_write_tokens": value}
    assert read_openai_usage({"prompt_tokens": 5, "prompt_tokens_details": details}) == Usage(5)


def test_cached_tokens_have_their_own_price() -> None:
    price = Price(input=2.0, cached_input=0.5, output=8.0)
    assert cost_usd(Usage(1_000_000, 0, 0), price) == 2.0
    assert cost_usd(Usage(1_000_000, 0, 1_000_000), price) == 0.5
    assert cost_usd(Usage(0, 1_000_000, 0), price) == 8.0


def test_more_cached_than_prompt_tokens_never_make_a_negative_price() -> None:
    assert cost_usd(Usage(10, 0, 1000), Price(input=1000.0, cached_input=0.0)) == 0.0


def test_a_stream_leaves_its_usage_and_its_count_however_it_ended() -> None:
    exchange = Exchange("req_1", "/v1/chat/completions", 0.0, 0.0)
    reader = StreamReader()
    reader.feed(b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n')
    from_stream(exchange, reader)
    assert (exchange.content_events, exchange.usage) == (1, None)
    reader.feed(b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(USED).encode())
    from_stream(exchange, reader)
    assert exchange.usage == Usage(10, 5, 4)
