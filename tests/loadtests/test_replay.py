"""The replay sends what the trace says, when it says so, and counts what comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loadtests import replay
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.pacing import Pace, Speed
from loadtests.real_chats_plan import WORDS
from loadtests.replay_client import Answer, Target, ask, chat_body
from loadtests.replay_prompts import Arrival, arrivals, from_trace, text_of
from loadtests.simulator.traces import Row

QUESTION = chat_body("m", [{"role": "user", "content": "Hello"}], 4)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(chunks=4) as engine:
        yield engine


def made(rows: list[Row], speed: float = 1.0, scale: float = 1.0) -> list[Arrival]:
    return arrivals(rows, speed=speed, scale=scale, output_scale=scale)


def content(arrival: Arrival) -> str:
    return "".join(message["content"] for message in arrival.messages())


# -- prompts


def test_words_are_as_long_as_the_fake_engine_takes_tokens_to_be() -> None:
    assert {len(word) for word in WORDS} == {3}
    assert len(text_of("a", 10)) == 40


def test_equal_blocks_are_equal_text_and_others_are_not() -> None:
    one, two, other = made([Row(0.0, 1100, 5, (1, 2, 3)), Row(1.0, 1500, 5, (1, 2, 4)), Row(2.0, 1100, 5, (9, 2, 3))])
    assert (len(content(one)), len(content(two))) == (4400, 6000)
    assert content(one)[:4096] == content(two)[:4096]
    assert content(one)[4096:] != content(two)[4096:4400]
    assert content(other)[:400] != content(one)[:400]
    assert [message["role"] for message in one.messages()] == ["system", "user"]


def test_rows_without_blocks_have_prompts_like_no_other() -> None:
    one, two = made([Row(0.0, 300, 5), Row(0.0, 300, 5)])
    assert len(content(one)) == len(content(two)) == 1200
    assert content(one)[:100] != content(two)[:100]


def test_a_scaled_prompt_keeps_what_it_shares() -> None:
    one, two = made([Row(0.0, 2048, 40, (1, 2, 3, 4)), Row(1.0, 1024, 40, (1, 2))], scale=0.1)
    assert one.prompt_tokens == 205
    assert one.output_tokens == 4
    assert content(one).startswith(content(two))


def test_arrivals_keep_the_traces_gaps_at_another_speed() -> None:
    found = made([Row(10.0, 1, 1), Row(12.5, 1, 1), Row(11.0, 1, 1)], speed=2.0)
    assert [each.at_s for each in found] == [0.0, 0.5, 1.25]
    assert [each.number for each in found] == [0, 2, 1]


def test_both_kinds_of_traces_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.0319600,396,109\n"
    )
    first, second = from_trace(azure, limit=None, speed=1.0, scale=1.0, output_scale=1.0)
    assert (first.prompt_tokens, second.output_tokens) == (374, 109)
    assert second.at_s == pytest.approx(0.052)
    excerpt = from_trace(replay.EXCERPT, limit=5, speed=1.0, scale=0.01, output_scale=1.0)
    assert len(excerpt) == 5
    assert excerpt[0].blocks


# -- one request


async def test_an_answer_is_read_to_its_usage(engine: FakeEngine) -> None:
    engine.script = Behaviour(chunks=4, prompt_tokens=90, cached_tokens=64, ttft_s=0.05, interval_s=0.02)
    answer = await ask(Target.of(engine.url), QUESTION, time.perf_counter(), 20.0, keep_text=True)
    assert answer.error is None
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (90, 64, 4)
    assert answer.ttft_s is not None
    assert answer.total_s is not None
    assert 0.05 <= answer.ttft_s < answer.total_s
    assert answer.per_token_s >= 0.015
    assert answer.text == 4 * "All w"
    assert answer.predicted_tokens is None


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (Behaviour(status=503), "status 503"),
        (Behaviour(cut_after=2), "ConnectionResetError"),
        (Behaviour(truncate_after=2), "cut"),
        (Behaviour(done_without_finish=True), "cut"),
        (Behaviour(error_event_after=1), "error in the stream"),
        (Behaviour(chunks=0), "empty"),
        (Behaviour(raw="nonsense\r\n\r\n"), "not understood"),
        (Behaviour(hang=True), "time-out"),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(engine: FakeEngine, behaviour: Behaviour, error: str) -> None:
    engine.script = behaviour
    answer = await ask(Target.of(engine.url), QUESTION, time.perf_counter(), 1.0)
    assert answer.error == error
    assert answer.total_s is None


async def test_nobody_there_is_an_error(engine: FakeEngine) -> None:
    url = engine.url
    await engine.stop()
    answer = await ask(Target.of(url), QUESTION, time.perf_counter(), 10.0)
    assert answer.error == "ConnectionRefusedError"


def test_a_target_takes_addresses_as_people_write_them() -> None:
    plain = Target.of("http://gateway:7400/v1", "sk-test")
    assert (plain.host, plain.port, plain.tls) == ("gateway", 7400, None)
    assert plain.message(b"{}").startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway:7400\r\n")
    assert b"authorization: Bearer sk-test\r\n" in plain.message(b"{}")
    secure = Target.of("https://example.com/openai/")
    assert (secure.port, secure.path, secure.tls is None) == (443, "/openai", False)
    with pytest.raises(ValueError, match="no-scheme is not a URL"):
        Target.of("no-scheme")


# -- a run


async def test_requests_are_sent_when_they_are_due_whatever_became_of_others(engine: FakeEngine) -> None:
    engine.script = Behaviour(hang=True)
    rows = [Row(0.1 * number, 20, 2) for number in range(6)]
    answers = await replay.replay(Target.of(engine.url), "m", made(rows), 2.0)
    assert [answer.error for answer in answers] == ["time-out"] * 6
    came = [request.received_at for request in engine.requests]
    assert came[5] - came[0] < 1.9  # not one of them had ended when the last was sent
    assert came[5] - came[0] > 0.4


async def test_a_shared_beginning_shows_as_cached_share() -> None:
    async with FakeEngine() as engine:
        engine.pace = Pace(Speed(prefill_us=1.0, token_ms=1.0))
        rows = [Row(0.2 * number, 1024, 3, (1, 2 + number)) for number in range(4)]
        answers = await replay.replay(Target.of(engine.url), "m", made(rows), 20.0)
    found = replay.figures(answers, 1.0, 2000.0, 50.0)
    assert found["errors"] == {}
    # Three of four share the first of two blocks of 512 tokens.
    assert found["cached_share"] == pytest.approx(0.375, abs=0.05)


def test_figures_count_what_they_are_named_for() -> None:
    good = Answer(ttft_s=0.1, total_s=0.5, prompt_tokens=100, cached_tokens=50, output_tokens=5, predicted_tokens=40)
    late = Answer(ttft_s=3.0, total_s=3.4, prompt_tokens=100, output_tokens=5, predicted_tokens=0)
    slow = Answer(ttft_s=0.1, total_s=4.1, prompt_tokens=200, output_tokens=5, predicted_tokens=0)
    lost = Answer(error="cut", prompt_tokens=1000, cached_tokens=1000)
    found = replay.figures([good, late, slow, lost], 2.0, 2000.0, 200.0)
    assert (found["requests"], found["errors"]) == (4, {"cut": 1})
    assert (found["good_share"], found["good_per_s"]) == (0.25, 0.5)
    assert (found["cached_share"], found["predicted_share"]) == (0.125, 0.1)
    assert found["ttft_ms"] == pytest.approx(1066.7, abs=0.1)
    text = replay.table([("cost", found), ("none", replay.figures([lost], 1.0, 2000.0, 200.0))])
    assert "1 x cut" in text
    assert "12.5" in text


def test_the_fake_fleet_is_replayed_to_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = "--limit 6 --speed 10 --scale 0.02 --output-scale 0.02 --replicas 2 --policies cost,round_robin"
    assert replay.main([*arguments.split(), "--json", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [each["name"] for each in runs] == ["cost", "round_robin"]
    for each in runs:
        assert len(each["answers"]) == sum(each["replicas"].values()) == 6
        assert each["ttft_ms"] > 10.0
    assert runs[1]["replicas"] == {"pool-0": 3, "pool-1": 3}
    assert "round_robin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--policies cosst", "cosst"),
        ("--trace /nowhere.jsonl", "cannot be read"),
        ("--url nowhere --model m", "is not a URL"),
    ],
)
def test_what_cannot_begin_says_why(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main(["--limit", "1", *arguments.split()]) == 2
    assert said in capsys.readouterr().err


async def test_a_backend_of_ones_own_is_replayed_to(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.script = Behaviour(status=500)
    arguments = ["--limit", "2", "--speed", "100", "--scale", "0.01", "--url", engine.url, "--model", "mine"]
    assert await asyncio.to_thread(replay.main, arguments) == 1
    assert "2 x status 500" in capsys.readouterr().out
    assert {request.json()["model"] for request in engine.requests} == {"mine"}
