"""Bring a database to the revision that this program knows, when it is opened.

Several processes may start at once: the first takes the lock (SQLite's write lock, an advisory lock of PostgreSQL), the
others wait for it and then find nothing to do. The whole migration is one transaction on both. alembic is imported only
when there is something to do; otherwise one row is compared.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from gateway.database.engine import Engine
from gateway.database.errors import DatabaseInvalid
from gateway.database.tables import REVISION, SCHEMA_TABLE

_LOCK = 0x7469_6465_6761_7465  # "tidegate"
_MIGRATION_TIMEOUT_S = 300


def migrate(engine: Engine) -> bool:
    """Nothing, if the revision is right. Raises `DatabaseInvalid` for a database of a newer version.

    Whether there was nothing of ours in it before.
    """
    with engine.read() as connection:
        if _revision(connection) == REVISION:
            return False
    with engine.write() as connection:
        engine.take_long(connection)
        if not engine.sqlite:
            connection.execute(sa.text(f"SET LOCAL statement_timeout = {_MIGRATION_TIMEOUT_S * 1000}"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        found = _revision(connection)
        if found != REVISION:  # nobody has done it while this one waited
            _upgrade(engine, connection, found)
    return found is None


def _revision(connection: sa.Connection) -> str | None:
    """The database's revision, or None when there is nothing of ours in it yet."""
    if not sa.inspect(connection).has_table(SCHEMA_TABLE):
        return None
    found = connection.execute(sa.select(sa.column("version_num")).select_from(sa.table(SCHEMA_TABLE))).scalar()
    return None if found is None else str(found)


def _upgrade(engine: Engine, connection: sa.Connection, found: str | None) -> None:
    from alembic import command  # 0.1 s
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise DatabaseInvalid(
            engine.address.shown,
            f"it has revision {found}, which this version of tidegate does not know (its own is {REVISION}): "
            "a newer version has written it; run that one, or go back to a copy from before",
        )
    config.attributes["connection"] = connection
    command.upgrade(config, REVISION)
