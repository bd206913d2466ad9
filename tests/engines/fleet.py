"""The replicas of a test run: two SGLang, a llama.cpp and a vLLM, which all serve the same model.

Each is started when a test first asks for it, and again when an earlier test has ended it: a test may stop or kill
any of them. The address stays, so gateways that were started before find the new process.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.engines.llamacpp.replica import LlamaCpp
from tests.engines.replica import Kind, Replica, started
from tests.engines.sglang.replica import SGLang
from tests.engines.vllm.replica import VLLM

KINDS: dict[str, Kind] = {
    "sglang-1": SGLang(),
    "sglang-2": SGLang(),
    "vllm": VLLM(),
    "llamacpp": LlamaCpp(),
}
SPARE_BYTES = 1_000_000_000
"""Left to the tests, the gateway and everything else."""


class Fleet:
    """Replicas by name, running or not yet."""

    def __init__(self, folder: Path) -> None:
        """`folder` takes the engines' logs."""
        self._folder = folder
        # A short path: that of a Unix socket may have 107 characters.
        self._sockets = Path(tempfile.mkdtemp(prefix="tidegate-"))
        self._replicas: dict[str, Replica] = {}

    def begin(self, *names: str) -> None:
        """Start those of these replicas that do not run, without waiting for them. Raises `MemoryError`."""
        missing = [name for name in names if not self._staying(name)]
        self._check_memory(missing)
        for name in missing:
            self._start(name)

    def ready(self, *names: str) -> list[Replica]:
        """These replicas, all of them serving. What has to be started for it is started side by side."""
        self.begin(*names)
        for name in names:
            self._replicas[name].wait_ready()
        return [self._replicas[name] for name in names]

    def close(self) -> None:
        """End every process that was started."""
        for replica in self._replicas.values():
            replica.kill()
        shutil.rmtree(self._sockets)

    def _staying(self, name: str) -> bool:
        replica = self._replicas.get(name)
        return replica is not None and replica.staying

    def _start(self, name: str) -> None:
        earlier = self._replicas.get(name)
        if earlier is not None:
            earlier.kill()  # what its first process has left behind
        port = earlier.port if earlier else None
        self._replicas[name] = started(name, KINDS[name], self._folder, self._sockets, port)

    def _check_memory(self, names: list[str]) -> None:
        if not names:
            return
        available = _available_bytes()
        needed = sum(KINDS[name].memory_bytes for name in names) + SPARE_BYTES
        if available < needed:
            raise MemoryError(
                f"{', '.join(names)} need {needed / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are available"
            )


def _available_bytes() -> int:
    """What programs can still take without swapping, by the kernel's estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LookupError("/proc/meminfo has no MemAvailable")
