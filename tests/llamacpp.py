"""Real llama.cpp replicas for tests: SmolLM2 on a free port, ended with the test that started it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backends.launch.llamacpp import LISTENING, Launch
from backends.launch.tether import tethered
from gateway.demo.preflight import weights


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A running replica of the model `smollm2`; `log` is what the engine itself wrote."""

    url: str
    pid: int
    log: Path


@contextmanager
def running_llamacpp(log: Path, *, slots: int = 2) -> Iterator[LlamaCpp]:
    """Run a replica for as long as the block lasts."""
    model = weights()
    assert model is not None, "the demo's weights are not installed; `make test` installs them"
    command = tethered(Launch(model=model, alias="smollm2", slots=slots, embeddings=True).command())
    with log.open("wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            assert line.startswith(LISTENING), log.read_text()
            yield LlamaCpp(url=line.removeprefix(LISTENING), pid=process.pid, log=log)
        finally:
            process.terminate()
            process.wait(10)
