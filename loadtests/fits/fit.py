"""Fit the constants of an engine to what `loadtests.fits.record` recorded of it.

    python -m loadtests.fits.fit loadtests/fits/recorded/*.jsonl.gz [--write]

Two least-squares fits with relative weights and coefficients that are not negative:

    time per token  =  step + request * running + kv * tokens held      where nothing is prefilled
    first token     =  base + prefill * u * (1 + curve * position)      where nothing else runs

`u` are the uncached tokens, their mean position is prompt - u/2, and a prompt of more than one chunk pays a step more
for each. Three requests of four are fitted. The errors printed are those of the fourth, and of three phases that were
not fitted: there the first token is predicted as the default policy does, from what was queued and running when the
request was sent. With `--write` the constants go into engines.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = Path(__file__).parent / "engines.json"
HELD_OUT = 4
"""One request of so many is not fitted."""


@dataclass(frozen=True, slots=True)
class Served:
    """One recorded request, times in milliseconds of the clock that is fitted."""

    phase: str
    sent: float
    first: float
    last: float
    wall_ttft: float
    prompt: int
    cached: int
    output: int
    others: int
    tokens_at: tuple[float, ...]
    """When each token came, the first included."""

    @property
    def uncached(self) -> int:
        return max(1, self.prompt - self.cached)

    @property
    def ttft(self) -> float:
        return self.first - self.sent


@dataclass(frozen=True, slots=True)
class Constants:
    """As in `routing.speed`; `rtt_ms` is what a first token takes beyond a step and its prefill."""

    prefill_ms: float
    curve: float
    step_ms: float
    request_ms: float
    kv_ms: float
    rtt_ms: float
    chunk: int


def load(path: Path) -> tuple[dict[str, Any], list[Served]]:
    """The header and the requests, in the order in which they were sent."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        header = json.loads(next(file))
        served = [_served(json.loads(line)) for line in file]
    return header, sorted(served, key=lambda each: each.sent)


def _served(row: list[Any]) -> Served:
    phase, sent, first, _, sent_cpu, first_cpu, last_cpu, prompt, cached, output, others, gaps = row
    at = [first_cpu]
    for gap in gaps:
        at.append(at[-1] + gap / 10)
    return Served(phase, sent_cpu, first_cpu, last_cpu, first - sent, prompt, cached, output, others, tuple(at))


def never_negative(features: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> list[float]:
    """Least squares of the relative errors; whichever coefficient would be the most negative is left out in turn."""
    weighted = features / y[:, None]
    kept = list(range(features.shape[1]))
    while True:
        solution = np.linalg.lstsq(weighted[:, kept], np.ones(len(y)), rcond=None)[0]
        if (solution >= 0).all() or len(kept) == 1:
            break
        del kept[int(np.argmin(solution))]
    coefficients = [0.0] * features.shape[1]
    for place, value in zip(kept, solution, strict=True):
        coefficients[place] = max(0.0, float(value))
    return coefficients


def decode_samples(served: Sequence[Served]) -> list[tuple[float, float, float]]:
    """Milliseconds per token, running requests and tokens held, one sample per answer: of the longest stretch of it in
    which nothing was prefilled and nobody came or went."""
    changes = sorted({time for each in served for time in (each.sent, each.first, each.last)})
    samples = []
    for each in served:
        if len(each.tokens_at) < 16:
            continue
        best: tuple[int, float, float] = (0, 0.0, 0.0)
        inside = [time for time in changes if each.first <= time <= each.last]
        for start, end in pairwise(inside):
            if any(other.sent <= start < other.first for other in served):
                continue
            best = max(best, (sum(start <= time <= end for time in each.tokens_at), start, end))
        count, start, end = best
        if count < 8:
            continue
        stretch = [time for time in each.tokens_at if start <= time <= end]
        middle = (start + end) / 2
        running = [other for other in served if other.first <= middle < other.last]
        held = sum(other.prompt + sum(time <= middle for time in other.tokens_at) for other in running)
        samples.append(((stretch[-1] - stretch[0]) / (len(stretch) - 1), float(len(running)), float(held)))
    return samples


def fitted(served: Sequence[Served], chunk: int) -> tuple[Constants, float, float]:
    """The constants, and the median relative errors of the requests held out: time per token, first token."""
    samples = decode_samples([each for each in served if each.phase == "batch"])
    gaps = np.array([sample for number, sample in enumerate(samples) if number % HELD_OUT])
    held_gaps = np.array(samples[::HELD_OUT])
    step, request, kv = never_negative(_with_ones(gaps[:, 1:]), gaps[:, 0])
    gap_error = _median_error(_with_ones(held_gaps[:, 1:]) @ [step, request, kv], held_gaps[:, 0])

    alone = [each for each in served if each.phase == "alone"]
    rows = np.array(
        [
            (
                each.ttft - step * ((each.uncached - 1) // chunk),
                each.uncached,
                each.uncached * (each.prompt - each.uncached / 2),
            )
            for each in alone
        ]
    )
    fit, held = rows[np.arange(len(rows)) % HELD_OUT > 0], rows[::HELD_OUT]
    base, prefill, second = never_negative(_with_ones(fit[:, 1:]), fit[:, 0])
    ttft_error = _median_error(_with_ones(held[:, 1:]) @ [base, prefill, second], held[:, 0])
    constants = Constants(prefill, second / prefill, step, request, kv, max(0.0, base - step), chunk)
    return constants, gap_error, ttft_error


def predicted_ttft(each: Served, served: Sequence[Served], constants: Constants) -> float:
    """As `routing.policies.cost` does, from what is known when the request is sent."""
    ahead = [other for other in served if other.sent < each.sent < other.first]
    running = [other for other in served if other.first <= each.sent < other.last]
    step = constants.step_ms + constants.request_ms * len(running)
    step += constants.kv_ms * sum(other.prompt for other in running)
    uncached = each.uncached
    prefill = constants.prefill_ms * uncached * (1 + constants.curve * (each.prompt - uncached / 2))
    ttft = constants.rtt_ms + step + prefill
    tokens = uncached
    if ahead:
        # The policy has one price per token for what is queued: here that of a token at its mean position.
        wait = sum(
            constants.prefill_ms * other.uncached * (1 + constants.curve * (other.prompt - other.uncached / 2))
            for other in ahead
        )
        since = max([min(other.sent for other in ahead), *(o.first for o in served if o.first <= each.sent)])
        ttft += wait - min(each.sent - since, 0.9 * wait / len(ahead))
        tokens += sum(other.uncached for other in ahead)
    return ttft + step * tokens / constants.chunk


def unseen(served: Sequence[Served], phase: str, constants: Constants) -> tuple[float, float, int]:
    """Median relative error and median of predicted / observed over a phase that was not fitted, and how many."""
    here = [each for each in served if each.phase == phase and each.ttft > 0]
    predicted = np.array([predicted_ttft(each, here, constants) for each in here])
    observed = np.array([each.ttft for each in here])
    return _median_error(predicted, observed), float(np.median(predicted / observed)), len(here)


def _with_ones(features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.column_stack([np.ones(len(features)), features])


def _median_error(predicted: np.ndarray[Any, Any], observed: np.ndarray[Any, Any]) -> float:
    return float(np.median(np.abs(predicted / observed - 1.0)))


def report(header: dict[str, Any], served: Sequence[Served], chunk: int) -> Constants:
    constants, gap_error, ttft_error = fitted(served, chunk)
    slowed = np.median([each.wall_ttft / each.ttft for each in served if each.phase == "alone" and each.ttft > 0])
    loads = "/".join(f"{each:.1f}" for each in header["load_average"])
    print(f"{header['name']}: {len(served)} requests, {header['when']}, {header['cores']} cores, load {loads}")
    print(f"  wall time is {slowed:.2f} x the processor time of a request alone (median)")
    print(f"  {constants}")
    print(f"  held out: time per token ±{gap_error:.1%}, first token alone ±{ttft_error:.1%} (medians)")
    for phase in ("cached", "join", "mixed"):
        error, ratio, count = unseen(served, phase, constants)
        print(f"  not fitted, {phase}: first token ±{error:.0%}, predicted / observed {ratio:.2f} ({count} requests)")
    return constants


def entry(header: dict[str, Any], constants: Constants, kv_tokens: int, max_running: int) -> dict[str, Any]:
    """What engines.json has of it."""
    names = ("prefill_ms", "curve", "step_ms", "request_ms", "kv_ms", "rtt_ms")
    rounded = {name: float(f"{getattr(constants, name):.3g}") for name in names}
    source = f"fitted to recorded/{header['name']}.jsonl.gz: {header['note']}"
    return {
        **rounded,
        "chunk": constants.chunk,
        "kv_tokens": kv_tokens,
        "max_running": max_running,
        "source": source,
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.fits.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recorded", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put the constants into engines.json")
    arguments = parser.parse_args(argv)
    engines = json.loads(ENGINES.read_text())
    for path in arguments.recorded:
        header, served = load(path)
        constants = report(header, served, header["chunk"])
        engines[header["name"]] = entry(header, constants, header["kv_tokens"], header["max_running"])
    if arguments.write:
        ENGINES.write_text(json.dumps(engines, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
