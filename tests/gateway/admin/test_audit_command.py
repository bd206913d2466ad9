"""`tidegate audit` against a real admin listener."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from gateway.admin.audit import FILE
from gateway.cli import main
from tests.support.admin_desk import OWNER, READER, AdminSide, admin_side


async def run(side: AdminSide, token: Path, *arguments: str) -> int:
    command = ["audit", "--url", side.url, "--token-file", str(token), *arguments]
    return await asyncio.to_thread(main, command)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(READER)
    return file


async def test_it_lists_the_newest_entries(tmp_path: Path, token: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with admin_side(tmp_path) as side:
        await side.desk.audit.note(None, "replica.drain", "pool/pool-0", {"draining": [False, True]})
        await side.desk.audit.note(None, "thing.done", "x", {"note": "\x1b[31mred\u202e"})
        assert await run(side, token) == 0
        printed = capsys.readouterr().out
        assert printed.isascii() or "\x1b" not in printed
        lines = printed.splitlines()
        assert lines[0].split() == ["ID", "TIME", "ACTOR", "ACTION", "OBJECT", "CHANGE"]
        assert "\x1b" not in printed
        assert "\u202e" not in printed
        assert lines[2].startswith("1 ")
        assert lines[2].endswith("replica.drain  pool/pool-0  draining: false -> true")
        assert await run(side, token, "--json", "--limit", "1", "--action", "replica.") == 0
        said = json.loads(capsys.readouterr().out)
        assert [each["id"] for each in said["data"]] == [1]
        assert (said["missing"], said["unwritten"]) == ([], 0)


async def test_more_than_a_page_is_asked_for_page_by_page(
    tmp_path: Path, token: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.commands.audit.PAGE", 3)
    async with admin_side(tmp_path) as side:
        for index in range(8):
            await side.desk.audit.note(None, "thing.done", str(index), {})
        for wanted in (7, 8, 100):
            assert await run(side, token, "--json", "--limit", str(wanted)) == 0
            ids = [each["id"] for each in json.loads(capsys.readouterr().out)["data"]]
            assert ids == list(range(8, 8 - min(wanted, 8), -1))


@pytest.fixture
def another(tmp_path: Path) -> Path:
    file = tmp_path / "another"
    file.write_text(OWNER + "x")
    return file


async def test_verify_fails_when_entries_were_taken_out(
    tmp_path: Path, token: Path, another: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with admin_side(tmp_path) as side:
        assert await run(side, token, "--verify") == 0
        assert "no entries" in capsys.readouterr().out
        for index in range(4):
            await side.desk.audit.note(None, "thing.done", str(index), {})
        assert await run(side, token, "--verify") == 0
        assert "no entry is missing, from the first to 4" in capsys.readouterr().out
        with sqlite3.connect(tmp_path / FILE) as own:
            own.execute("DROP TRIGGER tidegate_audit_delete")
            own.execute("DELETE FROM tidegate_audit WHERE id = 2")
        own.close()
        assert await run(side, token, "--verify") == 1
        assert "entry 2 was there and no longer is" in capsys.readouterr().err
        assert await run(side, token, "--verify", "--json") == 1
        assert json.loads(capsys.readouterr().out) == {"ok": False, "missing": [[2, 2]], "unwritten": 0}
        assert await run(side, another) == 2
