"""The chats with real engines: the same for all policies, counted by the engines themselves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loadtests import real_chats
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.processes import ROOT
from loadtests.real_chats_plan import Plan, sessions
from loadtests.real_engines import Counts, total
from loadtests.replay_client import Answer
from tests.engines.install import MODEL

FAST = Plan(sessions=3, per_s=1000.0, think_s=0.001, system_words=(10, 20))


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with FakeEngine(chunks=2) as engine:
        yield engine


def test_conversations_are_the_same_for_the_same_seed() -> None:
    assert sessions(Plan(), 1) == sessions(Plan(), 1)
    assert sessions(Plan(), 1) != sessions(Plan(), 2)


def test_conversations_are_as_planned() -> None:
    plan = Plan(sessions=200, systems=5, system_words=(100, 200), turns=(4, 6), answer_tokens=(8, 16))
    found = sessions(plan, 3)
    assert len({session.system for session in found}) == 5
    assert {len(session.system.split()) for session in found} == {100, 125, 150, 175, 200}
    assert {len(session.turns) for session in found} == {4, 5, 6}
    assert {turn.answer_tokens for session in found for turn in session.turns} == set(range(8, 17))
    assert found[-1].at_s == pytest.approx(200 / plan.per_s, rel=0.3)


async def test_each_turn_holds_the_conversation_so_far(engine: FakeEngine) -> None:
    answers = await real_chats.talk_all(engine.url, FAST, 1)
    asked = [request.json()["messages"] for request in engine.requests]
    assert len(answers) == len(asked) == sum(len(session.turns) for session in sessions(FAST, 1))
    assert [message["role"] for message in max(asked, key=len)[:4]] == ["system", "user", "assistant", "user"]
    for messages in asked:
        assert messages[-1]["role"] == "user"
        assert all(message["content"] for message in messages)


async def test_a_conversation_ends_with_its_first_error(engine: FakeEngine) -> None:
    engine.script = Behaviour(status=503)
    answers = await real_chats.talk_all(engine.url, FAST, 1)
    assert [answer.error for answer in answers] == ["status 503"] * 3


def test_counters_are_summed_over_their_series() -> None:
    page = '# HELP a_total x\na_total 2\na_total_more 5\nb{x="1"} 1.5\nb{x="2"} 2e1\n'
    assert (total(page, "a_total"), total(page, "b"), total(page, "c")) == (2.0, 21.5, 0.0)


def row(policy: str, number: int, share: float, **changes: Any) -> dict[str, Any]:
    answers = [Answer(ttft_s=0.1, total_s=0.2, prompt_tokens=1000, predicted_tokens=600, replica="r0")]
    answers.append(Answer(error="cut"))
    found = real_chats.figures(answers, Counts(1000.0, 1000.0 * share, 0.05, 0.07))
    return {"policy": policy, "round": number, **found, "seconds": 1.0, "load": [0.5, 1.5], **changes}


def test_shares_come_from_the_engines_counters() -> None:
    found = row("cost", 1, 0.8)
    assert (found["cached_share"], found["usage_share"], found["predicted_share"]) == (0.8, 0.0, 0.6)
    assert (found["engine_ms"], found["processor_ms"]) == (pytest.approx(50.0), pytest.approx(70.0))
    assert (found["requests"], found["errors"]) == (1, {"cut": 1})


def test_the_table_has_medians_ranges_loads_and_errors() -> None:
    rows = [row("cost", 1, 0.8), row("cost", 2, 0.6), row("round_robin", 1, 0.2, predicted_share=0.0)]
    about = {"date": "d", "commit": "c", "cpu": "u", "cores": 2, "kernel": "k", "python": "3", "command": "run"}
    plan = {"sessions": 3, "turns": [4, 6], "systems": 2, "answer_tokens": [8, 16], "per_s": 1.0}
    engines = {"llamacpp": {"note": "two of them", "plan": plan, "runs": rows}}
    text = real_chats.markdown({**about, "rounds": 2, "policies": ["cost", "round_robin"], "engines": engines})
    assert "0.5 to 1.5" in text
    cost, other = (line for line in text.splitlines() if line.startswith(("| cost", "| round_robin")))
    assert "| 70.0 % (60.0-80.0) |" in cost
    assert cost.endswith("| 1, 1 | 2 |")
    assert "| 20.0 % | - |" in other


def test_the_page_on_routing_has_a_place_for_the_tables() -> None:
    text = (ROOT / "docs" / "routing.md").read_text()
    assert real_chats.BEGIN in text
    assert real_chats.END in text


@pytest.mark.engine
@pytest.mark.slow
def test_a_small_run_on_real_engines(tmp_path: Path) -> None:
    if not (MODEL / "model.gguf").exists():
        pytest.skip("`make test-engines` makes the model")
    out = tmp_path / "out.json"
    words = "--engines llamacpp --sessions 2 --rounds 1 --policies cost,round_robin"
    assert real_chats.main([*words.split(), "--json", str(out)]) == 0
    cost, other = json.loads(out.read_text())["engines"]["llamacpp"]["runs"]
    assert cost["requests"] == other["requests"] >= 8
    assert cost["cached_share"] == pytest.approx(cost["usage_share"], abs=0.01)
    assert cost["cached_share"] > 0.3
