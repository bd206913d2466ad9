"""Each test of this folder that asks for `url` or `database` runs on a SQLite file and on a real PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.database.database import Database
from tests.support.postgres import Postgres, Unavailable, running_postgres

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all of them; every test has a database of its own."""
    try:
        with running_postgres() as server:
            yield server
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tidegate.db"
    server: Postgres = request.getfixturevalue("postgres")
    name = f"test_{next(_NUMBERS)}"
    server.run(f"CREATE DATABASE {name}")
    return server.url(name)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database.open(url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """Where the database makes no difference."""
    opened = Database.open(f"sqlite:///{tmp_path}/tidegate.db")
    yield opened
    opened.close()
