"""The micro-benchmark of a decision measures what it says."""

from __future__ import annotations

import json
import random

import pytest

from loadtests.decide import SIZES, chat, main, timed_us


def test_prompts_have_the_size_they_are_named_for() -> None:
    for size_bytes, messages in SIZES.values():
        body = chat(size_bytes, messages, random.Random(1))
        assert len(body["messages"]) == messages
        text = sum(len(message["content"]) for message in body["messages"])
        assert size_bytes - messages < text <= size_bytes


def test_a_call_is_timed_in_microseconds() -> None:
    calls: list[None] = []
    p50, p90 = timed_us(lambda: calls.append(None), rounds=5, batch=20)
    assert len(calls) == 100
    assert 0 < p50 <= p90 < 100_000


def test_every_size_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["keys"]
    assert list(found) == list(SIZES)
    assert [row["keys"] for row in found.values()] == [2, 2, 8, 35]
    assert all(row["parts_us"] > 0 for row in found.values())
    assert main(["--rounds", "2"]) == 0
    assert "64 KB" in capsys.readouterr().out
