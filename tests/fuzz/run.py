"""Fuzzes some targets for some seconds: ``python -m tests.fuzz.run body edge --seconds 60``; no name means all.

Guided by coverage with atheris, where that is installed (docs/security.md says where it is not); else inputs are made
from the seeds by chance. Ends with code 0, or with the traceback and the input of what broke. ``--corpus DIR`` keeps
what atheris found interesting for the next run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MAX_INPUT_BYTES = 4096
SLOW_S = 1.0
"""CPU seconds for one input: instrumented, on a busy machine. Growth with size is looked at by a test of its own."""
_INSTRUMENTED = ("gateway", "backends")


def one_of(names: Sequence[str]) -> Callable[[bytes], None]:
    """One function for all these targets: the first byte of an input chooses."""
    from tests.fuzz.targets import TARGETS

    chosen = [TARGETS[name].run for name in names]

    def run(data: bytes) -> None:
        if data:
            began = time.thread_time()
            chosen[data[0] % len(chosen)](data[1:])
            took_s = time.thread_time() - began
            assert took_s < SLOW_S, f"{names[data[0] % len(chosen)]}: {took_s:.2f} s of CPU for {len(data)} bytes"

    return run


def seeds_of(names: Sequence[str]) -> list[bytes]:
    from tests.fuzz.targets import TARGETS

    return [bytes([number]) + seed for number, name in enumerate(names) for seed in TARGETS[name].seeds]


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, dropped, doubled or moved."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16))
        match rng.randrange(5):
            case 0:
                data[at : at + length] = rng.randbytes(length)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 20))
            case 3:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + length]
            case _:
                data[at : at + 1] = rng.choice(
                    (b"\r\n", b"\n", b"\0", b'"', b"\\", b"{", b"]", b":", b"\xff", b"9" * 30)
                )
    return bytes(data[:MAX_INPUT_BYTES])


def by_chance(names: Sequence[str], seconds: float) -> None:
    run, seeds, rng = one_of(names), seeds_of(names), random.Random(6)
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        data = mutated(rng.choice(seeds), rng)
        try:
            run(data)
        except Exception:
            print("this input broke it:", data, file=sys.stderr)
            raise
        count += 1
    print(f"{count} inputs by chance: nothing broke")


def guided(names: Sequence[str], seconds: int, corpus: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        run = one_of(names)
    for number, seed in enumerate(seeds_of(names)):
        (corpus / f"seed-{number:03d}").write_bytes(seed)

    def shown(data: bytes) -> None:
        try:
            run(data)
        except Exception:
            print("this input broke it:", data, file=sys.stderr)
            raise

    options = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", "-timeout=20", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/", "-seed=6", str(corpus)], shown)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--corpus", type=Path, help="a folder to keep what was found interesting (default: none)")
    parser.add_argument("--by-chance", action="store_true", help="without atheris, even where it is installed")
    options = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        options.by_chance = True
    if options.by_chance:
        by_chance(options.targets or NAMES, options.seconds)
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        corpus = options.corpus or Path(folder)
        corpus.mkdir(parents=True, exist_ok=True)
        guided(options.targets or NAMES, options.seconds, corpus)


NAMES = (
    "anthropic_request", "anthropic_stream", "authorization", "body", "edge", "http1", "kvevents", "prometheus",
    "prompt", "stream", "upstream_error",
)  # fmt: skip
"""All targets, without importing what they import: atheris has to see that happen."""


if __name__ == "__main__":
    main()
