"""Replicas of real engines for `loadtests.real_chats`: started, emptied, asked for their own counters, ended."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx2

from backends.launch.llamacpp import LISTENING, Launch
from backends.launch.tether import tethered
from loadtests.fits.record import family
from loadtests.processes import stop

MODEL = "tiny"
"""What the engines call their model."""
SLOTS, SLOT_TOKENS = 4, 4096
FLUSH_LIMIT_S = 30.0


class EngineMissing(Exception):
    """The engine, or its model, is not set up here; the text says how to do it."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals of an engine's own since it started."""

    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    """Of these."""
    prompt_s: float = 0.0
    """llama.cpp: time it worked on prompts. SGLang: from arrival to first token."""
    processor_s: float = 0.0
    """Processor time of all its processes: what neighbours on the machine change least."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.prompt_s + other.prompt_s,
            self.processor_s + other.processor_s,
        )

    def __sub__(self, other: Counts) -> Counts:
        return self + Counts(-other.prompt_tokens, -other.cached_tokens, -other.prompt_s, -other.processor_s)


@dataclass(frozen=True, slots=True)
class Running:
    """One replica that serves."""

    url: str
    pid: int

    def processor_s(self) -> float:
        """Processor time so far of the process and all that descend from it. Linux only."""
        # The clock of another process's processor time, as clock_getcpuclockid(3) makes it up.
        return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in family(self.pid)) / 1e9


class Engines(Protocol):
    """Replicas of one kind."""

    engine: str
    """What the gateway's configuration calls it."""
    note: str
    """How they run, for the table."""

    def fresh(self, folder: Path) -> AbstractContextManager[Sequence[Running]]:
        """Replicas with empty caches, serving for the length of the block. Raises `EngineMissing`."""
        ...

    def counts(self, replica: Running) -> Counts: ...

    def close(self) -> None: ...


def total(text: str, name: str) -> float:
    """The sum of all series of this name on a page of metrics; 0 when there is none."""
    series = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, series))


def _metrics(url: str) -> str:
    answer = httpx2.get(f"{url}/metrics", trust_env=False, timeout=60, follow_redirects=True)
    return answer.raise_for_status().text


class LlamaCpp:
    """llama.cpp, started anew for each run. It caches the last prompt of every slot."""

    engine = "llamacpp"

    def __init__(self, replicas: int, prompt_cache_mib: int = 0, model: Path | None = None) -> None:
        """`model`: a GGUF file; None for the tiny one of `make test-engines`."""
        self._replicas = replicas
        self._prompt_cache_mib = prompt_cache_mib
        self._model = model
        name = model.name if model else "the tests' tiny model"
        self.note = f"{replicas} replicas, {name}, {SLOTS} slots and one thread each, --cache-ram {prompt_cache_mib}"

    @contextmanager
    def fresh(self, folder: Path) -> Iterator[Sequence[Running]]:
        from tests.engines.install import MODEL as FOLDER

        model = self._model or FOLDER / "model.gguf"
        if not model.exists():
            raise EngineMissing(f"{model} is not there; `make test-engines` makes the tests' model")
        launch = Launch(
            model=model, alias=MODEL, slots=SLOTS, ctx=SLOTS * SLOT_TOKENS, prompt_cache_mib=self._prompt_cache_mib
        )
        with ExitStack() as stack:
            yield [
                stack.enter_context(_launched(launch, folder / f"llamacpp-{number}.log"))
                for number in range(self._replicas)
            ]

    def counts(self, replica: Running) -> Counts:
        text = _metrics(replica.url)
        cached = total(text, "llamacpp:prompt_tokens_cached_total")
        computed = total(text, "llamacpp:prompt_tokens_total")  # without the cached ones, by its own help text
        prompt_s = total(text, "llamacpp:prompt_seconds_total")
        return Counts(computed + cached, cached, prompt_s, replica.processor_s())

    def close(self) -> None:
        """Nothing outlives a run."""


@contextmanager
def _launched(launch: Launch, log: Path) -> Iterator[Running]:
    with (
        log.open("wb") as file,
        subprocess.Popen(tethered(launch.command()), stdout=subprocess.PIPE, stderr=file) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            if not line.startswith(LISTENING):
                raise RuntimeError(f"llama.cpp did not start:\n{log.read_text(errors='replace')[-1500:]}")
            yield Running(line.removeprefix(LISTENING), process.pid)
        finally:
            stop(process)


class SGLang:
    """SGLang on the CPU, as the tests start it; its replicas stay for all runs, and are told to flush before each."""

    engine = "sglang"

    def __init__(self, replicas: int) -> None:
        self._count = replicas
        self._stack = ExitStack()
        self._replicas: list[Running] = []
        self.note = f"{replicas} replicas, the tests' tiny model, torch_native attention, 32,768 KV tokens each"

    @contextmanager
    def fresh(self, folder: Path) -> Iterator[Sequence[Running]]:
        if not self._replicas:
            self._start()
        for replica in self._replicas:
            self._flush(replica.url)
        yield self._replicas

    def _start(self) -> None:
        from tests.engines.environment import SetupError
        from tests.engines.replica import started
        from tests.engines.sglang.replica import SGLang as Kind

        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-")))
        try:
            replicas = [started(f"sglang-{number}", Kind(), folder, folder) for number in range(self._count)]
        except SetupError as error:
            raise EngineMissing(str(error)) from error
        for replica in replicas:
            self._stack.callback(replica.kill)
        for replica in replicas:
            replica.wait_ready()
        self._replicas = [Running(replica.url, replica.process.pid) for replica in replicas]

    @staticmethod
    def _flush(url: str) -> None:
        """It refuses while it has anything to do, its own health check for one."""
        end = time.monotonic() + FLUSH_LIMIT_S
        while httpx2.post(f"{url}/flush_cache", trust_env=False, timeout=60).status_code != 200:
            if time.monotonic() > end:
                raise RuntimeError(f"{url} does not flush its cache")
            time.sleep(0.5)

    def counts(self, replica: Running) -> Counts:
        text = _metrics(replica.url)
        return Counts(
            total(text, "sglang:prompt_tokens_total"),
            total(text, "sglang:cached_tokens_total"),
            total(text, "sglang:time_to_first_token_seconds_sum"),
            replica.processor_s(),
        )

    def close(self) -> None:
        self._stack.close()
