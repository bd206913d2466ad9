"""The owner's token for the admin listener: the configured one, else one that is made at the first start and kept.

The file holds 256 random bits behind a prefix that secret scanners can recognise, and only its owner may read it. The
log names the file, never what is in it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

STATE_DIR = "TIDEGATE_STATE_DIR"
"""Environment variable; not a setting, since it says where a process may write, not how the gateway behaves."""
TOKEN_FILE = "admin-token"
_TOKEN = re.compile(r"tg_admin_[A-Za-z0-9_-]{43}")
_MAX_FILE_BYTES = 4096


class StateError(Exception):
    """There is no place for the token; the message says what was tried and what to set."""


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where what belongs to this user's gateways is kept. Raises `StateError` when nothing says where that is."""
    if chosen := environ.get(STATE_DIR):
        return Path(chosen)
    if (base := environ.get("XDG_STATE_HOME", "")).startswith("/"):  # the specification wants others ignored
        return Path(base, "tidegate")
    if home := environ.get("HOME"):
        return Path(home, ".local", "state", "tidegate")
    raise StateError(f"neither {STATE_DIR}, XDG_STATE_HOME nor HOME is set")


def kept_state_directory(environ: Mapping[str, str]) -> Path | None:
    """The same; None when nothing says where that is."""
    try:
        return state_directory(environ)
    except StateError:
        return None


def stored_token(environ: Mapping[str, str]) -> tuple[SecretStr, Path]:
    """The token in the state directory and its file, made now if there is none. Raises `StateError`."""
    path = state_directory(environ) / TOKEN_FILE
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        token = _read(path)
        if token is None:
            token = _create(path)
    except OSError as error:
        raise StateError(f"{error.filename or path}: {error.strerror or error}") from error
    return SecretStr(token), path


def kept_token(environ: Mapping[str, str]) -> tuple[SecretStr | None, Path]:
    """The token that is in the state directory, if one is, and its file; makes nothing. Raises `StateError`."""
    path = state_directory(environ) / TOKEN_FILE
    try:
        token = _read(path)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror or error}") from error
    return (None if token is None else SecretStr(token)), path


def _read(path: Path) -> str | None:
    """The file's token, or None when there is none, or none that may be trusted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        private = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
        if not private:  # somebody else may have read it, or have put it there
            return None
        text = file.read(_MAX_FILE_BYTES).decode("ascii", "replace").strip()
    return text if _TOKEN.fullmatch(text) else None


def _create(path: Path) -> str:
    """Put a new token into the file, whole or not at all.

    Two gateways that start together must agree: `link` fails for the second, which then reads what the first wrote.
    """
    token = f"tg_admin_{secrets.token_urlsafe(32)}"
    descriptor, name = tempfile.mkstemp(prefix=f".{TOKEN_FILE}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token + "\n")
        try:
            os.link(name, path)
        except FileExistsError:
            found = _read(path)
            if found is not None:
                return found
            os.replace(name, path)  # what is there is no token of ours
            return token
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
    return token
