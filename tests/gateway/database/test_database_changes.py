"""Many writers and one reader: no change is ever skipped, no amount is lost or counted twice."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from gateway.database.database import Database
from gateway.database.errors import DatabaseUnavailable, InvalidValue
from gateway.database.spend import BATCHES_KEPT_S, PRUNED_EVERY_S
from gateway.database.tables import spend_batches
from gateway.keys.records import KeyRecord, TenantRecord
from tests.gateway.database.making import key
from tests.support.process import ROOT, environment

WRITER = """
import sys
from gateway.database.database import Database
from tests.gateway.database.making import key
database = Database.open(sys.argv[1])
for number in range(int(sys.argv[2])):
    stored = database.keys.create(key(), "writer")
    database.keys.update(stored.id, {"name": str(number)}, "writer")
    database.spend.add(stored.id, {("all", "d20261122"): 1})
database.close()
"""


def _together(work: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def test_reader_never_misses_a_change(url: str, database: Database) -> None:
    """Eight threads and two processes write; a reader that applies what it is told must end with what is there."""
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, "10"], env=environment(), cwd=ROOT) for _ in range(2)
    ]
    shared = database.keys.create(key(), "me").id
    done = threading.Event()
    seen: dict[str, KeyRecord] = {}
    tenants: dict[str, TenantRecord] = {}
    versions = [0]

    def read() -> None:
        changes = database.keys.changed_since(versions[-1])
        assert changes.version >= versions[-1]
        seen.update((each.id, each) for each in changes.keys)
        tenants.update((each.name, each) for each in changes.tenants)
        for id in changes.gone:
            seen.pop(id, None)
        versions.append(changes.version)

    def follow() -> None:
        while not done.is_set():
            read()

    def write(worker: int) -> None:
        rng = random.Random(worker)
        mine: list[str] = []
        for number in range(12):
            choice = rng.random()
            if choice < 0.4 or not mine:
                mine.append(database.keys.create(key(), f"w{worker}").id)
            elif choice < 0.6:
                database.keys.update(rng.choice([*mine, shared]), {"name": f"{worker}/{number}"}, f"w{worker}")
            elif choice < 0.8:
                database.keys.remove(mine.pop(), f"w{worker}")
            else:
                database.tenants.put(TenantRecord(f"t{worker}", weight=1.0 + number), f"w{worker}")

    follower = threading.Thread(target=follow)
    follower.start()
    _together(write, 8)
    assert [process.wait(60) for process in processes] == [0, 0]
    done.set()
    follower.join()
    read()
    assert seen == {each.id: each for each in database.keys.list()}
    assert tenants == {each.name: each for each in database.tenants.list()}
    assert database.audit.missing() == ()
    assert versions[-1] == database.audit.list(1)[0].id  # each change is one version and one entry
    assert database.spend.totals([("all", "d20261122")]) == {("all", "d20261122"): 20}


def test_version_is_taken_in_the_order_of_commits(database: Database) -> None:
    """A change that has its version and is not committed yet holds up the next one, which would hide it."""
    stored = database.keys.create(key(), "me")
    entered, leave = threading.Event(), threading.Event()
    commits: list[str] = []

    @event.listens_for(database._engine._engine, "commit")
    def _slowly(connection: sa.Connection) -> None:
        if not entered.is_set():
            entered.set()
            assert leave.wait(20)
        commits.append("commit")

    first = threading.Thread(target=database.keys.update, args=(stored.id, {"name": "first"}, "a"))
    first.start()
    assert entered.wait(20)
    second = threading.Thread(target=database.keys.create, args=(key(), "b"))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert database.keys.changed_since(1).version == 1
    leave.set()
    first.join()
    second.join()
    assert [each.name for each in database.keys.changed_since(1).keys] in (["first", ""], ["", "first"])


def test_spend_is_exact_and_counts_a_batch_once(database: Database) -> None:
    holders = [(f"{{acme}}:key:{number}", "d20261122") for number in range(10)]

    def work(worker: int) -> None:
        for number in range(6):
            chosen = random.Random(number).sample(holders, 6)
            batch = f"{worker % 4}-{number}"  # two threads send each batch at about the same time
            database.spend.add(batch, {holder: 7 for holder in chosen})

    _together(work, 8)
    expected = dict.fromkeys(holders, 0)
    for number in range(6):
        for holder in random.Random(number).sample(holders, 6):
            expected[holder] += 4 * 7
    assert database.spend.totals(holders) == expected
    assert database.spend.of_period("d20261122") == {scope: n for (scope, _), n in expected.items() if n}


def test_batch_whose_outcome_is_unknown_is_sent_again(database: Database) -> None:
    """The commit happens and its answer is lost; then it is lost before it happens. Both times the same batch again."""
    holder = ("{acme}:tenant", "m202611")
    lost: list[str] = []
    real = database._engine._engine.dialect.do_commit

    def commit(connection: object) -> None:
        when = lost.pop() if lost else None
        if when != "before":
            real(connection)  # type: ignore[arg-type]
        if when is not None:
            raise sa.exc.OperationalError("COMMIT", None, Exception("the connection was lost"))

    database._engine._engine.dialect.do_commit = commit  # type: ignore[assignment,method-assign]
    for number, moment in ((1, "after"), (2, "before")):
        lost.append(moment)
        with pytest.raises(DatabaseUnavailable):
            database.spend.add(f"batch {number}", {holder: 100})
        assert database.spend.add(f"batch {number}", {holder: 100}) == (number == 2)
        assert not database.spend.add(f"batch {number}", {holder: 100})
    assert database.spend.totals([holder]) == {holder: 200}


def test_many_holders_go_in_one_batch(database: Database) -> None:
    deltas = {(f"{{t}}:key:{number}", "d20261122"): number for number in range(1500)}
    assert database.spend.add("big", deltas)
    assert database.spend.totals([*deltas, ("unknown", "d1")]) == {**deltas, ("unknown", "d1"): 0}


def test_batch_ids_are_forgotten_after_a_day(url: str) -> None:
    now = [1e9]
    database = Database.open(url, clock=lambda: now[0])
    database.spend.add("old", {("a", "d1"): 1})
    now[0] += BATCHES_KEPT_S - 1
    assert not database.spend.add("old", {("a", "d1"): 1})
    now[0] += PRUNED_EVERY_S
    database.spend.add("new", {})
    with database._engine.read() as connection:
        assert connection.execute(sa.select(spend_batches.c.id)).scalars().all() == ["new"]
    database.close()


def test_rows_of_users_go_forty_days_after_their_period_and_no_others(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users' names are the clients' to invent; what is on record of keys, tenants and models stays."""
    monkeypatch.setattr("gateway.database.spend.PRUNED_AT_ONCE", 4)
    now = datetime(2026, 11, 21, 23, 59, 30, tzinfo=UTC).timestamp()
    database = Database.open(url, clock=lambda: now)
    user, other = "{t:acme}:u:0123456789abcdef", "{t:acme}:u:fedcba9876543210"
    kept = [
        (user, "d20261012"),  # ended 40 days ago in half a minute
        (user, "m202610"),
        ("{t:acme}:t", "d20200101"),
        ("{t:acme}:k:key_ab", "m202001"),
        ("{t:acme}:m:x}:u:0123456789abcdef", "d20200101"),
        ("{m:x}:u:0123456789abc}:m", "d20200101"),
    ]
    gone = [(each, f"d202001{day:02}") for each in (user, other) for day in range(1, 5)]
    gone += [(user, "d20261011"), (user, "m202609")]
    assert database.spend.add("all", dict.fromkeys([*kept, *gone], 5))
    for number in range(2):  # a few at a time, and no waiting while there are more
        assert database.spend.add(f"batch {number}", {})
    found = database.spend.totals([*kept, *gone])
    assert {key for key, micros in found.items() if micros} == set(kept)
    database.close()


@pytest.mark.parametrize(
    ("batch", "scope", "period", "micros"),
    [("", "s", "d1", 1), ("b", "", "d1", 1), ("b", "s", "", 1), ("b", "s", "d1", -1), ("b", "s", "d1", 10**16),
     ("b", "s\0", "d1", 1), ("b\0", "s", "d1", 1), ("b", "s", "d1", True), ("b", "s", "d 1", 1)],
)  # fmt: skip
def test_wrong_spend_is_refused(sqlite_database: Database, batch: str, scope: str, period: str, micros: int) -> None:
    with pytest.raises(InvalidValue):
        sqlite_database.spend.add(batch, {(scope, period): micros, ("other", "d1"): 1})
    assert sqlite_database.spend.totals([("other", "d1")]) == {("other", "d1"): 0}


def test_several_processes_open_a_new_database_at_once(url: str) -> None:
    ready = "import sys; from gateway.database.database import Database; import alembic.command; sys.stdin.read();"
    work = "database = Database.open(sys.argv[1]); database.tenants.list(); database.close()"
    processes = [
        subprocess.Popen([sys.executable, "-c", ready + work, url], env=environment(), cwd=ROOT, stdin=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0] * 3


def test_threads_open_a_new_database_at_once(url: str) -> None:
    def work(_: int) -> None:
        Database.open(url).close()

    _together(work, 6)


def test_restart_keeps_everything(url: str, tmp_path: Path) -> None:
    first = Database.open(url)
    stored = first.keys.create(key(name="kept"), "me")
    acme = first.tenants.put(TenantRecord("acme", 2.0), "me")
    first.spend.add("b", {("s", "d1"): 5})
    entries = first.audit.list()
    first.close()
    started = time.monotonic()
    again = Database.open(url)
    assert time.monotonic() - started < 10
    assert again.keys.changed_since(0).keys == (stored,)
    assert again.tenants.list() == (acme,)
    assert again.spend.totals([("s", "d1")]) == {("s", "d1"): 5}
    assert again.audit.list() == entries
    assert not again.spend.add("b", {("s", "d1"): 5})
    again.close()
