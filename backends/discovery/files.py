"""Replicas from a file that something else writes: a list in YAML or JSON, whose entries are as under `replicas`.

Looked at by its time, size and inode, and by a digest of what is in it: replacing it (`rename`), writing over it, and
the swapped symbolic link of a Kubernetes ConfigMap are all seen, and touching it is not a change.

A file with one wrong entry is refused as a whole, and what it said before holds. Taking the others would drain a
replica for a slip of the pen, or for the half of a file that its writer has written so far.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.discovery.aside import Aside
from backends.discovery.entries import EntriesError, read_members
from backends.discovery.member import Member

MAX_BYTES = 8 << 20
"""4096 entries with everything that one can have are a tenth of this."""
SETTLED_S = 2.0
"""Times of files are coarse (ext4: 4 ms, FAT: 2 s): one written again within the same moment looks the same, so that a
file this fresh is read again, as git does ("racy git": https://git-scm.com/docs/racy-git)."""
PATIENCE_S = 10.0
"""For a disk that hangs, such as one over the network."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What tells one content of the file from another, without reading it."""

    changed_ns: int
    size_bytes: int
    inode: int
    device: int


class FileSource:
    """Looks at one file again and again (`backends.discovery.member.Source`). One event loop's."""

    def __init__(
        self,
        path: Path,
        *,
        interval_s: float = 1.0,
        check: Callable[[Member], str | None] | None = None,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        """`check` says what is wrong with a member beyond its form, or None."""
        self._path = path
        self._interval_s = interval_s
        self._check = check
        self._unix_s = unix_s
        self._aside: Aside[tuple[Sequence[Member], str]] = Aside(f"read {path.name}")
        # The next three are written in the thread of `_aside`, of which there is one at a time, and nowhere else.
        self._seen: _Seen | None = None
        self._settled = False
        self._digest = b""
        self._last: tuple[Sequence[Member], str] = ((), "")

    async def run(self, tell: Callable[[Sequence[Member]], None], trouble: Callable[[str], None]) -> None:
        while True:
            await self.look(tell, trouble)
            # A look is a few system calls; being told by the kernel (inotify) works on no network file system.
            await asyncio.sleep(self._interval_s)

    async def look(self, tell: Callable[[Sequence[Member]], None], trouble: Callable[[str], None]) -> None:
        """Look at it once."""
        path = self._path
        try:
            members, problem = await self._aside.ask(self._read, PATIENCE_S)
        except TimeoutError:
            trouble(f"{path}: it cannot be read within {PATIENCE_S:g} s")
        except FileNotFoundError:
            trouble(f"{path}: there is no such file")
        except OSError as error:
            trouble(f"{path}: it cannot be read: {error.strerror or error}")
        else:
            if problem:
                trouble(problem)
            else:
                tell(members)

    def _read(self) -> tuple[Sequence[Member], str]:
        """In the thread: the members, or else what is wrong with the file. Raises `OSError`."""
        path = self._path
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())  # of what is read, whatever the name stands for by then
                seen = _Seen(about.st_mtime_ns, about.st_size, about.st_ino, about.st_dev)
                if seen == self._seen and self._settled:
                    return self._last
                content = file.read(MAX_BYTES + 1)
        except OSError:
            self._seen = None
            raise
        self._seen, self._settled = seen, self._unix_s() - about.st_mtime_ns / 1e9 > SETTLED_S
        digest = hashlib.sha256(content).digest()
        if digest != self._digest:
            self._last = self._parsed(content)
            self._digest = digest
        return self._last

    def _parsed(self, content: bytes) -> tuple[Sequence[Member], str]:
        if len(content) > MAX_BYTES:
            return (), f"{self._path}: it has more than {MAX_BYTES} bytes"
        try:
            return read_members(str(self._path), content, self._check), ""
        except EntriesError as error:
            return (), str(error)
