"""Recent requests of a real gateway, played again through simulated engines: `python -m loadtests.simulator.recent`.

Standard input is one JSON object: `rows` (times, lengths and prefix keys of requests, no text), `engines` (constants
of the replicas, as the gateway has learned them), `policies`, `seeds`. Standard output is a line of JSON for each run,
and a last one with everything. It gives way to whatever else runs on the machine, and stops after so many seconds of
processor time.

What the keys say of shared beginnings becomes the tree of a simulated cache: two prompts with the same key share all
that is before it. Arrivals are at the times they had, since another policy has the same clients.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

from loadtests.simulator import metrics
from loadtests.simulator.engine import Constants
from loadtests.simulator.fleet import Fleet, Seat
from loadtests.simulator.simulation import Simulation
from loadtests.simulator.traffic import Job, Workload
from routing.policies import make_policy
from routing.prefix import Prefix
from routing.types import Chooser

MAX_CPU_S = 120
NICENESS = 15
FIGURES = (
    "requests",
    "failed",
    "ttft_ms",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "total_ms",
    "total_p99_ms",
    "hit_rate",
    "load_cv",
    "busy",
)
_NO_KEYS = 1 << 70
"""Above every key, so that a prompt without keys is like no other."""


def main() -> int:
    """Returns the exit code: 1 for input that cannot be used."""
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 5))
    try:
        question = json.load(sys.stdin)
        for line in compared(question):
            print(json.dumps(line), flush=True)
    except (ValueError, KeyError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def compared(question: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line after each run; the last one has `result`: per policy the mean of each figure over the seeds, with its
    smallest and largest."""
    workload = workload_of(question["rows"])
    fleet = fleet_of(question["engines"])
    policies, seeds = list(question["policies"]), range(1, int(question["seeds"]) + 1)
    total, done = len(policies) * len(seeds), 0
    found: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    for policy in policies:
        for seed in seeds:
            gc.collect()
            gc.disable()  # a run makes millions of objects and hardly any cycles
            try:
                result = Simulation(workload, fleet, _maker(policy), seed).run()
            finally:
                gc.enable()
            found[policy].append(metrics.figures(result, workload, fleet))
            done += 1
            yield {"done": done, "of": total}
    yield {
        "result": {
            policy: {
                name: {
                    "mean": metrics.mean([run[name] for run in runs]),
                    "least": min(run[name] for run in runs),
                    "most": max(run[name] for run in runs),
                }
                for name in FIGURES
            }
            for policy, runs in found.items()
        }
    }


def _maker(policy: str) -> Callable[[Random], Chooser]:
    return lambda rng: make_policy(policy, rng)


def fleet_of(engines: Sequence[Mapping[str, Any]]) -> Fleet:
    """The replicas, each as far away as it is. The gateway is told how fast they are: the real one has learned it."""
    seats = tuple(Seat(Constants(**engine["constants"]), region=f"r{n}") for n, engine in enumerate(engines))
    rtt_ms = {("", f"r{n}"): float(engine["rtt_ms"]) for n, engine in enumerate(engines)}
    return Fleet(seats, rtt_ms=rtt_ms, told_speeds=True)


def workload_of(rows: Sequence[Mapping[str, Any]]) -> Workload:
    """Jobs at the times of the rows, which are in seconds of any clock."""
    ordered = sorted(rows, key=lambda row: float(row["at"]))
    begun = float(ordered[0]["at"])
    tree = Tree([row["prefix"] for row in ordered if row["prefix"] is not None], ordered)
    jobs: list[Job] = []
    for index, row in enumerate(ordered):
        keys = row["prefix"]
        tokens = max(1, int(row["prompt_tokens"]))
        if keys is None:
            path: list[tuple[int, int]] = [(_NO_KEYS + index, tokens)]
            prefix = Prefix([], [], tokens, [(index, tokens)], 1.0)
        else:
            path = tree.path(keys)
            tokens = sum(length for _, length in path)
            tails = [(int(digest), int(end)) for digest, end in keys["tails"]]
            prefix = Prefix(keys["digests"], keys["ends"], int(keys["total"]), tails, tree.unit_tokens)
        jobs.append(
            Job(
                index,
                float(row["at"]) - begun,
                tuple(path),
                tokens,
                max(1, int(row["output_tokens"])),
                -1 - index,
                prefix,
                priority=int(row["priority"]),
            )
        )
    return Workload("recent", jobs)


class Tree:
    """All keys of all prompts, each below the one that is known to stand before it."""

    def __init__(self, prefixes: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
        tokens = sum(int(row["prompt_tokens"]) for row in rows if row["prefix"] is not None)
        units = sum(int(prefix["total"]) for prefix in prefixes)
        self.unit_tokens = tokens / units if units else 1.0
        """One measure for all: in the gateway it changes a little with every answer."""
        self._before: dict[int, tuple[int, int]] = {}
        self._ends: dict[int, int] = {}
        for prefix in prefixes:
            marks = _marks(prefix)
            last = (0, 0)
            for end, digest in marks:
                self._ends[digest] = end
                # The nearest that any prompt knows of: equal keys have equal beginnings, so it holds for all of them.
                self._before[digest] = max(last, self._before.get(digest, (0, 0)))
                last = (end, digest)

    def path(self, prefix: Mapping[str, Any]) -> list[tuple[int, int]]:
        """A prompt as segments of a simulated cache: their numbers and their lengths in tokens."""
        found: list[tuple[int, int]] = []
        end, digest = _marks(prefix)[-1]
        while end:
            before = self._before[digest]
            length = self._tokens(end) - self._tokens(before[0])
            if length > 0:
                found.append((digest, length))
            end, digest = before
        return found[::-1] or [(_marks(prefix)[-1][1], 1)]

    def _tokens(self, end: int) -> int:
        return round(end * self.unit_tokens)


def _marks(prefix: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Positions and keys, the shortest first; one for each position."""
    marks = {int(end): int(digest) for digest, end in prefix["tails"]}
    marks |= dict(zip(map(int, prefix["ends"]), map(int, prefix["digests"]), strict=True))
    return sorted(marks.items())


if __name__ == "__main__":
    raise SystemExit(main())
