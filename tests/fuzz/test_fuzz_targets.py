"""The fuzzer for some seconds, and what must hold for every input: nothing but the documented refusals, and no input
of 64 KB that takes 50 ms. `make fuzz` goes on for minutes.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
SECONDS = int(os.environ.get("FUZZ_SECONDS", "4"))
LARGE_BYTES = 65_536
SLOW_S = 0.05


def test_the_runner_knows_every_target() -> None:
    assert sorted(TARGETS) == sorted(run.NAMES)


@pytest.mark.parametrize("name", run.NAMES)
def test_what_the_fuzzer_starts_from_breaks_nothing(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


def test_nothing_breaks_in_some_seconds(tmp_path: Path) -> None:
    """With atheris where it is installed."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--seconds", str(SECONDS), "--corpus", str(tmp_path / "corpus")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=SECONDS + 120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    print(done.stderr[-1500:], done.stdout[-500:])


def test_what_breaks_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A target that cannot take two quotation marks in a row, which no seed has."""

    def brittle(data: bytes) -> None:
        assert b'""""' not in data

    monkeypatch.setitem(TARGETS, "body", Target(brittle, [b'{"a":1}']))
    with pytest.raises(AssertionError):
        run.by_chance(["body"], 60)
    assert "this input broke it" in capsys.readouterr().err


def large(seed: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    """The seed with one of its pieces over and over, which is what lets a quadratic reader show."""
    for _ in range(count):
        begin = rng.randrange(len(seed) or 1)
        piece = seed[begin : begin + rng.choice((1, 1, 2, 3, 8, 40))] or b"["
        yield seed[:begin] + piece * (LARGE_BYTES // len(piece)) + rng.choice((b"", seed[begin:]))


@pytest.mark.alone
@pytest.mark.parametrize("name", run.NAMES)
def test_64_kilobytes_never_take_50_milliseconds(name: str) -> None:
    target, rng = TARGETS[name], random.Random(6)
    bound_s = SLOW_S * target.passes
    target.run(target.seeds[0])  # what is made at the first use is not counted
    for seed in target.seeds:
        for data in large(seed, rng, 24):
            took_s = _cpu_s(target, data)
            if took_s >= bound_s:  # somebody else's work, perhaps
                took_s = min(_cpu_s(target, data) for _ in range(3))
            assert took_s < bound_s, f"{took_s * 1000:.0f} ms for {data[:80]!r}..."


def _cpu_s(target: Target, data: bytes) -> float:
    began = time.thread_time()
    target.run(data)
    return time.thread_time() - began
