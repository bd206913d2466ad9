"""Databases that are missing, damaged, newer, away or frozen; and an audit that somebody would like to change."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from gateway.database import tables
from gateway.database.database import Database
from gateway.database.errors import DatabaseError, DatabaseInvalid, DatabaseUnavailable, InvalidValue
from gateway.keys.format import digest, mint
from tests.gateway.database.making import key
from tests.support.postgres import Postgres
from tests.support.process import ROOT, environment

NOBODY = 65534


def test_file_is_for_its_owner_alone(tmp_path: Path, sqlite_database: Database) -> None:
    sqlite_database.keys.create(key(), "me")
    files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert files == {"tidegate.db": 0o600, "tidegate.db-wal": 0o600, "tidegate.db-shm": 0o600}


def test_file_that_others_can_open_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.db"
    for mode, warned in ((0o640, False), (0o666, True), (0o604, True)):
        file.touch()
        file.chmod(mode)
        caplog.clear()
        Database.open(f"sqlite:///{file}").close()
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert said == ([f"database: every user of this machine can open {file}: run chmod 600 {file}"] * warned)


def test_tables_are_made_without_a_word(tmp_path: Path) -> None:
    """alembic tells of its plug-ins when it is first imported."""
    code = (
        "import sys; from gateway.logs import configure; from gateway.database.database import Database; "
        "configure('text', 'info'); Database.open(sys.argv[1]).close(); print('alembic' in sys.modules)"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/a.db"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatabaseInvalid, match=f"there is no directory {tmp_path}/none: make it, or change the setting"):
        Database.open(f"sqlite:///{tmp_path}/none/a.db")
    with pytest.raises(DatabaseUnavailable, match="directory"):
        Database.open(f"sqlite:///{tmp_path}")


@contextmanager
def _unprivileged() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_directory_and_file_are_said() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        Database.open(f"sqlite:///{directory}/there.db").close()
        (directory / "there.db").chmod(0o444)
        directory.chmod(0o555)
        with _unprivileged():
            for file in ("there.db", "new.db"):
                with pytest.raises(DatabaseUnavailable, match="Permission denied"):
                    Database.open(f"sqlite:///{directory}/{file}")
        directory.chmod(0o700)


def test_damaged_file_is_said_and_left_alone(tmp_path: Path) -> None:
    for content in (b"no database at all, " * 100, b"SQLite format 3\0" + b"\xff" * 5000):
        file = tmp_path / "a.db"
        file.write_bytes(content)
        with pytest.raises(DatabaseInvalid, match=r"a\.db cannot be used"):
            Database.open(f"sqlite:///{file}")
        assert file.read_bytes() == content


def test_database_damaged_while_it_is_used_is_said(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    database = Database.open(url)
    for _ in range(50):
        database.keys.create(key(name="x" * 200), "me")
    database.close()
    file = tmp_path / "a.db"
    with file.open("r+b") as stream:
        stream.seek(4096 * 3)
        stream.write(b"\xff" * (file.stat().st_size - 4096 * 4))

    def use() -> None:
        opened = Database.open(url)
        try:
            opened.keys.changed_since(0)
        finally:
            opened.close()

    with pytest.raises(DatabaseError):
        use()


def test_newer_database_is_refused(url: str) -> None:
    database = Database.open(url)
    with database._engine.write() as connection:
        connection.execute(sa.text(f"UPDATE {tables.SCHEMA_TABLE} SET version_num = '9999'"))
    database.close()
    with pytest.raises(DatabaseInvalid, match="revision 9999, which this version of tidegate does not know"):
        Database.open(url)


def test_tables_are_those_that_the_program_names(database: Database) -> None:
    """The migrations and `tables` must not drift apart."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database._engine.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": tables.SCHEMA_TABLE})
        assert compare_metadata(context, tables.metadata) == []


def test_full_disk_changes_nothing(sqlite_database: Database) -> None:
    stored = sqlite_database.keys.create(key(), "me")
    with sqlite_database._engine.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for _ in range(200):
            sqlite_database.keys.create(key(name="x" * 200), "me")

    with pytest.raises(DatabaseUnavailable, match="full"):
        fill()
    assert sqlite_database.keys.get(stored.id) == stored
    assert sqlite_database.audit.missing() == ()
    assert len(sqlite_database.keys.list()) == len(sqlite_database.audit.list(1000))


def test_audit_cannot_be_changed(database: Database) -> None:
    for number in range(4):
        database.audit.record("me", "config.reload", f"file {number}", {"a": [1, 2]})
    before = database.audit.list()
    statements = [
        "UPDATE tidegate_audit SET actor = 'you'",
        "DELETE FROM tidegate_audit",
        "INSERT INTO tidegate_audit VALUES (1, 0, 'you', 'x', '', '{}')",
    ]
    if database._engine.sqlite:
        statements.append("INSERT OR REPLACE INTO tidegate_audit VALUES (1, 0, 'you', 'x', '', '{}')")
    else:
        statements.append("TRUNCATE tidegate_audit")
        statements.append(
            "INSERT INTO tidegate_audit VALUES (1, 0, 'you', 'x', '', '{}')"
            " ON CONFLICT (id) DO UPDATE SET actor = 'you'"
        )
    for statement in statements:
        with pytest.raises(DatabaseError), database._engine.write() as connection:
            connection.exec_driver_sql(statement)
    assert database.audit.list() == before
    assert [entry.id for entry in database.audit.list(2)] == [4, 3]
    assert [entry.id for entry in database.audit.list(before_id=3)] == [2, 1]
    assert database.keys.changed_since(0).version == 0  # gateways need not read anything for these


def test_taken_out_entries_are_missed(database: Database) -> None:
    for _ in range(8):
        database.audit.record("me", "config.reload", "file", {})
    assert database.audit.missing() == ()
    with database._engine.write() as connection:
        connection.exec_driver_sql(
            "DROP TRIGGER tidegate_audit_delete"
            if database._engine.sqlite
            else "ALTER TABLE tidegate_audit DISABLE TRIGGER USER"
        )
        connection.execute(tables.audit.delete().where(tables.audit.c.id.in_([1, 4, 5, 8])))
    assert database.audit.missing() == ((1, 1), (4, 5), (8, 8))


def test_audit_keeps_no_keys_and_nothing_endless(sqlite_database: Database) -> None:
    for diff in ({"key": mint()}, {"a": "x" * 70_000}, {"a": object()}):
        with pytest.raises(InvalidValue):
            sqlite_database.audit.record("me", "x", "y", diff)
    for actor in ("", "x" * 201, mint(), "a\nb"):
        with pytest.raises(InvalidValue):
            sqlite_database.keys.create(key(), actor)
    assert sqlite_database.audit.list() == ()


def test_no_usable_key_is_anywhere_in_the_file(tmp_path: Path, sqlite_database: Database) -> None:
    minted = [mint() for _ in range(20)]
    for each in minted:
        made = sqlite_database.keys.create(key(digest=digest(b"pepper", each.encode()), hint=each[-4:]), "me")
        sqlite_database.keys.update(made.id, {"name": "renamed"}, "me")
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert digest(b"pepper", minted[0].encode()) in content  # it is there that the search looks
    for each in minted:
        assert each.encode() not in content
        assert each[4:20].encode() not in content
    entries = sqlite_database.audit.list(1000)
    assert not any(digest(b"pepper", each.encode()).hex() in str(entries) for each in minted)
    assert not any("digest" in entry.diff for entry in entries)


def test_password_is_in_no_message(postgres: Postgres) -> None:
    with pytest.raises(DatabaseInvalid) as caught:
        Database.open("postgresql://me:hunter2@db/x")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(DatabaseUnavailable) as unavailable:
        Database.open("postgresql://me@127.0.0.1:1/x", password=SecretStr("hunter2"))
    chain: BaseException | None = unavailable.value
    while chain is not None:
        assert "hunter2" not in f"{chain} {chain!r} {vars(chain)}"
        chain = chain.__cause__
    assert unavailable.value.address == "postgresql://me@127.0.0.1:1/x"


@pytest.mark.parametrize(
    "url", ["mysql://a/b", "sqlite://", "sqlite:///:memory:", "sqlite:///a?b=c", "postgresql://h/", "postgresql://h:x/b",
            "postgresql://h/b?password=hunter2", "", "postgresql://[/x"],
)  # fmt: skip
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(DatabaseInvalid) as caught:
        Database.open(url)
    assert "hunter2" not in str(caught.value)


def test_missing_driver_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['psycopg'] = None\nfrom gateway.database.database import Database\n"
        "try: Database.open('postgresql://me@127.0.0.1:1/x')\nexcept Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert "pip install tidegate[postgres]" in done.stdout


def test_database_up_to_date_needs_no_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    Database.open(url).close()
    script = (
        "import sys\nfrom gateway.database import address, answers, errors\nassert 'sqlalchemy' not in sys.modules\n"
        "from gateway.database.database import Database\nDatabase.open(sys.argv[1]).close()\n"
        "assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, url], env=environment(), cwd=ROOT, check=True)


def test_locked_sqlite_is_unavailable_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.database.engine.BUSY_TIMEOUT_S", 0.2)
    database = Database.open(f"sqlite:///{tmp_path}/a.db")
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable, match="locked"):
        database.keys.create(key(), "me")
    assert database.keys.changed_since(0).version == 0  # readers do not mind
    other.execute("ROLLBACK")
    other.close()
    database.keys.create(key(), "me")
    database.close()


def test_locked_postgresql_is_unavailable_after_its_time(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.database.engine.STATEMENT_TIMEOUT_S", 0.2)
    postgres.run("CREATE DATABASE locked")
    database, other = (Database.open(postgres.url("locked")) for _ in range(2))
    with other._engine.write() as connection:
        connection.execute(sa.select(tables.counters).with_for_update())
        with pytest.raises(DatabaseUnavailable, match="statement timeout"):
            database.keys.create(key(), "me")
        assert database.keys.changed_since(0).version == 0
    database.keys.create(key(), "me")
    database.close()
    other.close()


def test_postgresql_that_goes_away_comes_back(postgres: Postgres) -> None:
    postgres.run("CREATE DATABASE away")
    database = Database.open(postgres.url("away"))
    stored = database.keys.create(key(), "me")
    postgres.stop()
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(DatabaseUnavailable) as caught:
            database.keys.changed_since(0)
        assert "postgres@127.0.0.1" in str(caught.value)
        with pytest.raises(DatabaseUnavailable):
            database.spend.add("b", {("s", "d1"): 1})
    assert time.monotonic() - started < 20
    postgres.start()
    assert database.keys.changed_since(0).keys == (stored,)
    assert database.spend.add("b", {("s", "d1"): 1})
    database.close()


def test_frozen_postgresql_holds_nobody_for_ever(postgres: Postgres) -> None:
    postgres.run("CREATE DATABASE frozen")
    database = Database.open(postgres.url("frozen"), within_s=0.5)
    stored = database.keys.create(key(), "me")
    postgres.freeze()
    try:
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            database.keys.changed_since(0)
        assert time.monotonic() - started < 20
    finally:
        postgres.thaw()
    assert database.keys.changed_since(0).keys == (stored,)
    database.close()
