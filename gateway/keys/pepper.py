"""The server's secret under which keys are digested, so that a copy of the database alone cannot even confirm a guess.

The configured one; else, beside a SQLite database, a file that is made once. It must outlive the database's keys: with
another pepper no key is known (`Database.confirm_pepper` notices), and unlike a token a new one cannot simply be made.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from gateway.database.address import parse

MIN_LENGTH = 32
"""Characters of a configured one: 128 bits, if it was drawn as hexadecimal digits."""
_PEPPER = re.compile(r"tg_pepper_[A-Za-z0-9_-]{43}")
_MAX_FILE_BYTES = 4096


class PepperError(Exception):
    """There is no pepper that may be used; the message says what to do, and nothing secret."""


def load_pepper(configured: SecretStr | None, database_url: str) -> bytes:
    """`keys.pepper`, or for SQLite what `<database file>.pepper` holds, which is made now if it is not there.

    Raises `PepperError`, and `DatabaseInvalid` for a URL that cannot be read. Makes no directory.
    """
    if configured is not None:
        text = configured.get_secret_value()
        if len(text) < MIN_LENGTH:
            raise PepperError(f"keys.pepper has fewer than {MIN_LENGTH} characters: use e.g. `openssl rand -hex 32`")
        return text.encode()
    path = parse(database_url).path
    if path is None:
        raise PepperError(
            "several gateways that share a PostgreSQL must share one pepper as well: set keys.pepper to a secret "
            "of their own, e.g. from `openssl rand -hex 32`, and keep it as long as the keys"
        )
    file = path.with_name(path.name + ".pepper")
    try:
        return (_read(file) or _create(file)).encode("ascii")
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
