"""The lease of the one gateway that uses a database without a shared store."""

from __future__ import annotations

import threading

import msgspec
import pytest
import sqlalchemy as sa

from gateway.database.database import Database
from gateway.database.errors import DatabaseInvalid
from gateway.database.rows import key_values
from gateway.database.sole import LEASE_S, Holder
from gateway.database.tables import sole
from tests.gateway.database.making import key

ONE = Holder("gw_one", "host-1", 11, "kernel-1", 5)
OTHER = Holder("gw_other", "host-2", 22, "kernel-2", 6)


def _age(database: Database, seconds: float) -> None:
    """As if the last renewal had been so long ago."""
    with database.sole._engine.write() as connection:
        connection.execute(sole.update().values(renewed_unix_s=sole.c.renewed_unix_s - seconds))


def test_the_second_is_told_who_has_it_until_that_one_gives_it_up(database: Database) -> None:
    assert database.sole.take(ONE) is None
    assert database.sole.take(ONE) is None
    found = database.sole.take(OTHER)
    assert found is not None
    assert found.since_unix_s > 1e9
    assert found == msgspec.structs.replace(ONE, since_unix_s=found.since_unix_s, renewals=1)
    database.sole.give_up(OTHER.gateway)
    assert database.sole.take(OTHER) is not None
    database.sole.give_up(ONE.gateway)
    assert database.sole.take(OTHER) is None
    taken = database.sole.take(ONE)
    assert taken is not None
    assert taken.gateway == OTHER.gateway


def test_a_lease_that_ran_out_is_taken(database: Database) -> None:
    database.sole.take(ONE)
    _age(database, LEASE_S - 6)
    assert database.sole.take(OTHER) is not None
    _age(database, 7)
    assert database.sole.take(OTHER) is None
    assert database.sole.take(ONE) is not None


def test_a_renewal_keeps_when_it_was_taken_and_makes_it_last(database: Database) -> None:
    database.sole.take(ONE)
    first = database.sole.take(OTHER)
    _age(database, LEASE_S - 1)
    database.sole.take(ONE)
    _age(database, LEASE_S - 6)
    second = database.sole.take(OTHER)
    assert first is not None
    assert second is not None
    assert second == msgspec.structs.replace(first, renewals=1)


def test_one_whose_process_is_gone_is_followed_at_once(database: Database) -> None:
    database.sole.take(ONE)
    seen: list[Holder] = []

    def remember(holder: Holder) -> bool:
        seen.append(holder)
        return False

    assert database.sole.take(OTHER, remember) is not None
    assert [holder.pid for holder in seen] == [ONE.pid]
    assert database.sole.take(OTHER, lambda _: True) is None


def test_one_that_was_watched_for_a_lease_is_followed_unless_it_has_moved(database: Database) -> None:
    """Whatever the clocks say: this is how a lease from the future ends."""
    database.sole.take(ONE)
    watched = database.sole.take(OTHER)
    database.sole.take(ONE)
    _age(database, -1e6)
    assert watched is not None
    moved = database.sole.take(OTHER, over=watched)
    assert moved is not None
    assert database.sole.take(OTHER, over=moved) is None


def test_of_many_that_start_at_once_one_has_it(database: Database) -> None:
    barrier = threading.Barrier(4)
    taken: list[str] = []

    def start(name: str) -> None:
        me = msgspec.structs.replace(ONE, gateway=name)
        barrier.wait()
        try:
            if database.sole.take(me) is None:
                taken.append(name)
        except Exception as error:  # the row that another one has just made
            assert "there already" in str(error)  # noqa: PT017

    threads = [threading.Thread(target=start, args=(f"gw_{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    with database.sole._engine.read() as connection:
        assert connection.execute(sa.select(sole.c.gateway)).scalars().all() == taken


@pytest.mark.parametrize("revision", ["0001", "0002"])
def test_a_database_of_an_earlier_revision_is_brought_up_with_all_that_is_in_it(
    url: str, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    stored = key()
    with monkeypatch.context() as before:
        before.setattr("gateway.database.migrate.REVISION", revision)
        database = Database.open(url)
        values = {name: value for name, value in key_values(stored).items() if name != "capture_content"}
        row = sa.table("tidegate_keys", *(sa.column(name) for name in (*values, "version", "removed")))
        with database.sole._engine.write() as connection:
            connection.execute(row.insert().values(**values, version=1, removed=False))
        if revision == "0001":
            with pytest.raises(DatabaseInvalid, match="tidegate_sole"):
                database.sole.take(ONE)
        database.close()
    database = Database.open(url)
    assert database.sole.take(ONE) is None
    assert database.keys.get(stored.id) == stored
    assert database.keys.update(stored.id, {"capture_content": True}, "me").capture_content
    assert database.keys.get(stored.id).capture_content
    database.close()
