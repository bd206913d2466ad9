"""Experiments 24, 25 and 26: more streams, descriptors and memory than there are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import Answer, states
from tests.faults.forms import LONG
from tests.faults.hostile import cpu_s, good, held
from tests.faults.rig import Rig, completed, rig
from tests.support.client import post

CHAT = "/v1/chat/completions"
CEILINGS = {503, 429}


def ends(answers: list[Answer]) -> dict[str, int]:
    """How many were served, and why the others were not."""
    return dict(
        Counter(
            answer.state if answer.state != "refused" else f"{answer.status} {answer.error.get('code')}"
            for answer in answers
        )
    )


@pytest.mark.parametrize("connections", [None, 100])
async def test_24_two_thousand_streams_at_once(tmp_path: Path, report: Report, connections: int | None) -> None:
    """With and without room for them upstream. Whoever finds none is told so by us, with a time to come back."""
    count = 2000 if LONG else 300
    backend: dict[str, Any] = {} if connections is None else {"connections": {"max": connections}}
    fake = {"chunks": 6, "interval_s": 1.0 if LONG else 0.25}
    async with rig(tmp_path, replicas=2, backend=backend) as found:
        streams = await found.crowd.many(count, found.body(stream=True, fake=fake), per_s=1000)
        await found.crowd.ended(streams, 120.0)
        after = await good(found, 20)
        found.spared_mb = 0.05 * count
        bad = await found.judge()
    honest = all(
        answer.state == "completed" or (answer.status in CEILINGS and answer.headers.get("retry-after"))
        for answer in streams
    )
    room = "room for all" if connections is None else f"room for {2 * connections} upstream"
    report(
        "24",
        Finding(
            f"streams at once: {room}",
            f"{count} streams of {fake['chunks']} events within {count / 1000:g} s, {room}",
            "all served" if connections is None else "served, or 503 by our own ceiling with a Retry-After",
            f"{ends(streams)}",
            honest
            and (connections is not None or completed(streams) == count)
            and completed(streams) >= min(count, 2 * (connections or count))
            and completed(after) == len(after)
            and not bad,
            {"states": states(streams), "problems": bad},
        ),
    )


async def test_25_no_more_descriptors(tmp_path: Path, report: Report) -> None:
    """Half of the connections ask for a slow answer, the other half say nothing; all of them stay."""
    seconds = 7.0 if LONG else 2.0
    async with rig(tmp_path, replicas=2, wrapper=("prlimit", "--nofile=128"), warm_up=5) as found:
        slow = post(CHAT, found.body(fake={"delay_head_s": seconds}))
        logged = sum(map(len, found.gateway.log))
        before_s, began = cpu_s(found), time.monotonic()
        async with held(found, 100, slow) as asking, held(found, 100, b"") as silent:
            await asyncio.sleep(seconds + 1.5)
            share = (cpu_s(found) - before_s) / (time.monotonic() - began)
            said = Counter(client.status for client in asking)
            turned_away = Counter(client.status for client in silent if client.lost_s is not None)
            scraped = bool(await found.metrics())
        written = sum(map(len, found.gateway.log)) - logged
        after = await recovered(found)
        bad = await found.judge()
    report(
        "25",
        Finding(
            "descriptors",
            "128 of them; 200 connections, half of which ask for a slow answer",
            "answers or 503, nothing else; CPU and log stay quiet; everything works afterwards",
            f"asking: {dict(said)}; silent and turned away: {dict(turned_away)}; {share:.0%} of a core, "
            f"{written / 1000:.1f} KB of log; then {completed(after)} of {len(after)} served",
            set(said) <= {200, 503}
            and said[200] > 0
            and set(turned_away) <= {503}
            and scraped
            and share < 0.4
            and written < 20_000
            and completed(after) == len(after)
            and not bad,
            {"problems": bad, "log": found.gateway.log[-5:]},
        ),
    )


async def recovered(found: Rig) -> list[Answer]:
    """Somebody else's requests, once those connections are gone."""
    await asyncio.sleep(0.5)
    return await good(found, 30)


# -- memory

CLASSES = ("critical", "standard", "batch", "sheddable")
SERVED = {0: 4, 1: 3, 2: 2, 3: 1}
"""How many of the classes, by level."""
LIMIT_MB = 400
STEPS = ((0.5, 0), (0.83, 1), (0.92, 2), (0.965, 3), *(((0.5, 0),) if LONG else ()))
"""Shares of it, and the levels that they are."""
HOG = """
import sys
held = bytearray()
for line in sys.stdin:
    held = None
    held = bytearray(int(line) * 1_000_000)
    held[::4096] = b"x" * len(held[::4096])
    print("held", flush=True)
"""


@contextlib.contextmanager
def cgroup(limit_mb: int) -> Iterator[Path]:
    """A memory cgroup (v1) of our own. Skips where none may be made."""
    folder = Path(f"/sys/fs/cgroup/memory/tidegate-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(limit_mb * 1_000_000))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield folder
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.05)


class Hog:
    """A process in the same cgroup that holds as much as it is told."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._held_mb = 0

    def used_mb(self) -> float:
        """As the gateway counts it: without idle file cache."""
        idle = next(
            int(line.split()[1])
            for line in (self._folder / "memory.stat").read_text().splitlines()
            if line.startswith("total_inactive_file ")
        )
        return (int((self._folder / "memory.usage_in_bytes").read_text()) - idle) / 1e6

    async def fill(self, share: float) -> None:
        """So that the cgroup is at this share of its limit."""
        self._held_mb = max(1, round(self._held_mb + share * LIMIT_MB - self.used_mb()))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"%d\n" % self._held_mb)
        assert await asyncio.wait_for(self._process.stdout.readline(), 20.0) == b"held\n"


@contextlib.asynccontextmanager
async def hogging(folder: Path) -> Any:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOG), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    (folder / "cgroup.procs").write_text(str(process.pid))
    try:
        yield Hog(process, folder)
    finally:
        process.kill()
        await process.wait()


async def each_class(found: Rig) -> dict[str, Answer]:
    """One request of every class."""
    answers = {
        name: found.crowd.ask(found.body(fake={"chunks": 1}), f"Authorization: Bearer {key_of(name)}")
        for name in CLASSES
    }
    await found.crowd.ended(answers.values())
    return answers


def key_of(name: str) -> str:
    return f"memory-test-key-of-class-{name}-0123456789"


async def test_26_memory_runs_short(tmp_path: Path, report: Report) -> None:
    keys = [{"name": name, "key": {"env": f"KEY_{name.upper()}"}, "class": name} for name in CLASSES]
    environ = {f"KEY_{name.upper()}": key_of(name) for name in CLASSES}
    sections: dict[str, Any] = {
        "auth": "keys",
        "keys": {"static": keys},
        "database": f"sqlite:///{tmp_path / 'keys.db'}",
    }
    seen: list[tuple[float, int, list[str]]] = []
    with cgroup(LIMIT_MB) as folder:
        inside = ("sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh")
        async with rig(
            tmp_path, replicas=2, wrapper=inside, environ=environ, headers=(), warm_up=0, **sections
        ) as found:  # fmt: skip
            await each_class(found)
            found.before = found.footprint()
            codes: set[str] = set()
            async with hogging(folder) as hog:
                for share, level in STEPS:
                    await hog.fill(share)

                    async def reached(wanted: int = level) -> bool:
                        return await found.metric("tidegate_overload_level") == wanted

                    await found.until(reached)
                    answers = await each_class(found)
                    seen.append((share, level, [name for name in CLASSES if answers[name].state == "completed"]))
                    codes |= {answer.error.get("code", "") for answer in answers.values() if answer.state == "refused"}
            killed = int((folder / "memory.failcnt").read_text())
            alive = found.gateway.process.returncode is None
            bad = await found.judge()
    wanted = [list(CLASSES[: SERVED[level]]) for _, level, _ in seen]
    report(
        "26",
        Finding(
            "memory pressure",
            f"a cgroup of {LIMIT_MB} MB that another process fills to "
            f"{', '.join(f'{share:.0%}' for share, _, _ in seen)}",
            "levels 80, 90 and 95 % in order, shedding by class; critical always served; no OOM kill",
            "; ".join(f"{share:.0%}: level {level}, {', '.join(served)} served" for share, level, served in seen),
            [served for _, _, served in seen] == wanted and codes == {"overloaded_memory"} and alive and not bad,
            {"limit_hits": killed, "codes": sorted(codes), "problems": bad},
        ),
    )
