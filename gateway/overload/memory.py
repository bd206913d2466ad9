"""How much of the memory that it may use this process uses, as the kernel says it.

The first of these that there is: `overload.max_memory_bytes` against the process' resident memory; the limit of a
cgroup (v2, else v1) against what the cgroup uses; the machine's memory against the resident memory. A cgroup's use is
counted as Kubernetes counts the working set on which it evicts: without the file cache that has not been touched
lately, which the kernel gives up before it kills anybody. A cgroup counts all its processes: several workers in one
container read the same figure, and shed together.

The files stay open: a process that is out of descriptors could not open them, and is the one that needs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ROOT = Path("/")


BODY_FACTOR = 2
"""Memory that a request body takes while it is held, its prompt as text and what is parsed of it included: 1.6 times
its size was measured, of bodies of 9.5 MB."""
BODY_PEAK = 4
"""And while it is read and parsed, for a moment; only one body is at a time."""


def bytes_for_bodies(use: MemoryUse, ceiling: float, largest_bytes: int, workers: int) -> int:
    """How many bytes of request bodies one of `workers` may hold, so that the memory in use stays below `ceiling`.

    At least one of the largest, else none of those could ever be served.

    >>> bytes_for_bodies(MemoryUse(80 << 20, 256 << 20), 0.95, 10 << 20, 1) >> 20
    61
    """
    room = use.limit * ceiling - use.used
    return max(largest_bytes, int((room / workers - BODY_PEAK * largest_bytes) / BODY_FACTOR))


class Kept:
    """A small file of the kernel's, read again and again. Raises `OSError` when it is not there."""

    __slots__ = ("_fd",)

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        return os.pread(self._fd, 16_384, 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """One reading, in bytes."""

    used: int
    limit: int

    @property
    def share(self) -> float:
        return self.used / self.limit if self.limit > 0 else 0.0


class Cgroup:
    """One cgroup with a limit on its memory. Raises `OSError` when it is none, or has none."""

    source = "cgroup"

    def __init__(self, folder: Path, *, unified: bool) -> None:
        limit, used = (
            ("memory.max", "memory.current") if unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        self._idle = b"\ninactive_file " if unified else b"\ntotal_inactive_file "
        self._files: list[Kept] = []
        try:
            for name in (limit, used, "memory.stat"):
                self._files.append(Kept(folder / name))
            if self._limit() is None:
                raise OSError(f"{folder} has no limit")
        except BaseException:
            self.close()
            raise

    def read(self) -> MemoryUse:
        limit = self._limit()
        if limit is None:  # it was taken away
            return MemoryUse(0, 0)
        idle = (b"\n" + self._files[2].read()).partition(self._idle)[2].split(b"\n", 1)[0]
        return MemoryUse(max(0, int(self._files[1].read()) - int(idle or b"0")), limit)

    def _limit(self) -> int | None:
        """None: no limit, which v2 calls `max`, and v1 a number that no machine has."""
        text = self._files[0].read().strip()
        return None if not text.isdigit() or int(text) >= 2**60 else int(text)

    def close(self) -> None:
        for each in self._files:
            each.close()


class Resident:
    """This process' resident memory, against a number of bytes."""

    def __init__(self, limit_bytes: int, source: str, root: Path = _ROOT) -> None:
        self.source = source
        self._limit_bytes = limit_bytes
        self._file = Kept(root / "proc/self/statm")

    def read(self) -> MemoryUse:
        return MemoryUse(int(self._file.read().split()[1]) * _PAGE_BYTES, self._limit_bytes)

    def close(self) -> None:
        self._file.close()


class Memory:
    """The memory that this process may use. `close` it. `root` is where `/proc` and `/sys` are, for tests."""

    def __init__(self, max_memory_bytes: int | None, root: Path = _ROOT) -> None:
        self._gauges: list[Cgroup] | list[Resident] = []
        try:
            if max_memory_bytes is not None:
                self._gauges = [Resident(max_memory_bytes, "overload.max_memory_bytes", root)]
            else:
                self._gauges = list(_cgroups(root)) or [Resident(_machine_bytes(root), "the machine's memory", root)]
        except OSError:  # no Linux: nothing is known, and nothing is shed for it
            pass
        self.source = self._gauges[0].source if self._gauges else "unknown"
        """Whose limit it is, in words."""
        self.shared = self.source == Cgroup.source
        """Whether all workers of this gateway are in it."""

    def read(self) -> MemoryUse:
        """Of several nested cgroups, the one that is fullest. Zeros where nothing can be read."""
        try:
            return max((each.read() for each in self._gauges), key=lambda use: use.share, default=MemoryUse(0, 0))
        except (OSError, ValueError, IndexError):
            return MemoryUse(0, 0)

    def close(self) -> None:
        for each in self._gauges:
            each.close()


def _cgroups(root: Path) -> Iterator[Cgroup]:
    """Those with a limit on memory that this process is in, from its own upwards."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        unified = not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" if unified else root / "sys/fs/cgroup/memory"
        # In a container without a cgroup namespace the path is the host's, and only the top is to be seen.
        folder = top / path.strip("/")
        places = [folder, *folder.parents]
        for place in places[: places.index(top) + 1]:
            opened = _if_limited(place, unified)
            if opened is not None:
                yield opened


def _if_limited(folder: Path, unified: bool) -> Cgroup | None:
    try:
        return Cgroup(folder, unified=unified)
    except OSError:
        return None


def _machine_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise OSError("no MemTotal")
