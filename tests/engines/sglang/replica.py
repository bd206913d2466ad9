"""Real SGLang servers on this machine's CPU, each ended with the test that started it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2

from backends.launch.tether import tethered
from tests.engines.sglang.install import MODEL, PYTHON, engine_environment

NAME = "tiny"
"""What SGLang calls its model; the gateway's clients know it by another name."""
RUNNING_LIMIT = 4
QUEUE_LIMIT = 2
START_LIMIT_S = 400.0
"""20 s on an idle machine; minutes where other programs hold the cores."""
STOP_LIMIT_S = 20.0

FLAGS = {
    "--model-path": str(MODEL),
    "--served-model-name": NAME,
    "--device": "cpu",
    "--dtype": "float32",  # no rounding that depends on the batch a request met
    "--attention-backend": "torch_native",
    "--tp": "1",
    "--host": "127.0.0.1",
    "--max-total-tokens": "32768",
    "--max-running-requests": str(RUNNING_LIMIT),
    "--max-queued-requests": str(QUEUE_LIMIT),
    # Of the formats for tool calls, one whose forced calls obey the switch against blanks below.
    "--tool-call-parser": "pythonic",
    "--random-seed": "0",
}
SWITCHES = (
    "--sleep-on-idle",  # an idle replica would else keep a core busy
    "--enable-cache-report",
    "--enable-metrics",
    "--constrained-json-disable-any-whitespace",  # random weights would fill the answer with blanks
)


@dataclass(frozen=True, slots=True)
class SGLang:
    """A running replica; `log` is what the engine itself wrote."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def running_requests(self) -> int:
        """Requests that the scheduler holds, by its own account: running or waiting."""
        answer = httpx2.get(f"{self.url}/v1/loads", trust_env=False, timeout=30).raise_for_status().json()
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in answer["loads"])

    def counter(self, name: str) -> float:
        """The sum of a counter of `/metrics` over all its labels."""
        text = httpx2.get(f"{self.url}/metrics", trust_env=False, timeout=30, follow_redirects=True).text
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, values))

    def terminate(self) -> None:
        """SIGTERM to the server's first process, as a supervisor would."""
        self.process.terminate()

    def kill(self) -> None:
        """SIGKILL to all its processes, and wait until they are gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def started_sglang(log: Path) -> Iterator[SGLang]:
    """Start a replica, which is not ready yet, and end it with the block."""
    if not PYTHON.exists() or not MODEL.exists():
        raise RuntimeError(
            "SGLang is not set up here: run `make test-engines`, or python -m tests.engines.sglang.install"
        )
    port = _free_port()
    command = [str(PYTHON), "-W", "ignore", "-m", "sglang.launch_server", "--port", str(port), *SWITCHES]
    for flag, value in FLAGS.items():
        command += [flag, value]
    with log.open("wb") as file:
        # A session of its own: its processes share a group that can be ended as one.
        process = subprocess.Popen(
            tethered(["nice", "-n", "5", *command]),
            env=engine_environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    replica = SGLang(f"http://127.0.0.1:{port}", log, process)
    try:
        yield replica
    finally:
        replica.kill()


def wait_ready(replica: SGLang) -> SGLang:
    """Wait until the replica serves; with its log in the error when it does not."""
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        if replica.process.poll() is not None:
            raise RuntimeError(f"SGLang ended with code {replica.process.returncode}:\n{_tail(replica.log)}")
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{replica.url}/health", trust_env=False, timeout=30).status_code == 200:
                return replica
        time.sleep(0.25)
    raise TimeoutError(f"SGLang was not ready within {START_LIMIT_S:g} s:\n{_tail(replica.log)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
