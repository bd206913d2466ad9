"""Keys that change in a real database while a gateway runs: seen in time, and survived when it is away."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.database.answers import Changes
from gateway.database.database import Database
from gateway.database.errors import DatabaseUnavailable
from gateway.errors import GatewayError
from gateway.keys.directory import Directory, Freshness
from gateway.keys.format import mint
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.keys.sync import KeySync, Read
from tests.gateway.keys.records_of_tests import PEPPER, bearing, made
from tests.support.client import until as wait_until
from tests.support.command import PATIENCE_S, run_tidegate
from tests.support.postgres import Postgres, Unavailable, running_postgres


class Clock:
    """Real seconds, and those that a test has let pass."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.passed_s


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(f"sqlite:///{tmp_path / 'keys.db'}")
    yield opened
    opened.close()


@asynccontextmanager
async def following(read: Read, **options: Any) -> AsyncIterator[tuple[Directory, KeySync]]:
    directory = Directory(PEPPER)
    sync = KeySync(directory, read, **options)
    sync.start()
    try:
        yield directory, sync
    finally:
        await sync.aclose()


async def until(condition: Callable[[], object]) -> None:
    await wait_until(condition, PATIENCE_S)


def status(directory: Directory, key: str) -> int:
    """What a request with this key is answered with."""
    try:
        directory.authenticate(bearing(key), time.time())
    except GatewayError as error:
        return error.status
    return 200


async def test_what_was_there_is_known_after_the_first_load(database: Database) -> None:
    key, record = made()
    database.tenants.put(TenantRecord("acme", weight=3.0), "test")
    database.keys.create(record, "test")
    async with following(database.keys.changed_since) as (directory, sync):
        assert status(directory, key) == 503  # it is asked for, and nobody knows yet
        assert await sync.first_load(PATIENCE_S)
        principal = directory.authenticate(bearing(key), time.time())
        assert (principal.key_id, principal.tenant.weight) == (record.id, 3.0)
        assert status(directory, mint()) == 401
        assert sync.keys_known == 1
        age_s = sync.age_s()
        assert age_s is not None
        assert age_s < PATIENCE_S


async def test_changes_are_followed_one_by_one(database: Database) -> None:
    key, record = made()
    async with following(database.keys.changed_since, poll_s=0.02) as (directory, sync):
        assert await sync.first_load(PATIENCE_S)
        database.keys.create(record, "test")
        await until(lambda: status(directory, key) == 200)
        database.keys.update(record.id, {"disabled": True}, "test")
        await until(lambda: status(directory, key) == 401)
        database.keys.update(record.id, {"disabled": False}, "test")
        await until(lambda: status(directory, key) == 200)
        database.tenants.put(TenantRecord("acme", disabled=True), "test")
        await until(lambda: status(directory, key) == 401)
        database.tenants.put(TenantRecord("acme"), "test")
        await until(lambda: status(directory, key) == 200)
        database.keys.remove(record.id, "test")
        await until(lambda: status(directory, key) == 401)
        assert sync.counts.failures == 0
        assert sync.counts.changes == 6


async def test_a_key_disabled_by_another_process_is_refused_within_a_second(database: Database, tmp_path: Path) -> None:
    key, record = made()
    database.keys.create(record, "test")
    environ = {"TIDEGATE_DATABASE": f"sqlite:///{tmp_path / 'keys.db'}"}
    async with following(database.keys.changed_since) as (directory, sync):
        assert await sync.first_load(PATIENCE_S)
        assert status(directory, key) == 200
        command = asyncio.create_task(run_tidegate("keys", "disable", record.id, environ=environ))
        while (audit := database.audit.list(1)) and audit[0].action != "key.disable":
            await asyncio.sleep(0.01)
            assert not command.done() or command.result()[0] == 0, command.result()
        committed = time.monotonic()
        await until(lambda: status(directory, key) == 401)
        assert time.monotonic() - committed < 1.0
        assert (await command)[0] == 0


async def test_a_nudge_wakes_the_reading_at_once(database: Database) -> None:
    key, record = made()
    async with following(database.keys.changed_since, poll_s=3600.0) as (directory, sync):
        assert await sync.first_load(PATIENCE_S)
        database.keys.create(record, "test")
        sync.nudge()
        await until(lambda: status(directory, key) == 200)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    try:
        with running_postgres() as started:
            yield started
    except Unavailable as reason:
        pytest.skip(str(reason))


async def test_a_postgresql_that_goes_and_comes_back_is_survived_in_stages(
    server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.keys")
    key, record = made()
    later, of_later = made()
    clock = Clock()
    database = Database.open(server.url())
    database.keys.create(record, "test")
    async with following(database.keys.changed_since, poll_s=0.02, clock=clock) as (directory, sync):
        assert await sync.first_load(PATIENCE_S)
        await asyncio.to_thread(server.stop)
        await until(lambda: sync.counts.failures > 3)
        assert (status(directory, key), status(directory, mint())) == (200, 401)
        clock.passed_s += 5.0
        await until(lambda: directory.freshness is Freshness.AGED)
        assert (status(directory, key), status(directory, mint())) == (200, 503)
        clock.passed_s += 900.0
        await until(lambda: directory.freshness is Freshness.STALE)
        assert (status(directory, key), status(directory, mint())) == (503, 503)
        await asyncio.to_thread(server.start)
        await until(lambda: directory.freshness is Freshness.CURRENT)
        assert (status(directory, key), status(directory, mint())) == (200, 401)
        database.keys.create(of_later, "test")
        await until(lambda: status(directory, later) == 200)
    database.close()
    assert [each.levelname for each in caplog.records] == ["INFO", "WARNING", "WARNING", "ERROR", "INFO", "INFO"]
    assert f"127.0.0.1:{server.port}" in caplog.messages[1]


async def test_a_postgresql_that_freezes_piles_nothing_up(server: Postgres) -> None:
    key, record = made()
    database = Database.open(server.url(), within_s=1.0)
    database.keys.create(record, "test")
    async with following(database.keys.changed_since, poll_s=0.02) as (directory, sync):
        assert await sync.first_load(PATIENCE_S)
        server.freeze()
        try:
            await until(lambda: sync.counts.failures > 0)
            assert [each.name for each in threading.enumerate()].count("keys") == 1
            assert status(directory, key) == 200
        finally:
            server.thaw()
        database.keys.update(record.id, {"disabled": True}, "test")
        await until(lambda: status(directory, key) == 401)
    database.close()


async def test_a_database_that_hangs_takes_one_thread_and_ends_with_the_process() -> None:
    clock, hanging, entered = Clock(), threading.Event(), 0
    key, record = made()

    def read(version: int) -> Changes:
        nonlocal entered
        entered += 1
        if entered > 1:
            hanging.wait(PATIENCE_S * 3)
        return Changes(1, keys=(record,), complete=True)

    before = set(threading.enumerate())
    async with following(read, poll_s=0.01, clock=clock) as (directory, sync):
        assert await sync.first_load(PATIENCE_S)
        await until(lambda: entered == 2)
        for _ in range(20):
            sync.nudge()
            await asyncio.sleep(0.01)
        assert entered == 2
        assert len(set(threading.enumerate()) - before) == 1
        assert sync._thread is not None
        assert sync._thread.daemon
        clock.passed_s = 6.0  # judged although the thread hangs
        await until(lambda: directory.freshness is Freshness.AGED)
        assert (status(directory, key), status(directory, mint())) == (200, 503)
        hanging.set()
        await until(lambda: directory.freshness is Freshness.CURRENT)


async def test_a_reading_that_ends_after_the_close_changes_nothing() -> None:
    hanging, read_one = threading.Event(), threading.Event()
    key, record = made()

    def read(version: int) -> Changes:
        read_one.set()
        hanging.wait(PATIENCE_S)
        return Changes(1, keys=(record,), complete=True)

    async with following(read) as (directory, sync):
        assert await asyncio.to_thread(read_one.wait, PATIENCE_S)
        assert not await sync.first_load(0.01)
        closing = asyncio.create_task(sync.aclose())
        await asyncio.sleep(0)
        hanging.set()
        await closing
    assert len(directory) == 0
    assert status(directory, key) == 503


async def test_a_database_that_was_put_back_is_read_whole() -> None:
    """An earlier version number: what was known of the later time is forgotten."""
    (key, record), (other, another) = made(), made()
    states = [
        Changes(7, keys=(record, another), complete=True),
        Changes(3, keys=(another,), complete=True),
    ]
    asked: list[int] = []

    def read(version: int) -> Changes:
        asked.append(version)
        return states[min(len(asked), len(states)) - 1]

    async with following(read, poll_s=0.01) as (directory, sync):
        await until(lambda: len(asked) > 2)
        assert asked[:3] == [0, 7, 3]
        await until(lambda: status(directory, key) == 401)
        assert status(directory, other) == 200
        assert sync.keys_known == 1


async def test_a_failure_is_told_in_the_databases_words_and_once(caplog: pytest.LogCaptureFixture) -> None:
    records: tuple[KeyRecord, ...] = ()

    def read(version: int) -> Changes:
        if not records:
            raise DatabaseUnavailable("postgresql://db/tidegate", "connection refused")
        return Changes(1, keys=records, complete=True)

    async with following(read, poll_s=0.01) as (directory, sync):
        await until(lambda: sync.counts.failures > 3)
        assert not await sync.first_load(0.01)
        assert sync.age_s() is None
        key, record = made()
        assert status(directory, key) == 503
        records = (record,)
        assert await sync.first_load(PATIENCE_S)
        assert status(directory, key) == 200
    said = [each for each in caplog.messages if "connection refused" in each]
    assert len(said) == 1
    assert "postgresql://db/tidegate" in said[0]
