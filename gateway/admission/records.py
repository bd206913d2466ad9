"""The database of a running gateway: opened when it can be, by whoever needs it first, in whatever thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from gateway.config import Settings
from gateway.policy import GuardedRoute

if TYPE_CHECKING:  # imported where it is used: a gateway without keys and budgets does not load SQLAlchemy
    from gateway.database.database import Database

logger = logging.getLogger(__name__)


class AdmissionError(Exception):
    """The settings ask for what cannot be had; the message says which, and why."""


class Records:
    """One process's way to the database. Nothing is connected before `database` is called."""

    def __init__(self, settings: Settings, pepper: bytes | None = None) -> None:
        self._url = settings.database
        self._password = settings.database_password
        self._pepper = pepper
        self._lock = threading.Lock()
        self._database: Database | None = None
        self._closed = False
        self.shown = settings.database
        """For messages: there is no password in it."""

    def database(self) -> Database:
        """The database, opened now if it is not yet. Blocks. Raises `DatabaseError`."""
        from gateway.database.database import Database
        from gateway.database.errors import DatabaseUnavailable

        with self._lock:
            if self._closed:
                raise DatabaseUnavailable("the database", "the gateway is stopping")
            if self._database is None:
                database = Database.open(self._url, password=self._password)
                try:
                    if self._pepper is not None:
                        database.confirm_pepper(self._pepper)
                except BaseException:
                    database.close()
                    raise
                self._database = database
            return self._database

    def close(self) -> None:
        """Blocks for as long as the database does."""
        with self._lock:
            self._closed = True
            if self._database is not None:
                self._database.close()
                self._database = None


def pepper_of(settings: Settings) -> bytes | None:
    """What digests of keys are made with; None in a gateway without keys. Raises `AdmissionError`."""
    if settings.auth != "keys":
        return None
    from gateway.database.errors import DatabaseError
    from gateway.keys.pepper import PepperError, load_pepper

    try:
        return load_pepper(settings.keys.pepper, settings.database)
    except (PepperError, DatabaseError) as error:
        raise AdmissionError(str(error)) from error


def operators_records(settings: Settings) -> Records | None:
    """A way to the database for a process that only answers operators; None in a gateway without keys.

    Raises `AdmissionError`.
    """
    pepper = pepper_of(settings)
    return None if pepper is None else Records(settings, pepper)


def admin_routes(
    settings: Settings, on_changed: Callable[[], Awaitable[None]], records: Records | None
) -> list[GuardedRoute]:
    """The operators' routes for keys and tenants. Raises `AdmissionError`."""
    from gateway.key_routes import key_routes

    pepper = pepper_of(settings)
    if pepper is None or records is None:
        return key_routes(lambda: None, None, on_changed)
    return key_routes(records.database, pepper, on_changed)
