"""What was found last, on disk: a gateway that starts while a name server is away begins with what it knew."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from backends.discovery.member import Member
from gateway.whole_files import replace_file

logger = logging.getLogger("tidegate")

FILE = "members.json"
MAX_FILE_BYTES = 64 * 2**20


class Seen(msgspec.Struct, frozen=True):
    """What one source has told of one pool."""

    pool: str
    source: str
    members: list[Member]
    told_unix_s: float


class _Kept(msgspec.Struct):
    seen: list[Seen]


def save(folder: Path, seen: list[Seen]) -> None:
    """Blocks. What cannot be kept is said, and stops nobody."""
    try:
        replace_file(folder / FILE, msgspec.json.encode(_Kept(seen)))
    except OSError as error:
        logger.warning("members are not kept over restarts: %s: %s", folder / FILE, error.strerror or error)


def load(folder: Path) -> list[Seen]:
    """Blocks. Nothing, with the reason in the log, where it cannot be read."""
    path = folder / FILE
    try:
        if os.stat(path).st_size > MAX_FILE_BYTES:
            raise ValueError("it is too large to be ours")
        return msgspec.json.decode(path.read_bytes(), type=_Kept).seen
    except FileNotFoundError:
        return []
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        logger.warning("members of the last run are not known: %s: %s", path, error)
        return []
