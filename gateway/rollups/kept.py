"""The rollups' file: what was counted outlasts a restart.

Written whole, beside the old one, which it then replaces: a crash leaves either. A file that cannot be read is put
aside under another name, and never stops a gateway from starting.
"""

from __future__ import annotations

import logging
import os
import zlib
from contextlib import suppress
from pathlib import Path

import msgspec

from gateway.rollups.series import WIDTHS, Level, Series
from gateway.rollups.tally import Tally

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 2**20
"""Ten times what a thousand slots with all models and buckets take; whatever is larger is not ours."""
_MAGIC = b"tidegate rollups 1\n"


class _Kept(msgspec.Struct):
    levels: dict[str, dict[int, Tally]]


class BrokenFile(Exception):
    """It is not what was written; the message says how that shows."""


def encode(series: Series) -> bytes:
    """All that is counted, with a checksum."""
    body = msgspec.msgpack.encode(_Kept({name: level.slots for name, level in series.levels.items()}))
    return _MAGIC + zlib.crc32(body).to_bytes(4, "big") + body


def decode(data: bytes, now_unix_s: float) -> Series:
    """What was encoded, without what has become too old or lies in the future. Raises `BrokenFile`."""
    head, checksum, body = data[: len(_MAGIC)], data[len(_MAGIC) : len(_MAGIC) + 4], data[len(_MAGIC) + 4 :]
    if head != _MAGIC:
        raise BrokenFile("it does not begin as such a file does")
    if zlib.crc32(body).to_bytes(4, "big") != checksum:
        raise BrokenFile("its checksum is another one")
    try:
        kept = msgspec.msgpack.decode(body, type=_Kept)
    except msgspec.MsgspecError as error:
        raise BrokenFile(str(error)) from error
    series = Series()
    for width in WIDTHS:
        level: Level = series.levels[width.name]
        first = now_unix_s - width.window_s
        for start, tally in kept.levels.get(width.name, {}).items():
            if first < start <= now_unix_s and start == level.start_of(start):
                level.slots[start] = tally
    return series


def read(path: Path, now_unix_s: float) -> tuple[Series, str]:
    """What the file holds, and what was wrong with it: an empty one, and why, where it cannot be used. Blocks."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BrokenFile(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
        return decode(path.read_bytes(), now_unix_s), ""
    except FileNotFoundError:
        return Series(), ""
    except (BrokenFile, OSError) as error:
        aside = path.with_name(f"{path.name}.broken")
        with suppress(OSError):
            os.replace(path, aside)
        why = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        logger.warning("overview: %s; it is kept as %s, and counting begins anew", why, aside.name)
        return Series(), f"{why}; it is kept as {aside.name}"
