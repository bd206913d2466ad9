"""Experiment 27: the name server is slow, silent, wrong, or gone. A mount namespace has a resolv.conf of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backends.addresses import FRESH_S
from loadtests.hammer_runs import Finding
from loadtests.ports import free_port
from tests.faults.conftest import Report
from tests.faults.crowd import Answer
from tests.faults.forms import LONG
from tests.faults.hostile import good, took_ms
from tests.faults.rig import Rig, completed, rig
from tests.support.dns_server import DnsServer, with_resolver

NAMES = ("r0.tidegate.test", "r1.tidegate.test")
LATE_MS = 2000.0
"""What a machine with two busy cores may add to the slowest of some dozens of answers. The report has the figure."""


@contextlib.asynccontextmanager
async def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: DnsServer) -> AsyncIterator[Rig]:
    """Two replicas that the gateway knows by their names; a connection is used once, so that each request needs one."""
    ports = [free_port(), free_port()]
    taken = iter(ports)
    monkeypatch.setattr("tests.faults.rig.free_port", lambda: next(taken))
    urls = [f"http://{name}:{port}" for name, port in zip(NAMES, ports, strict=True)]
    backend = {"health": {"probe_interval_s": 1, "timeout_s": 2, "ejection_s": 1, "slow_start_s": 0}}
    async with rig(
        tmp_path, replicas=2, urls=urls, wrapper=with_resolver(tmp_path), backend=backend, warm_up=0,
        script={"connection_close": True},
    ) as found:  # fmt: skip
        yield found


async def healthy(found: Rig, number: int) -> None:
    async def it_is() -> bool:
        return await found.metric("tidegate_replica_available", f'replica="r{number}"') == 1.0

    await found.until(it_is, 30.0)


def by_replica(answers: list[Answer]) -> dict[str, int]:
    found: dict[str, int] = {}
    for answer in answers:
        name = answer.headers.get("x-tidegate-replica", "")
        found[name] = found.get(name, 0) + 1
    return found


async def test_27_a_name_server_that_is_slow_or_knows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    """One replica's name takes 10 s, then does not exist, then resolves; the other's is well."""
    async with DnsServer() as names:
        names.addresses = {NAMES[0]: ["127.0.0.1"], NAMES[1]: ["127.0.0.1"]}
        names.delay_s[NAMES[1]] = 10.0
        async with named(tmp_path, monkeypatch, names) as found:
            slow = await good(found, 100)
            found.before = found.footprint()
            del names.addresses[NAMES[1]]
            names.delay_s.clear()
            unknown = await good(found, 100)
            names.addresses[NAMES[1]] = ["127.0.0.1"]
            await healthy(found, 1)
            both = await good(found, 50)
            bad = await found.judge()
    failed = [answer for answer in (*slow, *unknown, *both) if answer.state != "completed"]
    report(
        "27",
        Finding(
            "names: 10 s, NXDOMAIN",
            "one of two replicas' names takes 10 s to resolve, then does not exist, then does",
            "no request fails; nobody waits longer than the connect time-out (2 s); used when it resolves",
            f"{len(failed)} of {len(slow) + len(unknown) + len(both)} failed; p99 {took_ms(slow, 99):.0f}, "
            f"{took_ms(unknown, 99):.0f} and {took_ms(both, 99):.0f} ms; at last {by_replica(both)}",
            not failed
            and max(took_ms(slow, 99), took_ms(unknown, 99)) <= 2000 + LATE_MS
            and set(by_replica(both)) == {"r0", "r1"}
            and not bad,
            {"problems": bad, "asked": names.asked, "errors": [answer.error for answer in failed[:3]]},
        ),
    )


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="an answer is fresh for 30 s: run it with `make faults`")
async def test_27_the_last_good_answer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    """All names are gone, then the server is silent, then it flaps between the address and one where nobody is."""
    async with DnsServer() as names:
        names.addresses = {name: ["127.0.0.1"] for name in NAMES}
        async with named(tmp_path, monkeypatch, names) as found:
            await good(found, 20)
            found.before = found.footprint()
            names.addresses = {}
            await asyncio.sleep(FRESH_S + 1.0)
            gone = await good(found, 200, 20.0)
            names.silent = set(NAMES)
            silent = await good(found, 200, 10.0)
            said = any("does not resolve" in line for line in found.gateway.log)
            names.silent = set()
            names.flapping = {name: [["127.0.0.9"], ["127.0.0.1"]] for name in NAMES}
            await asyncio.sleep(10.0)
            flapping = await good(found, 400, 10.0)
            lines = sum("resolve" in line for line in found.gateway.log)
            bad = await found.judge()
    figures = {
        name: f"{completed(answers)} of {len(answers)}, p99 {took_ms(answers, 99):.0f} ms"
        for name, answers in (("all gone", gone), ("silent", silent), ("flapping", flapping))
    }
    report(
        "27",
        Finding(
            "names: gone, silent, flapping",
            f"{FRESH_S:g} s after the last answer no name exists, then no answer comes, then every other one is wrong",
            "the last good answer is used on, and said so once; nobody waits longer than half a second for a name",
            "; ".join(f"{name}: {text}" for name, text in figures.items()) + f"; {lines} lines of log",
            completed(gone) == len(gone)
            and completed(silent) == len(silent)
            and completed(flapping) >= 0.95 * len(flapping)
            and took_ms(silent, 99) <= 500 + LATE_MS
            and said
            and lines < 20
            and not bad,
            {"problems": bad, "asked": names.asked,
             "errors": [answer.error for answer in flapping if answer.state != "completed"][:3]},
        ),
    )  # fmt: skip
