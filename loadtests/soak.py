"""Hours in minutes: a gateway under everything that goes wrong at once, and what is left of it afterwards.

``python -m loadtests.soak --seconds 600 --workers 2 --write docs/reliability.md``

A real gateway (keys, Redis, limits, queue) in front of three fake engines in processes of their own. Clients succeed,
fail, are refused, leave in every phase and read slowly or never; engines are killed and come back, Redis too, and the
configuration is reloaded. When all is over, leases and gauges must be 0, descriptors, threads and tasks where they
were, every request on record exactly once and charged with what was served, and memory must not have grown in the
second half. Then the gateway (or one of two workers) is killed with requests under way: its leases have to run out by
themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.processes import StartFailed
from loadtests.report import insert, machine
from loadtests.served_log import read_log
from loadtests.soak_books import Books, Slope, slope
from loadtests.soak_fleet import LEASE_S, Gateway, Process, Redis, engine, killed_at_the_end
from loadtests.soak_traffic import WAYS, Traffic, told

BEGIN, END = "<!-- soak: written by loadtests.soak -->", "<!-- /soak -->"
ENGINES = 3
GOAL_MB_PER_HOUR = 1.0
REST_WITHIN_S = 2 * LEASE_S
HELD, LEASES_EACH = 20, 3
"""Requests under way at the kill; each has a lease of its key, of its tenant, and a place in the pool."""
IDLE_S = 4.0
"""Idle connections to engines are closed after 3 s."""
GAUGES = (
    "tidegate_in_flight", "tidegate_request_bytes_held", "tidegate_replica_in_flight", "tidegate_queue_waiting",
    "tidegate_store_untold",
)  # fmt: skip
"""Whatever counts something that is held. All of them are 0 when nobody asks."""


@dataclass(frozen=True)
class Plan:
    """How long and how hard."""

    seconds: float = 600.0
    warm_up_s: float = 60.0
    users: int = 24
    pause_s: float = 0.3
    """Mean pause of a user between two requests."""
    workers: int = 2
    every_s: float = 5.0
    """Between two things that break."""
    seed: int = 6
    end_by_kill: bool = True


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the gateway's processes hold."""

    descriptors: int
    threads: int
    tasks: int


@dataclass(slots=True)
class Result:
    """What a soak found."""

    plan: Plan
    before: Footprint
    after: Footprint
    slope: Slope
    rss_mb: tuple[float, float]
    """At the beginning of the second half, and at its end."""
    grown_mb: float
    leases_left: int
    gauges_left: dict[str, float]
    broken: dict[str, int]
    """What was done, how often."""
    figures: dict[str, Any]
    states: dict[str, int]
    killed: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Soak:
    """One run in a folder of its own."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.engines = [engine(folder, f"r{number}") for number in range(ENGINES)]
        self.redis = Redis(folder)
        self.gateway = Gateway(folder, self.engines, self.redis, plan.workers)
        self.traffic = Traffic(self.gateway.port, self.gateway.keys, plan.seed, plan.pause_s)
        self.memory: list[tuple[float, float]] = []
        self.broken: Counter[str] = Counter()

    async def run(self) -> Result:
        processes: list[Process] = [*self.engines, self.redis, self.gateway]
        with killed_at_the_end(*processes):
            for process in processes:
                await process.start()
            await self._under_load(self.plan.warm_up_s)
            await self._rest()
            before = await self._footprint()
            self.memory.clear()
            await self._under_load(self.plan.seconds)
            gauges, leases = await self._rest()
            after = await self._footprint()
            books = await self._books()
            figures = books.audit()
            killed = await self._killed() if self.plan.end_by_kill else {}
        half = self.memory[len(self.memory) // 2 :]
        tenth = max(1, len(half) // 10)
        first, last = (sum(mb for _, mb in part) / tenth for part in (half[:tenth], half[-tenth:]))
        result = Result(
            self.plan, before, after, slope(half), (round(first, 1), round(last, 1)), round(last - first, 2), leases,
            gauges, dict(self.broken), figures,
            dict(Counter(each.state for each in self.traffic.seen)), killed, books.problems,
        )  # fmt: skip
        result.problems += residue(result)
        return result

    # -- the load

    async def _under_load(self, seconds: float) -> None:
        self.traffic.over.clear()
        load = asyncio.create_task(self.traffic.run(self.plan.users))
        sampling = asyncio.create_task(self._sample())
        breaking = asyncio.create_task(self._break())
        try:
            await asyncio.sleep(seconds)
        finally:
            sampling.cancel()
            self.traffic.over.set()
            await asyncio.wait([load])
            await asyncio.wait([breaking, sampling])
        load.result()
        breaking.result()

    async def _sample(self) -> None:
        """As evenly as the machine allows; both forms get some hundreds of samples."""
        every_s = min(1.0, self.plan.seconds / 200)
        for number in itertools.count(1):
            self.memory.append((time.monotonic(), self.gateway.rss_mb()))
            await asyncio.sleep(max(0.0, self.memory[0][0] + number * every_s - time.monotonic()))

    async def _break(self) -> None:
        """One thing after another, until the load is over; what is broken is mended."""
        deeds: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("engine killed", lambda: self._kill(self.engines[0], 1.0)),
            ("reload", self._reload),
            ("Redis killed", lambda: self._kill(self.redis, 1.5)),
            ("engine killed", lambda: self._kill(self.engines[1], 2.0)),
            ("reload", self._reload),
            ("all engines killed", self._kill_all),
        ]
        for name, deed in itertools.cycle(deeds):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.traffic.over.wait(), self.plan.every_s)
            if self.traffic.over.is_set():
                return
            await deed()
            self.broken[name] += 1

    async def _kill(self, process: Process, away_s: float) -> None:
        process.kill()
        await asyncio.sleep(away_s)
        await process.start()

    async def _kill_all(self) -> None:
        await asyncio.gather(*(self._kill(each, 1.0) for each in self.engines))

    async def _reload(self) -> None:
        self.gateway.reload(2.0 + (self.broken["reload"] % 2) * 0.5)

    # -- what is left

    async def _rest(self) -> tuple[dict[str, float], int]:
        """Wait until nothing is held any more, at most twice as long as a lease lasts; what is held then."""
        deadline = time.monotonic() + REST_WITHIN_S
        await asyncio.sleep(IDLE_S)
        while True:
            sample = await self.gateway.metrics()
            held = {name: sum(value for (found, _), value in sample.items() if found == name) for name in GAUGES}
            gauges = {name: value for name, value in held.items() if value}
            leases = len(await self.redis.leases())
            if (not gauges and not leases) or time.monotonic() > deadline:
                return gauges, leases
            await asyncio.sleep(0.25)

    async def _footprint(self) -> Footprint:
        """The least of some looks: probes and scrapes come and go."""
        found = []
        for _ in range(8):
            tasks = sum(v for (name, _), v in (await self.gateway.metrics()).items() if name == "tidegate_tasks")
            await asyncio.sleep(0.1)
            found.append((self.gateway.descriptors(), self.gateway.threads(), round(tasks)))
        return Footprint(*(min(each[number] for each in found) for number in range(3)))

    async def _books(self) -> Books:
        sample = await self.gateway.metrics()
        counted: dict[str, float] = {}
        for (name, labels), value in sample.items():
            if name == "tidegate_requests_total":
                outcome = labels.partition('outcome="')[2].partition('"')[0]
                counted[outcome] = counted.get(outcome, 0.0) + value
        refused = sum(value for (name, _), value in sample.items() if name == "tidegate_refused_total")
        path = self.folder / "usage.jsonl"
        usage = [json.loads(line) for line in await asyncio.to_thread(lambda: path.read_bytes().splitlines())]
        served = [line for number in range(ENGINES) for line in read_log(self.folder / f"r{number}.served")]
        return Books(self.traffic.seen, usage, counted, refused, served)

    # -- the end by force

    async def _killed(self) -> dict[str, Any]:
        """Kill a worker, or the gateway where it has only one, that holds leases. Nothing renews them."""
        body = {"chunks": 1000, "interval_s": 0.2}
        held = [asyncio.create_task(self._hold(body)) for _ in range(HELD)]
        try:
            async with asyncio.timeout(20.0):
                while len(await self.redis.leases()) < HELD * LEASES_EACH:  # noqa: ASYNC110 - it is in another process
                    await asyncio.sleep(0.1)
            leases = await self.redis.leases()
            workers = await self.gateway.worker_pids() if self.plan.workers > 1 else [self.gateway.pid]
            os.kill(workers[0], signal.SIGKILL)
            killed_s = time.monotonic()
        finally:
            if self.plan.workers > 1:
                await asyncio.sleep(1.0)
            for task in held:
                task.cancel()
            await asyncio.wait(held)
        longest_s = max(await self.redis.leases(), default=0.0)
        found: dict[str, Any] = {"held": len(leases), "longest_left_s": round(longest_s, 1)}
        if self.plan.workers > 1:  # else a lease's time is waited for where experiment 19 does it
            while await self.redis.leases() and time.monotonic() - killed_s < REST_WITHIN_S:  # noqa: ASYNC110
                await asyncio.sleep(0.25)
            found |= {
                "freed_after_s": round(time.monotonic() - killed_s, 1),
                "left": len(await self.redis.leases()),
                "workers": len(await self.gateway.worker_pids()),
            }
        return found

    async def _hold(self, fake: dict[str, Any]) -> None:
        headers = {"authorization": f"Bearer {self.gateway.keys['open']}"}
        body = {"model": "m", "messages": [{"role": "user", "content": "hold"}], "stream": True, "fake": fake}
        url = f"http://127.0.0.1:{self.gateway.port}/v1/chat/completions"
        with contextlib.suppress(httpx2.HTTPError):
            async with httpx2.AsyncClient(trust_env=False, timeout=60.0, headers=headers) as client:
                await client.post(url, json=body)


def residue(result: Result) -> list[str]:
    """What must not be left over."""
    found = []
    if result.leases_left:
        found.append(f"{result.leases_left} leases are left in Redis")
    found += [f"{name} is {value:g}" for name, value in result.gauges_left.items()]
    for name, spare in (("descriptors", 4), ("threads", 4), ("tasks", 4)):
        before, after = getattr(result.before, name), getattr(result.after, name)
        if after > before * 1.05 + spare:
            found.append(f"{name}: {before} before, {after} after")
    killed = result.killed
    if killed and killed["longest_left_s"] > LEASE_S + 1:
        found.append(f"a lease of a killed process holds for {killed['longest_left_s']} s")
    if killed.get("left"):
        found.append(f"{killed['left']} leases of a killed worker are left")
    return found


def too_steep(result: Result, most_mb_per_hour: float) -> str:
    """Why the memory's slope is not flat: its interval lies above the bound; empty when it does not.

    A short run resolves little: what it can say is that no leak above `slope + error` shows.
    """
    least = result.slope.mb_per_hour - result.slope.error_mb_per_hour
    if least <= most_mb_per_hour:
        return ""
    return f"memory grows by {result.slope.mb_per_hour:.1f} ± {result.slope.error_mb_per_hour:.1f} MB an hour"


def markdown(result: Result) -> str:
    """The section's text: what was done, what is left, what agrees."""
    plan, figures, where = result.plan, result.figures, machine()
    done = ", ".join(f"{name} {count} x" for name, count in result.broken.items())
    ends = ", ".join(f"{count:,} {state}" for state, count in sorted(result.states.items()))
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in figures["outcomes"].items())
    before, after = result.before, result.after
    rows = [
        ("clients' ends", "no answer that nobody may get, nobody unreachable", ends),
        ("outcomes", "log, metrics and clients agree, request by request",
         f"{figures['logged']:,} logged = {figures['counted']:,} counted ({outcomes}); {figures['refused']:,} refused "
         f"before that; {figures['vanished']:,} of {figures['left_before_any_answer']:,} who left before any answer "
         "were gone before they were read"),
        ("tokens", "complete answers as served, to the token",
         f"{figures['tokens_exact']:,} charged and served; of broken answers {figures['tokens_estimated']:,} estimated "
         f"from {figures['events_of_broken']:,} events passed on, {figures['planned_of_broken']:,} were to come"),
        ("leases in Redis", "0", str(result.leases_left)),
        ("gauges", "0", str(sum(result.gauges_left.values()))),
        ("descriptors, threads, tasks", "within 5 % (and 4) of the beginning",
         f"{before.descriptors} → {after.descriptors}, {before.threads} → {after.threads}, "
         f"{before.tasks} → {after.tasks}"),
        ("memory of the gateway's processes", f"slope of the second half not above {GOAL_MB_PER_HOUR:g} MB/h",
         f"{result.slope.mb_per_hour:+.1f} ± {result.slope.error_mb_per_hour:.1f} MB/h (95 %); "
         f"{result.rss_mb[0]:.1f} → {result.rss_mb[1]:.1f} MB"),
    ]  # fmt: skip
    if result.killed:
        freed = f"; all free after {result.killed['freed_after_s']} s" if "freed_after_s" in result.killed else ""
        rows.append(
            ("`kill -9` with leases held", f"free within {LEASE_S:g} s, by themselves",
             f"{result.killed['held']} held, the longest for {result.killed['longest_left_s']} s more{freed}")
        )  # fmt: skip
    lines = [
        f"{where['date']}, commit {where['commit']}. {where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, "
        f"Python {where['python']}.",
        f"{plan.seconds:g} s after {plan.warm_up_s:g} s of the same to warm up, {plan.workers} worker(s), "
        f"{plan.users} users in {len(WAYS)} ways; {done}.",
        "",
        "| what | must be | was |",
        "|---|---|---|",
        *(f"| {name} | {bound} | {measured} |" for name, bound, measured in rows),
    ]
    return "\n".join([*lines, "", *(f"**Fails**: {problem}" for problem in result.problems)]).rstrip()


def run(plan: Plan) -> Result:
    """One soak in a temporary folder, which stays where it fails. Raises `StartFailed`."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(plan, folder)
    result = asyncio.run(soak.run())
    if result.problems:
        (folder / "result.json").write_text(json.dumps(asdict(result), indent=1, default=str))
        (folder / "told.txt").write_text("\n".join(map(str, sorted(told(soak.traffic.seen).items()))))
        print(f"what was left is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--warm-up", type=float, help="default: a tenth, 5 at least")
    parser.add_argument("--workers", type=int, default=Plan.workers)
    parser.add_argument("--users", type=int, default=Plan.users)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between that page's markers")
    parser.add_argument("--anyway", action="store_true", help="write it although something fails")
    options = parser.parse_args(argv)
    warm_up_s = max(5.0, options.seconds / 10) if options.warm_up is None else options.warm_up
    plan = Plan(options.seconds, warm_up_s, options.users, workers=options.workers, seed=options.seed)
    try:
        result = run(plan)
    except StartFailed as error:
        print(error, file=sys.stderr)
        return 2
    steep = too_steep(result, GOAL_MB_PER_HOUR)
    if steep:
        result.problems.append(steep)
    text = markdown(result)
    print(text)
    if options.write and (not result.problems or options.anyway):
        insert(options.write, text, BEGIN, END)
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
