"""`tidegate requests`: what it asks, what it says, and its exit codes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.commands.request_options import FILTERS
from gateway.inspection.query import PARAMETERS
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from tests.gateway.inspection.test_inspection_processes import STREAM, Running, running


class Terminal:
    """Where an operator of a gateway types."""

    def __init__(self, gateway: Running, capsys: pytest.CaptureFixture[str]) -> None:
        self._url = gateway.admin_url
        self._capsys = capsys
        self.out = ""
        self.err = ""

    async def run(self, *arguments: str) -> int:
        code = await asyncio.to_thread(main, ["requests", *arguments, "--url", self._url])
        self.out, self.err = self._capsys.readouterr()
        return code


async def test_requests_are_listed_shown_and_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeEngine(chunks=3) as engine, running(tmp_path, [engine.url], 1) as gateway:
        monkeypatch.setenv("TIDEGATE_ADMIN__TOKEN", gateway.gateway.token)
        terminal = Terminal(gateway, capsys)
        await gateway.ask(STREAM)
        await gateway.ask({**STREAM, "model": "nobody"})
        (refused, answered) = await gateway.settled(2)

        assert await terminal.run("list") == 0
        assert "completed 200" in terminal.out
        assert "rejected 404" in terminal.out
        assert await terminal.run("list", "--outcome", "rejected", "--json") == 0
        assert [row["id"] for row in json.loads(terminal.out)["settled"]] == [refused["id"]]
        assert await terminal.run("list", "--limit", "1") == 0
        assert await terminal.run("list", "--before", terminal.err.split()[-1]) == 0
        assert answered["id"] in terminal.out
        assert refused["id"] not in terminal.out

        assert await terminal.run("show", answered["id"]) == 0
        for word in ("first_token", "pool/pool-0", "CANDIDATE", "DECODE"):
            assert word in terminal.out
        assert await terminal.run("show", answered["id"], "--json") == 0
        assert json.loads(terminal.out)["record"]["id"] == answered["id"]
        assert await terminal.run("show", "req_nobody") == 2

        engine.script = Behaviour(hang_mid=1)
        asking = asyncio.create_task(gateway.ask(STREAM))
        (live,) = await gateway.live()
        assert await terminal.run("list", "--live") == 0
        assert live["id"] in terminal.out
        assert answered["id"] not in terminal.out
        assert await terminal.run("show", live["id"]) == 0
        assert "under way" in terminal.out
        assert await terminal.run("kill", live["id"]) == 0
        assert "ended_by_operator" in (await asking).text
        assert await terminal.run("kill", live["id"], "--json") == 1
        assert "over already" in json.loads(terminal.out)["error"]
        assert await terminal.run("list", "--status", "sunny") == 2


def test_the_command_has_every_filter_of_the_api() -> None:
    assert {name.replace("-", "_") for name in FILTERS} == PARAMETERS.keys() - {"live", "limit"}
