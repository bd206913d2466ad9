"""The server's secret under which keys are digested, so that a copy of the database alone cannot even confirm a guess.

The configured one; else, beside a SQLite database, a file that is made once. It must outlive the database's keys: with
another pepper no key is known (`Database.confirm_pepper` notices), and unlike a token a new one cannot simply be made.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import sqlite3
import stat
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from pydantic import SecretStr

from gateway.config.limits import MIN_PEPPER_BYTES
from gateway.database.address import parse

_PEPPER = re.compile(r"tg_pepper_[A-Za-z0-9_-]{43}")
_MAX_FILE_BYTES = 4096
_READ_WITHIN_S = 5.0


class PepperError(Exception):
    """There is no pepper that may be used; the message says what to do, and nothing secret."""


def load_pepper(configured: SecretStr | None, database_url: str) -> bytes:
    """`keys.pepper`, or for SQLite what `<database file>.pepper` holds, which is made now if it is not there.

    One is never made beside a database that has keys: they were made with another. Makes no directory. Raises
    `PepperError`, and `DatabaseInvalid` for a URL that cannot be read.
    """
    if configured is not None:
        text = configured.get_secret_value()
        if len(text.encode()) < MIN_PEPPER_BYTES:
            raise PepperError(f"keys.pepper has fewer than {MIN_PEPPER_BYTES} bytes: use e.g. `openssl rand -hex 32`")
        return text.encode()
    path = parse(database_url).path
    if path is None:
        raise PepperError(
            "several gateways that share a PostgreSQL must share one pepper as well: set keys.pepper to a secret "
            "of their own, e.g. from `openssl rand -hex 32`, and keep it as long as the keys"
        )
    file = path.with_name(path.name + ".pepper")
    try:
        found = _read(file)
        if found is None:
            if not path.parent.is_dir():
                folder = path.parent.absolute()
                raise PepperError(f"database: there is no directory {folder}: make it, or change the setting")
            keys = _keys_in(path)
            found = _read(file)  # whoever made the keys, made it first
            if found is None and keys:
                raise PepperError(
                    f"the pepper of the keys, {file.absolute()}, is gone, and without it none of the {keys} keys in "
                    f"{path.absolute()} is known: put the file back as it was; if it is lost, revoke these keys "
                    "(tidegate keys revoke), after which a new one is made"
                )
        return (found or _create(file)).encode("ascii")
    except OSError as error:
        raise PepperError(f"the pepper of the keys, {file}: {error.strerror or error}") from error


def _read(path: Path) -> str | None:
    """What the file holds, or None if there is none. One that cannot be trusted is never replaced: see above."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PepperError(f"the pepper of the keys, {path}, must be a file of this user's, for nobody else to read")
        text = file.read(_MAX_FILE_BYTES).decode("ascii", "replace").strip()
    if _PEPPER.fullmatch(text) is None:
        raise PepperError(f"the file {path} holds no pepper: put it back as it was, or all keys are lost")
    return text


def _keys_in(path: Path) -> int:
    """How many keys the SQLite database has that were made with a pepper. None is made if it is not there.

    Asked by its own library: the gateway has not opened it yet. What is no database of ours is reported when it does.
    """
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=_READ_WITHIN_S)) as database:
            row = database.execute("SELECT live_keys FROM tidegate_counters WHERE pepper_check IS NOT NULL").fetchone()
    except sqlite3.OperationalError as error:
        if "no such" in str(error):
            return 0
        raise PepperError(f"database: {path.absolute()} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        raise PepperError(f"database: {path.absolute()} cannot be used: {error}") from error
    return 0 if row is None else int(row[0])


def _create(path: Path) -> str:
    """Put a new one into the file, whole or not at all. Of several that do so at once, the first decides."""
    pepper = f"tg_pepper_{secrets.token_urlsafe(32)}"
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(pepper + "\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(name, path)
        found = _read(path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
    if found is None:
        raise PepperError(f"the file {path} was taken away while it was being made")
    return found
