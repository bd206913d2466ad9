"""Send recorded requests to the simulator's engine model, at the times of the recording, and compare what comes out.

    python -m loadtests.fits.replay loadtests/fits/recorded/*.jsonl.gz

This is the test of the model itself rather than of its constants: the phases `batch`, `join` and `mixed` have several
requests at once, and none of them was used to fit a first token. Every request finds as much cached as the real one
reported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from heapq import heappop, heappush
from pathlib import Path
from statistics import median

from loadtests.fits.fit import ENGINES, Served, load
from loadtests.simulator.engine import Engine
from loadtests.simulator.engine import Sequence as Running
from loadtests.simulator.fleet import engines_in
from loadtests.simulator.traffic import Job
from routing.prefix import Prefix

PHASES = ("batch", "join", "mixed")


def replayed(served: Sequence[Served], engine_name: str, rtt_ms: float = 0.0) -> list[tuple[Served, float, float]]:
    """Each request with its simulated time to first token and to the end, in milliseconds. `rtt_ms` is added, for which
    the engine model has no constant."""
    times: dict[int, list[float]] = {number: [0.0, 0.0] for number in range(len(served))}

    def first(sequence: Running, now: float) -> None:
        times[sequence.tag][0] = now

    def finish(sequence: Running, now: float) -> None:
        times[sequence.tag][1] = now

    engine = Engine(engines_in()[engine_name], first, finish)
    events: list[tuple[float, int, int]] = []
    for number, each in enumerate(served):
        heappush(events, (each.sent / 1000.0, number, number))
    planned: float | None = None
    while events or planned is not None:
        if planned is not None and (not events or planned <= events[0][0]):
            planned = engine.wake(planned)
            continue
        now, _, number = heappop(events)
        again = engine.submit(_sequence(served[number], number, engine), now)
        planned = planned if again is None else again
    return [
        (each, begun * 1000.0 - each.sent + rtt_ms, ended * 1000.0 - each.sent + rtt_ms)
        for each, (begun, ended) in zip(served, times.values(), strict=True)
    ]


def _sequence(each: Served, number: int, engine: Engine) -> Running:
    prefix = Prefix([], [], each.prompt, [], 1.0)
    path = [(3 * number + 1, each.prompt - each.cached)]
    if each.cached:
        path.insert(0, (3 * number, each.cached))
        # Somebody has computed it before, and has just gone.
        engine.cache.extend(3 * number, None, each.cached)
        engine.cache.lock(path, 0, 1)
        engine.cache.unlock(path, 1)
    job = Job(number, each.sent / 1000.0, tuple(path), each.prompt, max(1, each.output), 3 * number + 2, prefix)
    return Running(job, number)


def compare(name: str, served: Sequence[Served], rtt_ms: float) -> list[str]:
    """A line per phase: medians of simulated / recorded and of the relative error."""
    lines = []
    for phase in PHASES:
        rows = replayed([each for each in served if each.phase == phase], name, rtt_ms)
        rows = [row for row in rows if row[0].ttft > 0]
        firsts = [simulated / each.ttft for each, simulated, _ in rows]
        totals = [simulated / (each.last - each.sent) for each, _, simulated in rows]
        error, total_error = (median(abs(ratio - 1.0) for ratio in ratios) for ratios in (firsts, totals))
        mean = sum(simulated for _, simulated, _ in rows) / sum(each.ttft for each, _, _ in rows)
        lines.append(
            f"  {phase}: first token simulated / recorded {median(firsts):.2f} (of the means {mean:.2f}), error"
            f" ±{error:.0%}; end {median(totals):.2f}, ±{total_error:.0%} ({len(rows)} requests)"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    for path in argv:
        header, served = load(Path(path))
        rtt_ms = json.loads(ENGINES.read_text())[header["name"]]["rtt_ms"]
        print(header["name"])
        print("\n".join(compare(header["name"], served, rtt_ms)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
