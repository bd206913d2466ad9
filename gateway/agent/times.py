"""What the agent remembers from one start to the next: how long servers took to be ready, and what runs now."""

from __future__ import annotations

import fcntl
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gateway.whole_files import replace_file

KEPT_STARTS: Final = 20


class StartTimes:
    """Seconds that the last starts of each pool took."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        """`known`: as a state file has it; what is of another shape is left out."""
        self.of: dict[str, list[float]] = {}
        for pool, values in known.items():
            if isinstance(values, list):
                numbers = [float(value) for value in values if isinstance(value, int | float) and value >= 0]
                self.of[str(pool)] = numbers[-KEPT_STARTS:]

    def took(self, pool: str, seconds: float) -> None:
        times = self.of.setdefault(pool, [])
        times.append(round(seconds, 3))
        del times[:-KEPT_STARTS]

    def usual_s(self, pool: str) -> float | None:
        """The median; None before the first."""
        times = self.of.get(pool)
        return statistics.median(times) if times else None


class AlreadyRunning(Exception):
    """Another agent of this name runs on this machine; the message has its process id."""


class StateFile:
    """`fleet/<agent>.json` in the state directory, and a lock beside it that says whether the agent lives."""

    def __init__(self, folder: Path, agent: str) -> None:
        self.path = folder / f"{agent}.json"
        self._lock_path = folder / f"{agent}.lock"
        self._lock: int | None = None

    def read(self) -> dict[str, Any]:
        """What was written last; empty where there is nothing that can be read."""
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def lock(self) -> None:
        """Until this process ends. Raises `AlreadyRunning` and `OSError`."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AlreadyRunning(f"an agent of this name runs already (process {self.pid() or '?'})") from None
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def locked(self) -> bool:
        """Whether the agent of this file lives."""
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def pid(self) -> int | None:
        """Of the agent that wrote last."""
        pid = self.read().get("pid")
        return pid if isinstance(pid, int) and pid > 1 else None

    def write(self, content: Mapping[str, Any]) -> None:
        """Whole or not at all. Raises `OSError`."""
        replace_file(self.path, json.dumps(content).encode())


def put_order(folder: Path, agent: str, what: str) -> None:
    """Leave word for the agent which server, or whose servers, are to go (SIGUSR1 has it look)."""
    with (folder / f"{agent}.down").open("a", encoding="utf-8") as file:
        file.write(what + "\n")


def take_orders(folder: Path, agent: str) -> list[str]:
    """What was left, once."""
    path = folder / f"{agent}.down"
    taken = path.with_suffix(".taken")
    try:
        path.replace(taken)
        text = taken.read_text(encoding="utf-8")
        taken.unlink()
    except OSError:
        return []
    return text.split()
