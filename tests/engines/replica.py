"""A real engine as a process of its own, whichever engine it is: started, asked for its own truth, ended.

What differs between engines is a `Kind`, one module each (`sglang/`, `vllm/`, `llamacpp/`). Nothing here or there uses
Tidegate's code to read an engine: the tests compare the two.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2

from backends.launch.tether import tethered
from loadtests.ports import free_port

NAME = "tiny"
"""What the engines call their model; the gateway's clients know it by another name."""
RUNNING_LIMIT = 4
"""Requests that every replica works on at the same time; more wait inside it."""
ADAPTERS = ("ebb", "flow")
"""LoRA adapters that every replica starts with."""
LATER = "spring"
"""One that can be loaded while the engine runs (llama.cpp cannot: it has it from the start)."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What an engine says of itself. Totals since its start; None where it does not say."""

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    aborted: int | None


class Kind(Protocol):
    """One kind of engine: how it is started, addressed and asked."""

    engine: str
    """What Tidegate's configuration calls it."""
    memory_bytes: int
    """Of one replica, all its processes together."""
    start_limit_s: float
    stop_limit_s: float
    """How long it may take to end after SIGTERM."""

    def command(self, port: int, sockets: Path) -> list[str]:
        """What runs it; `sockets` is a folder for it to publish KV events in. Raises `SetupError`."""
        ...

    def environment(self) -> dict[str, str]: ...

    def addressed(self, adapter: str | None) -> dict[str, Any]:
        """The fields of a body that ask this engine for its model, or for one of its adapters."""
        ...

    def counts(self, url: str) -> Counts:
        """What the engine at `url` says of itself."""
        ...


@dataclass(slots=True)
class Replica:
    """A running engine. `log` is what the engine itself wrote; its address outlives a restart."""

    name: str
    kind: Kind
    port: int
    log: Path
    sockets: Path
    process: subprocess.Popen[bytes]
    leaving: bool = False
    """It was told to stop."""
    serving: bool = False
    """It was seen to serve."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def staying(self) -> bool:
        """Running, and not told to stop."""
        return not self.leaving and self.process.poll() is None

    def counts(self) -> Counts:
        return self.kind.counts(self.url)

    def busy(self) -> int:
        """Requests that the engine works on or has waiting, by its own account."""
        counts = self.counts()
        return counts.running + counts.waiting

    def terminate(self) -> None:
        """SIGTERM to the server's first process, as a supervisor would."""
        self.leaving = True
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL to all its processes, and wait until they are gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_ready(self) -> None:
        """Wait until it serves; raises with its log's end when it does not. Asks once in its life."""
        if self.serving:
            return
        end = time.monotonic() + self.kind.start_limit_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with code {self.process.returncode}:\n{_tail(self.log)}")
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", trust_env=False, timeout=30).status_code == 200:
                    self.serving = True
                    return
            time.sleep(0.25)
        raise TimeoutError(f"{self.name} was not ready within {self.kind.start_limit_s:g} s:\n{_tail(self.log)}")


def started(name: str, kind: Kind, folder: Path, sockets: Path, port: int | None = None) -> Replica:
    """Start a replica, which is not ready yet. Whoever starts it kills it."""
    port = port or free_port()
    log = folder / f"{name}-{time.monotonic_ns()}.log"
    with log.open("wb") as file:
        # A session of its own: its processes share a group that can be ended as one.
        process = subprocess.Popen(
            tethered(["nice", "-n", "5", *kind.command(port, sockets)]),
            env=kind.environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Replica(name, kind, port, log, sockets, process)


@dataclass(frozen=True, slots=True)
class Metrics:
    """A page of Prometheus metrics, read anew."""

    text: str

    @classmethod
    def of(cls, url: str) -> Metrics:
        answer = httpx2.get(f"{url}/metrics", trust_env=False, timeout=30, follow_redirects=True)
        return cls(answer.raise_for_status().text)

    def total(self, name: str, labels: Mapping[str, str] | None = None) -> int:
        """The sum of all series of this name that have these labels; 0 when there is none."""
        series = re.findall(rf"^{re.escape(name)}(\{{[^}}]*\}})? (\S+)$", self.text, re.MULTILINE)
        wanted = [f'{key}="{value}"' for key, value in (labels or {}).items()]
        return int(sum(float(value) for found, value in series if all(pair in found for pair in wanted)))


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
