"""The connection to the database, and the one place where its errors become ours.

A transaction is either `read` (one consistent snapshot) or `write`. On SQLite a writer takes the write lock at once
(`BEGIN IMMEDIATE`), since a reader that becomes a writer midway may be refused whatever the time-out. On PostgreSQL a
watch closes the connection of a transaction that takes far too long: a server that is frozen but whose machine still
answers would otherwise hold the thread for ever, which no time-out of the server and none of TCP prevents.
"""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr
from sqlalchemy import event, exc, make_url
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from gateway.database.address import Address
from gateway.database.errors import Conflict, DatabaseInvalid, DatabaseUnavailable

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 5.0
"""How long a change waits for another process's, SQLite."""
CONNECT_TIMEOUT_S = 2
STATEMENT_TIMEOUT_S = 10.0
"""By the server, PostgreSQL. It contains the wait for other writers."""
POOL = 4
"""Connections of one process at most; a fifth thread waits."""
WITHIN_S = 30.0
"""A transaction that has not ended by then is cut off, PostgreSQL."""

_INVALID = ("file is not a database", "malformed", "no such table", "no such column", "unsupported file format")
_PASSING = ("57", "08", "53", "58", "25006", "25P03", "40", "55P03")
"""SQLSTATE of what passes by itself: shutdown and time-outs, connection, resources, disk, read-only, deadlock, lock."""


class Engine:
    """Transactions on one database, from any thread."""

    def __init__(self, address: Address, password: SecretStr | None, within_s: float = WITHIN_S) -> None:
        self.address = address
        self.sqlite = address.path is not None
        self._engine = _sqlite(address) if self.sqlite else _postgresql(address, password, within_s)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One snapshot: what is read in here belongs together. Raises `DatabaseUnavailable`, `DatabaseInvalid`."""
        with self._transaction({"begin": "BEGIN"} if self.sqlite else {"isolation_level": "REPEATABLE READ"}) as open_:
            yield open_

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """All of it or, when anything is raised in here, nothing. Raises `Conflict` as well."""
        options = {"begin": "BEGIN IMMEDIATE"} if self.sqlite else {"isolation_level": "READ COMMITTED"}
        with self._transaction(options) as open_:
            yield open_

    @contextmanager
    def _transaction(self, options: dict[str, str]) -> Iterator[sa.Connection]:
        with self.errors(), self._engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def value(self, statement: sa.Executable) -> Any:
        """The first column of a query's only row, without a transaction around it. None: no row."""
        with self.errors(), self._engine.connect() as connection:
            if not self.sqlite:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            return connection.execute(statement).scalar()

    @staticmethod
    def take_long(connection: sa.Connection) -> None:
        """This transaction may last: a migration."""
        if (watch := connection.info.get("watch")) is not None:
            watch.stop()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Say it in our words. What was being written is not repeated: it may be a digest."""
        try:
            yield
        except exc.IntegrityError:
            raise Conflict("it is there already") from None
        except exc.DBAPIError as error:
            # The driver's errors hold their connection, and that its password.
            raise self._translated(error) from (error if self.sqlite else None)
        except exc.TimeoutError as error:
            raise DatabaseUnavailable(self.address.shown, f"all {POOL} connections are in use") from error

    def _translated(self, error: exc.DBAPIError) -> DatabaseUnavailable | DatabaseInvalid:
        lines = str(error.orig).strip().splitlines()
        reason = lines[0][:300] if lines else type(error.orig).__name__
        if self.sqlite:
            if isinstance(error, exc.OperationalError) and not any(text in reason for text in _INVALID):
                return DatabaseUnavailable(self.address.shown, reason)
            return DatabaseInvalid(self.address.shown, reason)
        state = getattr(error.orig, "sqlstate", None)
        if state is None or state.startswith(_PASSING) or error.connection_invalidated:
            return DatabaseUnavailable(self.address.shown, reason)
        return DatabaseInvalid(self.address.shown, reason)

    def close(self) -> None:
        self._engine.dispose()


class _Watch:
    """Cuts a connection in use off when its time is over. One thread, 0.1 ms: little beside the round trips."""

    def __init__(self, descriptor: int, within_s: float) -> None:
        self._stream = socket.socket(fileno=os.dup(descriptor))
        self._timer = threading.Timer(within_s, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def _cut(self) -> None:
        with suppress(OSError):  # it ended just now
            self._stream.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._timer.cancel()
        self._stream.close()


def _sqlite(address: Address) -> sa.Engine:
    path = address.path
    assert path is not None
    try:
        # SQLite itself would make it for all to read.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if not path.parent.is_dir():
            reason = f"there is no directory {path.parent.absolute()}: make it, or change the setting database"
            raise DatabaseInvalid(address.shown, reason) from error
        raise DatabaseUnavailable(address.shown, error.strerror or str(error)) from error
    try:
        if os.fstat(descriptor).st_mode & 0o007:
            shown = path.absolute()
            logger.warning("database: every user of this machine can open %s: run chmod 600 %s", shown, shown)
    finally:
        os.close(descriptor)
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path.absolute())),
        poolclass=QueuePool,
        pool_size=POOL,
        max_overflow=0,
        pool_timeout=BUSY_TIMEOUT_S,
        hide_parameters=True,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions begin below, not where the module would begin them
        # A text that is not UTF-8 must spoil its row, not the answer that it is in.
        connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last changes with the power
        _write_ahead(connection)

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Let readers go on beside a writer. The change to it needs the file alone, and does not itself wait for that."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _postgresql(address: Address, password: SecretStr | None, within_s: float) -> sa.Engine:
    try:
        import psycopg
    except ImportError as error:
        raise DatabaseInvalid(
            address.shown, "PostgreSQL needs the package psycopg: pip install tidegate[postgres]"
        ) from error
    url = make_url(address.url).set(drivername="postgresql+psycopg")
    if password is not None:
        url = url.set(password=password.get_secret_value())
    engine = sa.create_engine(
        url,
        pool_size=2,
        max_overflow=POOL - 2,
        pool_timeout=STATEMENT_TIMEOUT_S,
        pool_recycle=1800,
        hide_parameters=True,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "tidegate",
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": int(STATEMENT_TIMEOUT_S * 1000),
            "prepare_threshold": None,  # PgBouncer hands each transaction to another connection
        },
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: object) -> None:
        # Not as a start option: PgBouncer refuses those.
        with connection.cursor() as cursor:
            cursor.execute(f"SET statement_timeout = {int(STATEMENT_TIMEOUT_S * 1000)}")
            cursor.execute(f"SET idle_in_transaction_session_timeout = {int(WITHIN_S * 1000)}")
        connection.commit()

    @event.listens_for(engine, "checkout")
    def _check(connection: Any, record: ConnectionPoolEntry, _: object) -> None:
        watch = _Watch(connection.fileno(), within_s)
        try:
            # The pool's own `pre_ping` would wait for a frozen server without an end.
            connection.execute("SELECT 1")
            connection.rollback()
        except psycopg.Error as error:
            watch.stop()
            raise exc.DisconnectionError from error  # the pool takes another connection, a new one in the end
        record.info["watch"] = watch

    @event.listens_for(engine, "checkin")
    def _put_back(_: object, record: ConnectionPoolEntry) -> None:
        if (watch := record.info.pop("watch", None)) is not None:
            watch.stop()

    return engine
