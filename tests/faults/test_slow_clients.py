"""Experiments 22 and 29: clients that never read, and clients that never end what they send."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.forms import LONG
from tests.faults.hostile import Holder, good, held, took_ms, until_lost, watched
from tests.faults.rig import completed, rig
from tests.support.client import post

CHAT = "/v1/chat/completions"
FLOOD = {"chunks": 100_000, "chunk_bytes": 6000 if LONG else 12_000, "interval_s": 0.1}
"""Faster than any model, and slow enough that what is measured is the gateway and not the fake engine."""
MOST_KB = 150 if LONG else 250
"""A loop that is late finds more to read at once before it pauses a source: up to what its socket holds."""
FILL_S = 20.0 if LONG else 6.0
"""Until the sockets on the way are full, and the client's slowness shows."""
BUSY_S = 2.0
"""What a machine with two busy cores may add to any wait."""
LATE_MS = 5000.0
"""What it may add to the slowest of a hundred answers. The report has the figure."""


async def test_22_clients_that_never_read(tmp_path: Path, report: Report) -> None:
    count, stall_s = (500, 30.0) if LONG else (60, 2.0)
    async with rig(tmp_path, replicas=2, server={"port": 0, "write_stall_timeout_s": stall_s}) as found:
        found.spared_mb = 32 + 0.15 * count  # what full buffers leave in the allocator; slopes are the soak's
        alone = await good(found, 50)
        flood = post(CHAT, found.body(stream=True, max_tokens=10**6, fake=FLOOD))
        async with (
            watched(found) as watch,
            held(found, count, flood, reads=False, receive_buffer_bytes=4096) as clients,
        ):
            beside = await good(found, 120)

            async def over() -> bool:
                return await found.metric("tidegate_in_flight") == 0

            await found.until(over, stall_s + 90.0)
            assert len(clients) == count
        bad = await found.judge()
        lines = [record for record in found.usage() if record["outcome"] == "client_left"]
    lasted_s = [line["duration_ms"] / 1000 for line in lines] or [0.0]
    each_kb = watch.grown_mb * 1000 / count
    before_ms, during_ms = took_ms(alone, 99), took_ms(beside, 99)
    report(
        "22",
        Finding(
            "clients that never read",
            f"{count} clients with a receive buffer of 4 KiB ask for endless streams and read nothing",
            f"cut {stall_s:g} s after they stalled; 100 KB of memory each ({MOST_KB} allowed); others' p99 + 10 %",
            f"{len(lines)} cut after {min(lasted_s):.1f} to {max(lasted_s):.1f} s; {each_kb:.0f} KB each; others' p99 "
            f"{before_ms:.0f} → {during_ms:.0f} ms (clients, engines and gateway on two cores), "
            f"{completed(beside)} of {len(beside)} served",
            len(lines) == count
            and min(lasted_s) >= stall_s
            and max(lasted_s) <= stall_s + FILL_S + 2 * BUSY_S
            and each_kb <= MOST_KB
            and completed(beside) == len(beside)
            and during_ms <= before_ms * 1.1 + LATE_MS
            and not bad,
            {"p99_before_ms": before_ms, "p99_ms": during_ms, "each_kb": each_kb, "problems": bad},
        ),
    )


async def test_29_clients_that_never_end_what_they_send(tmp_path: Path, report: Report) -> None:
    head_s, body_s = (10.0, 30.0) if LONG else (1.0, 1.5)
    count = 1334 if LONG else 150
    server = {"port": 0, "header_timeout_s": head_s, "body_timeout_s": body_s}
    begun_head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-Slow: a".encode()
    begun_body = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n{{".encode()
    async with rig(tmp_path, replicas=2, server=server) as found:
        found.spared_mb = 64.0  # what thousands of connections leave in the allocator
        alone = await good(found, 50)
        async with (
            watched(found) as watch,
            held(found, count, begun_head) as heads,
            held(found, count, b"") as silent,
            held(found, count, begun_body) as bodies,
        ):
            trickling = asyncio.create_task(_trickle([*heads, *bodies]))
            beside = await good(found, 50)
            left = await until_lost([*heads, *silent, *bodies], body_s + 15.0)
            trickling.cancel()
        bad = await found.judge()
    kinds = {"heads": (heads, head_s), "silent": (silent, head_s), "bodies": (bodies, body_s)}
    lasted = {name: [each.open_s or 1e9 for each in holders] for name, (holders, _) in kinds.items()}
    in_time = all(
        limit_s - 0.1 <= min(lasted[name]) and max(lasted[name]) <= limit_s + 0.5 + 2 * BUSY_S
        for name, (_, limit_s) in kinds.items()
    )
    told = {name: {each.status for each in holders} for name, (holders, _) in kinds.items()}
    report(
        "29",
        Finding(
            "slowloris",
            f"{3 * count} connections: a head that trickles in, nothing at all, a body that trickles in",
            f"closed after {head_s:g}, {head_s:g} and {body_s:g} s, with 408 where a request had begun; others served",
            "; ".join(f"{name}: {min(each):.1f} to {max(each):.1f} s" for name, each in lasted.items())
            + f"; {left} still open; {completed(beside)} of {len(beside)} others served, p99 "
            f"{took_ms(alone, 99):.0f} → {took_ms(beside, 99):.0f} ms; {watch.grown_mb * 1000 / 3 / count:.0f} KB each",
            left == 0
            and in_time
            and told == {"heads": {408}, "silent": {0}, "bodies": {408}}
            and completed(beside) == len(beside)
            and not bad,
            {"told": {name: sorted(each) for name, each in told.items()}, "problems": bad, "grown_mb": watch.grown_mb},
        ),
    )


async def _trickle(holders: Sequence[Holder]) -> None:
    while True:
        await asyncio.sleep(0.3)
        for holder in holders:
            holder.send(b"a")


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="as 22, which shows the same in a short time: run it with `make faults`")
async def test_29_a_slow_reader_is_cut_like_one_who_never_reads(tmp_path: Path, report: Report) -> None:
    """Reads some bytes now and then, fewer than let anything move."""
    stall_s = 30.0 if LONG else 1.5
    async with rig(tmp_path, replicas=1, server={"port": 0, "write_stall_timeout_s": stall_s}) as found:
        flood = post(CHAT, found.body(stream=True, max_tokens=10**6, fake=FLOOD))
        async with held(found, 20, flood, reads=False, receive_buffer_bytes=4096) as clients:
            beside = await good(found, 20)

            async def over() -> bool:
                for client in clients:  # a look at what the kernel holds: that much, and no more, is read
                    if client.transport is not None and client.lost_s is None:
                        client.transport.resume_reading()
                await asyncio.sleep(0)
                for client in clients:
                    if client.transport is not None and client.lost_s is None:
                        client.transport.pause_reading()
                return await found.metric("tidegate_in_flight") == 0

            await found.until(over, stall_s + 20.0)
        bad = await found.judge()
        lines = [record for record in found.usage() if record["outcome"] == "client_left"]
    lasted_s = [line["duration_ms"] / 1000 for line in lines] or [0.0]
    report(
        "29",
        Finding(
            "slow reading",
            "20 clients read a few KiB of an endless stream from time to time",
            f"cut when nothing has moved for {stall_s:g} s",
            f"{len(lines)} cut after {min(lasted_s):.1f} to {max(lasted_s):.1f} s",
            len(lines) == 20 and min(lasted_s) >= stall_s and completed(beside) == len(beside) and not bad,
            {"problems": bad},
        ),
    )
