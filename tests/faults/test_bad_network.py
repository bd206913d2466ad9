"""A network between gateway and replicas that delays, throttles and resets: beyond the forty experiments."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from random import Random

from loadtests.hammer_runs import Finding
from loadtests.ports import free_port
from tests.faults.conftest import Report
from tests.faults.forms import seconds
from tests.faults.rig import completed, rig
from tests.support.tcp_proxy import TcpProxy

DELAY_S, BYTES_PER_S = 0.2, 8000.0
EXPLAINED = frozenset(
    {"completed", "upstream_disconnected", "upstream_failed", "stream_interrupted", "upstream_interrupted",
     "upstream_unreachable", "upstream_truncated", "upstream_timeout", "no_replica", "unavailable"}
)  # fmt: skip


async def resetting(proxies: list[TcpProxy], rng: Random, every_s: float) -> None:
    while True:
        await asyncio.sleep(rng.expovariate(1 / every_s))
        rng.choice(proxies).reset()


async def test_a_network_that_delays_throttles_and_resets(tmp_path: Path, report: Report) -> None:
    """The proxies stand before the replicas are there: they only need to know the ports."""
    ports = [free_port(), free_port()]
    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(TcpProxy("127.0.0.1", port)) for port in ports]
        backend = {"health": {"ejection_s": 1, "slow_start_s": 0}, "timeouts": {"first_token_s": 10, "idle_s": 10}}
        found = await stack.enter_async_context(
            rig(tmp_path, replicas=2, urls=[proxy.url for proxy in proxies], backend=backend, warm_up=0)
        )
        for proxy, replica in zip(proxies, found.replicas, strict=True):
            proxy.target = ("127.0.0.1", replica.port)
        await found.warm_up()
        for proxy in proxies:
            proxy.delay_s, proxy.bytes_per_s = DELAY_S, BYTES_PER_S
        quiet = await found.crowd.many(40, found.body(stream=True, fake={"chunks": 20}), per_s=40)
        await found.crowd.ended(quiet)
        breaking = asyncio.create_task(resetting(proxies, Random(6), 0.7))
        torn = []
        for _ in range(round(seconds(1, 20))):
            torn += await found.crowd.many(40, found.body(stream=True, fake={"chunks": 20}), per_s=40)
            torn += await found.crowd.many(10, found.body(fake={"chunks": 5}), per_s=40)
        await found.crowd.ended(torn)
        breaking.cancel()
        for proxy in proxies:
            proxy.delay_s = proxy.bytes_per_s = 0.0
        bad = await found.judge()
        ends = Counter(answer.state if answer.state == "completed" else answer.error.get("code") for answer in torn)
    first_ms = sorted((answer.arrivals[0][0] - answer.at_s) * 1000 for answer in quiet if answer.arrivals)
    report(
        "41",
        Finding(
            "bad network",
            f"{DELAY_S * 1000:g} ms on every piece both ways, {BYTES_PER_S / 1000:g} KB/s, then resets at random",
            "slow is no error; a reset costs only who had content; everything is explained and nothing leaks",
            f"{completed(quiet)} of {len(quiet)} complete without resets, first byte after {first_ms[0]:.0f} to "
            f"{first_ms[-1]:.0f} ms; with them {dict(ends)}",
            completed(quiet) == len(quiet)
            and first_ms[0] >= 2 * DELAY_S * 1000
            and set(ends) <= EXPLAINED
            and ends["completed"] > 0
            and not bad,
            {"problems": bad, "ends": dict(ends)},
        ),
    )
