"""DeepSeek's API. The recorded answers are written after api-docs.deepseek.com; each file names its page."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects.deepseek import DeepSeek
from backends.dialects.protocol import Fault, Readiness
from backends.side import SideChannelError
from backends.usage import Usage
from gateway.usage import from_whole
from tests.backends.dialects.asking import ABSENT, asking, recorded
from tests.backends.dialects.hosted import ERRORS, STATUSES, judged, objects_with, relayed


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("insufficient_balance", Fault.CREDENTIAL),
        ("unauthorized", Fault.CREDENTIAL),
        ("overloaded", Fault.OVERLOAD),
        ("rate_limited", Fault.OVERLOAD),
        ("invalid_parameters", Fault.REQUEST),
        ("server_error", Fault.FAILURE),
    ],
)
def test_an_error_is_laid_at_the_right_door(name: str, fault: Fault) -> None:
    assert judged(DeepSeek(), f"deepseek/{name}.json") is fault


def test_503_is_overload_whatever_it_says() -> None:
    assert DeepSeek().judge_error(503, {}) is Fault.OVERLOAD


def test_usage_is_found_behind_the_empty_lines_of_a_long_wait() -> None:
    _, body = recorded("deepseek/chat.json")
    assert body.startswith(b"\n\n\n\n{")
    assert from_whole(body, DeepSeek().read_usage) == Usage(310, 11, 256)


def test_a_longer_wait_still_leaves_the_usage_readable() -> None:
    _, body = recorded("deepseek/chat.json")
    assert from_whole(b"\n" * 40_000 + body, DeepSeek().read_usage) == Usage(310, 11, 256)


@pytest.mark.parametrize(
    ("counts", "cached"),
    [
        ({"prompt_cache_hit_tokens": 64}, 64),
        ({"prompt_cache_hit_tokens": 0}, 0),
        ({"prompt_tokens_details": {"cached_tokens": 32}}, 32),
        ({"prompt_cache_hit_tokens": 64, "prompt_tokens_details": {"cached_tokens": 0}}, 64),
        ({"prompt_cache_hit_tokens": "64"}, None),
        ({"prompt_cache_hit_tokens": -1, "prompt_tokens_details": {"cached_tokens": 5}}, 5),
        ({}, None),
    ],
)
def test_cached_tokens_are_read_under_both_names(counts: dict[str, Any], cached: int | None) -> None:
    usage = DeepSeek().read_usage({"usage": {"prompt_tokens": 100, "completion_tokens": 1, **counts}})
    assert usage == Usage(100, 1, cached)


@given(objects_with("usage"), objects_with("prompt_tokens", "prompt_cache_hit_tokens", "prompt_tokens_details"))
def test_any_usage_can_be_read(tree: Any, usage: Any) -> None:
    DeepSeek().read_usage(tree)
    read = DeepSeek().read_usage({"usage": usage})
    prompt = usage.get("prompt_tokens", 0)
    if read is None:
        assert prompt is not None
        assert type(prompt) is not int or prompt < 0
        return
    assert read.prompt_tokens >= 0
    assert read.cached_tokens is None or read.cached_tokens >= 0


@given(STATUSES, ERRORS)
def test_any_error_object_gets_a_verdict(status: int, error: Any) -> None:
    assert isinstance(DeepSeek().judge_error(status, error), Fault)


@given(st.integers(1, 2000))
def test_a_stream_with_keep_alive_comments_passes_unchanged(piece_bytes: int) -> None:
    passed, reader = relayed(DeepSeek(), "deepseek/stream.json", piece_bytes)
    assert passed == recorded("deepseek/stream.json")[1]
    assert reader.complete
    assert reader.malformed_events == 0
    assert reader.usage == Usage(17, 9, 0)


def test_waiting_is_no_content_and_reasoning_is() -> None:
    _, body = recorded("deepseek/stream.json")
    _, reader = relayed(DeepSeek(), "deepseek/stream.json", 1 << 20)
    events = [event + b"\n\n" for event in body.split(b"\n\n") if event]
    reader = type(reader)()
    started = []
    for event in events[:4]:
        reader.feed(event)
        started.append(reader.content_started)
    assert started == [False, False, False, True]


async def test_the_probe_asks_for_the_balance_which_shows_key_and_money() -> None:
    async with asking({"/user/balance": recorded("deepseek/balance.json")}) as api:
        assert await DeepSeek().probe(api.side, "deepseek-v4-flash") is Readiness.READY
        assert api.asked == ["GET /user/balance"]
        api.replies["/user/balance"] = recorded("deepseek/balance_empty.json")
        assert await DeepSeek().probe(api.side, None) is Readiness.UNAUTHORIZED
        api.replies["/user/balance"] = recorded("deepseek/unauthorized.json")
        assert await DeepSeek().probe(api.side, None) is Readiness.UNAUTHORIZED
        api.replies["/user/balance"] = (200, orjson.dumps({"is_available": None}))
        assert await DeepSeek().probe(api.side, None) is Readiness.READY


async def test_a_host_without_balances_is_asked_for_its_models() -> None:
    async with asking({"/user/balance": ABSENT, "/v1/models": recorded("deepseek/models.json")}) as api:
        assert await DeepSeek().probe(api.side, "deepseek-v4-flash") is Readiness.READY
        assert api.asked == ["GET /user/balance", "GET /v1/models"]
        assert (await DeepSeek().info(api.side)).models == ("deepseek-v4-flash", "deepseek-v4-pro")


async def test_an_answer_that_is_not_the_balances_is_no_answer() -> None:
    async with asking({"/user/balance": (200, b"<html>")}) as api:
        with pytest.raises(SideChannelError, match="JSON"):
            await DeepSeek().probe(api.side, None)
