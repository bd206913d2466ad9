"""The tool behind ADR 0004: its tables, what it feeds the candidates, and a very small run of each kind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtests import choices
from loadtests.choice_clients import CLIENTS, load
from loadtests.choice_parsers import CASES, PARSERS, SIZES, conversation, strictness
from loadtests.choice_servers import GRANIAN, REPLY, command
from loadtests.choices import Candidate, Plan
from loadtests.engine import FakeEngine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TINY = Plan(rounds=1, requests=64, parse_cpu_s=0.01)


def record(measured: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    machine = {"date": "today", "commit": "c0ffee", "cpu": "a CPU", "cores": 2, "kernel": "6", "python": "3"}
    plan = {"rounds": 3, "requests": 20_000, "parse_cpu_s": 1.0}
    run = {"command": "x", "plan": plan, "versions": {"uvicorn": "1.2"}, "left_out": [], "strictness": {}}
    return {**machine, **run, "measured": measured, **changes}


def found(kind: str, name: str, number: int, **cpu_us: float) -> dict[str, Any]:
    return {"kind": kind, "name": name, "round": number, "cpu_us": {k.replace("_", " "): v for k, v in cpu_us.items()}}


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("size_bytes", SIZES.values())
def test_conversation_is_of_the_size_asked_for_and_what_a_strict_parser_takes(size_bytes: int) -> None:
    body = conversation(size_bytes, 1)
    assert size_bytes <= len(body) <= 1.2 * size_bytes
    assert body == conversation(size_bytes, 1) != conversation(size_bytes, 2)
    assert b"\\n" in body
    assert b'\\"' in body
    assert not body.isascii()
    for read in PARSERS.values():
        read(body)


def test_our_parser_refuses_every_case_and_no_other_does() -> None:
    taken = {name: {case for case, accepted in cases.items() if accepted} for name, cases in strictness().items()}
    assert taken["gateway.body.parse"] == set()
    assert taken["orjson"] == {"duplicate key", "100 levels"}
    assert "invalid UTF-8" in taken["msgspec, dict of Raw"]  # why the ranges alone would not do
    assert taken["json"] > taken["orjson"]


def test_table_gives_medians_and_ranges_for_each_kind() -> None:
    measured = [found("parser", "orjson", n, **{"1_KB": n, "32_KB": 10 * n}) for n in (1, 2, 4)]
    measured += [found("client", "httpx2", n, **{"1_KB": 100 * n, "reply_bytes": 581}) for n in (1, 2, 4)]
    measured += [found("server", "uvicorn, h11, raw ASGI", 1, **{"1_KB": 90.04, "32_KB": 120})]
    text = choices.markdown(record(measured))
    assert row(text, "orjson") == ["orjson", "2.0 (1.0-4.0)", "20.0 (10.0-40.0)"]
    assert row(text, "httpx2") == ["httpx2", "200.0 (100.0-400.0)"]
    assert row(text, "uvicorn, h11, raw ASGI")[1:] == ["90.0", "120.0"]
    assert "| parser | 1 KB body | 32 KB body |" in text
    assert "uvicorn 1.2" in text
    assert "Not installed" not in text


def test_table_says_what_is_let_through_and_what_was_left_out() -> None:
    said = {"json": dict.fromkeys(CASES, True), "orjson": dict.fromkeys(CASES, False)}
    text = choices.markdown(record([], strictness=said, left_out=["aiohttp", GRANIAN]))
    assert row(text, "NaN") == ["NaN", "accepts", "refuses"]
    assert text.endswith("Not installed, so not measured: aiohttp, granian, raw ASGI.")


@pytest.mark.parametrize("name", CLIENTS)
async def test_each_client_gets_its_answers(name: str) -> None:
    if Candidate("client", name, "aiohttp" if name == "aiohttp" else None).missing:
        pytest.skip(f"{name} is not installed")
    async with FakeEngine(record=False) as engine:
        result = await load(CLIENTS[name], engine.url, requests=64, concurrency=8)
        assert engine.served == 64 + 8  # and the warm-up
    assert result["requests"] == 64
    assert result["cpu_us"] > 0
    assert result["reply_bytes"] > 300


async def test_a_client_that_gets_an_error_is_not_measured() -> None:
    async with FakeEngine(record=False, status=503) as engine:
        with pytest.raises(SystemExit, match="not every answer was good"):
            await load(CLIENTS["backends.http1"], engine.url, requests=8, concurrency=8)


@pytest.mark.parametrize("name", ["Tidegate's protocol edge", "Tidegate's ASGI edge", "uvicorn, httptools, Starlette"])
def test_a_server_is_measured(name: str, tmp_path: Path) -> None:
    assert len(REPLY) == 581
    assert set(choices.measure(Candidate("server", name), TINY, tmp_path)) == set(SIZES)


def test_granian_is_started_as_its_own_program() -> None:
    assert command(GRANIAN, 7500)[1:3] == ["-m", "granian"]
    assert "--port=7500" in command(GRANIAN, 7500)


def test_what_cannot_be_measured_is_a_problem_and_ends_nothing() -> None:
    measured, problems = choices.run([Candidate("server", "nonsense"), Candidate("parser", "orjson")], TINY)
    assert [each["name"] for each in measured] == ["orjson"]
    assert len(problems) == 1
    assert problems[0].startswith("nonsense, round 1: ")


def test_a_small_run_writes_the_figures_and_the_marked_part_of_a_page(tmp_path: Path) -> None:
    out, page = tmp_path / "choices.json", tmp_path / "adr.md"
    page.write_text(f"# A decision\n\nBefore.\n\n{choices.BEGIN}\nold\n{choices.END}\n\nAfter.\n")
    arguments = ["--quick", "--kinds", "parser", "--json", str(out), "--write", str(page)]
    assert choices.main(arguments) == 0
    assert {each["name"] for each in json.loads(out.read_text())["measured"]} == set(PARSERS)
    text = page.read_text()
    assert text.startswith("# A decision\n\nBefore.\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    assert row(text, "gateway.body.parse")[1:] != ["", ""]
