"""The fake engine that takes its time: what is cached, and when tokens come."""

from __future__ import annotations

import json

import msgspec
import pytest

from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.pacing import BLOCK_TOKENS, TOKEN_BYTES, Pace, Speed
from loadtests.rawclient import CHAT, STREAM, ask
from loadtests.replay_prompts import text_of

SPEED = Speed(prefill_us=1000.0, token_ms=10.0, running_ms=2.0, base_ms=5.0, kv_tokens=64 * BLOCK_TOKENS, max_running=2)


def body(text: str, max_tokens: int = 5, *, stream: bool = True) -> bytes:
    return json.dumps(
        {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "stream": stream}
    ).encode()


def words(seed: str, blocks: int) -> str:
    return text_of(seed, blocks * BLOCK_TOKENS)


def test_a_prompt_is_cached_from_its_second_time_on_and_never_whole() -> None:
    pace = Pace(SPEED)
    first = pace(body(words("a", 8)), Behaviour(), 0.0)
    again = pace(body(words("a", 8)), Behaviour(), 10.0)
    assert first.cached_tokens == 0
    assert first.prompt_tokens == 8 * BLOCK_TOKENS + len("<user>") // TOKEN_BYTES
    assert 7 * BLOCK_TOKENS <= again.cached_tokens < again.prompt_tokens


def test_what_is_cached_is_the_common_beginning() -> None:
    pace = Pace(SPEED)
    pace(body(words("a", 4) + words("b", 4)), Behaviour(), 0.0)
    other_end = pace(body(words("a", 4) + words("c", 4)), Behaviour(), 10.0)
    other_beginning = pace(body(words("c", 4) + words("b", 4)), Behaviour(), 20.0)
    assert other_end.cached_tokens in (3 * BLOCK_TOKENS, 4 * BLOCK_TOKENS)
    assert other_beginning.cached_tokens == 0


def test_the_longest_unused_goes_first_and_from_its_end() -> None:
    pace = Pace(SPEED)
    for seed in "abc":  # 32 blocks each, and room for 64
        pace(body(words(seed, 32)), Behaviour(), 0.0)
    assert pace(body(words("c", 32)), Behaviour(), 0.0).cached_tokens >= 31 * BLOCK_TOKENS
    assert pace(body(words("a", 32)), Behaviour(), 0.0).cached_tokens == 0
    pace(body(words("d", 40)), Behaviour(), 0.0)
    assert 0 < pace(body(words("a", 32)), Behaviour(), 0.0).cached_tokens < 31 * BLOCK_TOKENS


def test_prompts_are_worked_on_one_after_the_other() -> None:
    pace = Pace(SPEED)
    one = pace(body(words("a", 1)), Behaviour(), 0.0)
    two = pace(body(words("b", 1)), Behaviour(), 0.0)
    alone_s = 0.005 + one.prompt_tokens * 0.001
    assert one.ttft_s == pytest.approx(alone_s)
    assert two.ttft_s == pytest.approx(2 * alone_s)
    assert [one.interval_s, two.interval_s] == pytest.approx([0.010, 0.012])
    assert (one.chunks, two.chunks) == (5, 5)


def test_a_full_engine_lets_the_next_one_wait_for_a_place() -> None:
    pace = Pace(SPEED)
    ends = [pace(body(words(seed, 1), 101), Behaviour(), 0.0) for seed in "ab"]
    third = pace(body(words("c", 1), 5), Behaviour(), 0.0)
    first_end_s = ends[0].ttft_s + 100 * ends[0].interval_s
    assert third.ttft_s == pytest.approx(first_end_s + 0.005 + third.prompt_tokens * 0.001)


def test_a_whole_answer_comes_when_a_stream_would_end() -> None:
    stream = Pace(SPEED)(body(words("a", 1)), Behaviour(), 0.0)
    whole = Pace(SPEED)(body(words("a", 1), stream=False), Behaviour(), 0.0)
    assert whole.ttft_s == pytest.approx(stream.ttft_s + 4 * stream.interval_s)


def test_a_body_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(msgspec.MsgspecError):
        Pace(SPEED)(b'{"messages": 3}', Behaviour(), 0.0)


async def test_the_fake_engine_answers_as_its_pace_says() -> None:
    async with FakeEngine() as engine:
        engine.pace = Pace(Speed(prefill_us=10.0, token_ms=1.0))
        question = {**CHAT, "messages": [{"role": "user", "content": words("a", 4)}], "max_tokens": 7}
        whole = await ask(engine, question)
        again = await ask(engine, {**STREAM, **question, "stream": True})
        bad = await ask(engine, {**CHAT, "messages": 3})
    assert whole.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert whole.json["usage"]["completion_tokens"] == 7
    assert len(again.texts) == 7
    assert again.events[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 3 * BLOCK_TOKENS
    assert bad.status == 400
