"""The audit of everything that operators do: where it is kept, what is never in it, and what is missed."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import SecretStr

from gateway.admin import audit
from gateway.admin.audit import FILE, AuditLog, Wanted
from gateway.admin.audit_text import MAX_DIFF_BYTES, STARS, cleaned, printable
from gateway.database.database import Database
from gateway.keys.format import mint
from gateway.sources import AdapterChange
from tests.support.admin_desk import OPERATOR, OWNER, READER, admin_side, bearer
from tests.support.client import until


async def test_a_gateway_without_keys_has_an_audit_in_its_state_directory(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    log = AuditLog(state_dir=folder)
    assert not folder.exists()  # nothing is made before there is something to write
    await log.note(None, "reload", "configuration", {"models": [1, 2]})
    await log.note(None, "reload", "configuration", {})
    assert log.unwritten == 0
    entries = await log.list(Wanted())
    assert [(each.id, each.actor, each.action, each.diff) for each in entries] == [
        (2, "gateway", "reload", {}),
        (1, "gateway", "reload", {"models": [1, 2]}),
    ]
    assert (folder / FILE).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    await log.aclose()
    again = AuditLog(state_dir=folder)
    assert len(await again.list(Wanted())) == 2
    await again.aclose()


async def test_a_gateway_with_keys_has_it_beside_them(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path}/keys.db")
    log = AuditLog(lambda: database, tmp_path / "state")
    await log.note(None, "replica.drain", "pool/pool-0", {"draining": [False, True]})
    assert [each.action for each in database.audit.list()] == ["replica.drain"]
    assert not (tmp_path / "state").exists()
    await log.aclose()
    database.close()


async def test_nothing_is_changed_or_taken_out_unnoticed(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        for index in range(6):
            await side.desk.audit.note(None, "thing.done", str(index), {})
        with sqlite3.connect(tmp_path / FILE) as own:
            for statement in ("DELETE FROM tidegate_audit", "UPDATE tidegate_audit SET actor = 'x'"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    own.execute(statement)
        answer = (await side.client.get("/admin/audit", headers=bearer(READER))).json()
        assert answer["missing"] == []
        with sqlite3.connect(tmp_path / FILE) as own:  # whoever owns the file can do what they like
            own.execute("DROP TRIGGER tidegate_audit_delete")
            own.execute("DELETE FROM tidegate_audit WHERE id IN (2, 3, 6)")
        own.close()
        answer = (await side.client.get("/admin/audit", headers=bearer(READER))).json()
        assert answer["missing"] == [[2, 3], [6, 6]]
        await side.desk.audit.note(None, "thing.done", "7", {})
        answer = (await side.client.get("/admin/audit?limit=1", headers=bearer(READER))).json()
        assert (answer["missing"], answer["has_more"], answer["unwritten"]) == ([[2, 3], [6, 6]], True, 0)


async def test_what_cannot_be_written_yet_is_written_later_and_said_so(tmp_path: Path) -> None:
    away = tmp_path / "state"
    away.write_text("not a directory")
    log = AuditLog(state_dir=away)
    await log.note(None, "replica.drain", "pool/a", {})
    await log.note(None, "replica.drain", "pool/b", {})
    assert log.unwritten == 2
    away.unlink()
    await log.note(None, "replica.drain", "pool/c", {})
    assert log.unwritten == 0
    assert [each.object for each in await log.list(Wanted())] == ["pool/c", "pool/b", "pool/a"]
    await log.aclose()


async def test_a_database_that_says_nothing_keeps_nobody_waiting_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "WRITTEN_WITHIN_S", 0.5)
    log = AuditLog(state_dir=tmp_path)
    await log.note(None, "thing.done", "first", {})
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began_at = time.monotonic()
        await asyncio.gather(*(log.note(None, "thing.done", str(index), {}) for index in range(8)))
        assert time.monotonic() - began_at < 4  # the lock is waited for 5 s, each time
        assert log.unwritten >= 7
        other.execute("COMMIT")
    await until(lambda: log._writing is None)
    monkeypatch.undo()
    await log.note(None, "thing.done", "last", {})
    assert log.unwritten == 0
    assert len(await log.list(Wanted())) == 10
    await log.aclose()


async def test_what_waits_is_tried_once_more_at_the_end(tmp_path: Path) -> None:
    away = tmp_path / "state"
    away.write_text("not a directory")
    log = AuditLog(state_dir=away)
    await log.note(None, "replica.drain", "pool/a", {})
    away.unlink()
    await log.aclose()
    again = AuditLog(state_dir=away)
    assert [each.object for each in await again.list(Wanted())] == ["pool/a"]
    await again.aclose()


async def test_what_is_being_written_is_not_what_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_WAITING", 3)
    database = Database.open(f"sqlite:///{tmp_path}/keys.db")
    asked, go = threading.Event(), threading.Event()

    def slow() -> Database:
        asked.set()
        assert go.wait(15)
        return database

    log = AuditLog(slow)
    notes = [asyncio.create_task(log.note(None, "thing.done", "0", {}))]
    await asyncio.to_thread(asked.wait, 15)
    notes += [asyncio.create_task(log.note(None, "thing.done", str(index), {})) for index in range(1, 6)]
    await until(lambda: log.unwritten >= 5)
    go.set()
    await asyncio.gather(*notes)
    assert [each.object for each in await log.list(Wanted())] == ["5", "4", "3", "0"]
    assert log.unwritten == 2
    await log.aclose()
    database.close()


async def test_without_any_place_nothing_fails_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_WAITING", 3)
    log = AuditLog()
    for index in range(5):
        await log.note(None, "thing.done", str(index), {})
    assert log.unwritten == 5
    assert len(log._waiting) == 3
    await log.aclose()


async def test_any_number_of_failed_logins_makes_two_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "FAILURES_EVERY_S", 0.2)
    log = AuditLog(state_dir=tmp_path)
    for index in range(500):
        log.failed_login(f"10.0.0.{index % 50}")
    await until(lambda: log._failed_timer is None and not log._tasks)
    late, first = await log.list(Wanted())
    assert (first.actor, first.action, first.object, first.diff) == ("nobody", "login.failed", "10.0.0.0", {"count": 1})
    assert late.diff["count"] == 499
    assert len(late.diff["addresses"]) == audit.MAX_ADDRESSES_SHOWN + 1
    log.failed_login("10.0.0.1")
    log.failed_login("10.0.0.1")
    await log.aclose()  # what is still counted is written at the end
    again = AuditLog(state_dir=tmp_path)
    assert len(await again.list(Wanted())) == 4
    await again.aclose()


# -- over HTTP


async def test_one_finds_entries_by_actor_action_and_object(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        await side.logged_in(OPERATOR)
        for action, subject in (("replica.drain", "pool/a_b"), ("replica.undrain", "pool/a_b"), ("reload", "100%")):
            await side.desk.audit.note(None, action, subject, {})

        async def found(query: str) -> list[str]:
            answer = await side.client.get(f"/admin/audit?{query}", headers=bearer(READER))
            assert answer.status_code == 200, answer.text
            return [each["action"] for each in answer.json()["data"]]

        assert await found("") == ["reload", "replica.undrain", "replica.drain", "login"]
        assert await found("action=replica.") == ["replica.undrain", "replica.drain"]
        assert await found("actor=OLGA") == ["login"]
        assert await found("object=A_B&limit=1") == ["replica.undrain"]
        assert await found("object=a%25b") == []  # what it looks like to LIKE is text here
        assert await found("object=a%5fb&before=3") == ["replica.drain"]
        assert await found("object=100%25") == ["reload"]
        assert await found("object=%00") == []
        for query in ("limit=0", "limit=1001", "limit=x", "before=x", "before=-1", f"actor={'x' * 201}"):
            refused = await side.client.get(f"/admin/audit?{query}", headers=bearer(READER))
            assert refused.status_code == 400, query


async def test_pages_follow_each_other_without_gap_or_overlap(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        for index in range(25):
            await side.desk.audit.note(None, "thing.done", str(index), {})
        seen: list[int] = []
        query = "limit=10"
        while True:
            page = (await side.client.get(f"/admin/audit?{query}", headers=bearer(READER))).json()
            seen += [each["id"] for each in page["data"]]
            if not page["has_more"]:
                break
            query = f"limit=10&before={seen[-1]}"
        assert seen == list(range(25, 0, -1))


async def test_the_actor_is_who_was_let_in_and_whom_a_token_says_to_act_for(tmp_path: Path) -> None:
    async with admin_side(tmp_path) as side:
        said = {"x-tidegate-actor": "jo"}
        session = await side.logged_in()
        for headers in (bearer(OWNER), {**bearer(OWNER), **said}, {**session, **said}):
            await side.client.delete("/admin/sessions", headers=headers)
            if headers == bearer(OWNER):
                session |= await side.logged_in()
        data = (await side.client.get("/admin/audit?action=sessions.end", headers=bearer(OWNER))).json()["data"]
        assert [each["actor"] for each in data][-2:] == ["admin:jo", "admin"]
        later = await side.logged_in()
        await side.client.delete("/admin/sessions", headers={**later, **said})
        data = (await side.client.get("/admin/audit?action=sessions.end", headers=bearer(OWNER))).json()["data"]
        assert data[0]["actor"] == "session:admin"
        refused = await side.client.delete("/admin/sessions", headers={**bearer(OWNER), "x-tidegate-actor": "x" * 65})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_header")


async def test_an_audit_that_cannot_be_read_is_503(tmp_path: Path) -> None:
    away = tmp_path / "state"
    away.write_text("not a directory")
    async with admin_side(away) as side:
        answer = await side.client.get("/admin/audit", headers=bearer(READER))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_unavailable")


# -- what may stand in an entry


def test_no_secret_is_written_down_whatever_it_is_called() -> None:
    key = mint()
    diff: dict[str, Any] = {
        "admin": {"token": "canary-1", "tokens": {"ci": {"role": "reader", "token": SecretStr("canary-2")}}},
        "api_keys": ["canary-3"],
        "password": ["canary-4", None],
        "Authorization": "canary-5",
        "digest": b"canary-6",
        "name": ["a", key],
        "note": f"use {key} please",
        "change": AdapterChange("pool", "name", "sk-proj-" + "a1B2" * 12),
        "max_output_tokens": [1, 2],
        "limits": {"tokens_per_minute": [10, 20]},
    }
    written = json.dumps(cleaned(diff))
    assert "canary" not in written
    assert key not in written
    assert "a1B2" not in written
    assert cleaned(diff)["max_output_tokens"] == [1, 2]
    assert cleaned(diff)["limits"] == {"tokens_per_minute": [10, 20]}
    assert cleaned(diff)["admin"]["token"] == STARS


def test_what_is_too_large_or_too_deep_or_no_data_is_cut_and_never_raises() -> None:
    deep: Any = 0
    for _ in range(100):
        deep = [deep]
    loop: dict[str, Any] = {}
    loop["again"] = loop
    for value in (deep, loop, "x" * 10**6, list(range(10**5)), object(), float("nan"), {1: {2: 3}}, "\ud800"):
        found = cleaned({"field": value})
        assert len(msgspec.json.encode(found)) <= MAX_DIFF_BYTES
    large = cleaned({f"field-{index}": "y" * 4000 for index in range(100)})
    assert set(large) == {"not_kept", "fields"}


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31mred", "\u202edesrever", "\0", "", "x" * 10_000, "a key", "\ud800"])
def test_a_name_is_one_line_of_bounded_length(text: str) -> None:
    text = mint() if text == "a key" else text
    shown = printable(text)
    assert shown.isprintable()
    assert 1 <= len(shown) <= 200
    assert text not in shown or text == ""
