"""What was decided about a pool, as gateways tell each other and as it is kept over a restart."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from gateway.whole_files import replace_file

logger = logging.getLogger(__name__)

FILE = "scaling.json"
HISTORY = 1000
STARTS = 20
"""Start times of a pool that are kept: as many as lead times are taken from."""
MAX_FILE_BYTES = 64 * 2**20


class Said(msgspec.Struct, frozen=True):
    """One reason for a number."""

    kind: str
    wanted: int
    text: str


class Leaving(msgspec.Struct):
    """A replica that was drained so that it can go."""

    identity: str
    """Of facts about it."""
    since_unix_s: float
    told: bool = False
    """It is empty, or its time is over, and the provider was told; there is no way back."""


class Standing(msgspec.Struct):
    """How many replicas a pool should have, by the gateway that decides."""

    by: str = ""
    at_unix_s: float = 0.0
    wanted: int = 0
    current: int = 0
    """Those that are ready, start or are ill."""
    ready: int = 0
    starting: int = 0
    reasons: list[Said] = []
    limited_by: str = ""
    forecast_per_s: float = 0.0
    lead_time_s: float = 0.0
    usd_per_hour: float = 0.0
    problem: str | None = None
    leaving: dict[str, Leaving] = {}
    """By name."""
    applied: int | None = None
    """What the provider was told last, and took; None: nothing yet."""

    @property
    def leave(self) -> list[str]:
        """Names of those that go now."""
        return sorted(name for name, each in self.leaving.items() if each.told)


class Change(msgspec.Struct, frozen=True):
    """Another number was wanted."""

    unix_s: float
    wanted: int
    current: int
    why: str


class Hold(msgspec.Struct, frozen=True):
    """An operator wants so many, whatever is asked for."""

    count: int
    until_unix_s: float
    by: str


class KeptPool(msgspec.Struct):
    """What is kept of a pool."""

    standing: Standing | None = None
    hold: Hold | None = None
    starts: list[tuple[str, float]] = []
    """Names of replicas and how many seconds they took to be ready; the last at the end."""
    history: list[Change] = []
    roll: int = 0
    learned: msgspec.Raw = msgspec.Raw(b"null")
    """A `memory.Taken`, read apart: one that is spoilt, or another version's, costs nothing else."""


class Kept(msgspec.Struct):
    """The file."""

    pools: dict[str, KeptPool] = {}


def read_kept(path: Path) -> Kept:
    """What the file holds; nothing where there is none. One that cannot be read is put aside, and that is logged."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise OSError(None, f"more than {MAX_FILE_BYTES >> 20} MiB")
        return msgspec.json.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return Kept()
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        aside = path.with_name(f"{path.name}.broken")
        with suppress(OSError):
            os.replace(path, aside)
        why = getattr(error, "strerror", None) or error
        logger.warning("scaling: %s cannot be read: %s; it is kept as %s", path, why, aside.name)
        return Kept()


def write_kept(path: Path, data: bytes) -> None:
    """Replace the file. Raises `OSError`. Blocks."""
    replace_file(path, data)
