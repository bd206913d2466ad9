"""Experiment 19: a gateway that holds 500 leases is killed. They come back by themselves; what was used stays used."""

from __future__ import annotations

import asyncio
import time

from gateway.store.limits import Admission, Cost, Rate, Scope, Unit
from gateway.store.places import Band, Room, State, Ticket
from loadtests import hammer_runs as runs
from loadtests.hammer_crew import Crew
from loadtests.hammer_jobs import LimitJob, PlaceJob, Reach, Tenant, Tokens
from loadtests.hammer_stores import Opened, open_store
from tests.faults.conftest import Report
from tests.faults.forms import seconds
from tests.support.redis_server import RedisServer

LEASES, TOKENS = 500, 10
WITHIN_S = 30.0


async def opened(reach: Reach) -> Opened:
    store = open_store(reach)
    await store.client.connect()
    return store


async def test_19_leases_of_a_killed_process_are_free_after_the_lease_and_its_tokens_stay_charged(
    crew: Crew, redis_alone: RedisServer, report: Report
) -> None:
    lease_s = seconds(3.0, 30.0)
    reach = Reach(redis_alone.url, timeout_s=5.0)
    # So slow a rate that what is refilled during the test is a hundredth of what was charged.
    rate = Rate(Unit.TOTAL, per_minute=60, burst=1_000_000, largest=1_000_000)
    scope = Scope(runs.fresh_key(), rates=(rate,), concurrent=LEASES)
    job = LimitJob(
        reach,
        (scope,),
        prompt=TOKENS,
        tasks=LEASES,
        pause_ms=5.0,
        keep=True,
        lease_us=round(lease_s * 1e6),
        seconds=60.0,
    )
    await asyncio.to_thread(crew.begin, [job])
    store = await opened(reach)
    turn = 0

    async def ask() -> Admission:
        nonlocal turn
        turn += 1
        return await store.limits.admit(f"probe-{turn}", (scope,), Cost(total=0), 60_000_000)

    try:
        async with asyncio.timeout(WITHIN_S):
            while True:  # a full house: the probe's own place is given back at once
                answer = await ask()
                if not answer.admitted:
                    break
                await store.limits.cancel(f"probe-{turn}", (scope,), Cost(total=0))
                await asyncio.sleep(0.05)
        full_at = time.monotonic()
        assert [refusal.limit for refusal in answer.refusals] == ["concurrent"]
        held = answer.in_use[0]
        owed_before = answer.marks_us[0] - answer.now_us
        crew.kill(0)
        async with asyncio.timeout(lease_s + WITHIN_S):
            while True:
                answer = await ask()
                if answer.admitted and answer.in_use[0] == 1:
                    break
                if answer.admitted:
                    await store.limits.cancel(f"probe-{turn}", (scope,), Cost(total=0))
                await asyncio.sleep(0.02)
        free_s = time.monotonic() - full_at
        # The mark is an instant: what is charged is how far it lies ahead, plus what was refilled meanwhile.
        charged = (answer.marks_us[0] - answer.now_us + free_s * 1e6) * rate.per_minute / 60e6
        before = owed_before * rate.per_minute / 60e6
    finally:
        await store.client.aclose()
    report(
        "19",
        judged(held, free_s, lease_s, charged, before),
    )


def judged(held: int, free_s: float, lease_s: float, charged: float, before: float) -> runs.Finding:
    tokens = LEASES * TOKENS
    return runs.Finding(
        "killed with leases",
        f"kill -9 of a process that holds {LEASES} leases of {lease_s:g} s and {tokens:,} tokens",
        f"all free within {lease_s:g} s; {tokens:,} tokens stay charged",
        f"{held} held; all free {free_s:.2f} s after the last was taken; {charged:,.0f} tokens charged",
        held == LEASES and free_s <= lease_s + 1.0 and abs(charged - tokens) <= 0.02 * tokens,
        {"held": held, "free_s": free_s, "lease_s": lease_s, "charged": charged, "charged_before": before},
    )


async def test_19_places_of_a_killed_process_go_to_those_who_wait(
    crew: Crew, redis_alone: RedisServer, report: Report
) -> None:
    """The dead process holds every place and has requests waiting: its places run out, its waiters are passed over."""
    lease_s = seconds(3.0, 30.0)
    reach = Reach(redis_alone.url, timeout_s=5.0)
    room = Room(requests=8, lease_us=round(lease_s * 1e6), gateway_us=2_000_000)
    tenants = (Tenant("dead", 1.0, 24, Tokens(median=1000)),)
    job = PlaceJob(reach, "pool", room, tenants, "dead-gateway", hold_us_per_cost=1e6, seconds=600.0)
    await asyncio.to_thread(crew.begin, [job])
    store = await opened(reach)
    granted = asyncio.Event()
    try:
        async with asyncio.timeout(WITHIN_S):
            while True:
                standing = await store.places.standing("pool")
                if sum(standing.running) == 8 and sum(standing.waiting) == 16:
                    break
                await asyncio.sleep(0.05)
        crew.kill(0)
        killed_at = time.monotonic()
        await store.client.subscribe("hammer:granted:alive", lambda message: granted.set())
        ticket = Ticket("mine", "alive", "alive", 1.0, Band.STANDARD, 100, 100, 600_000_000)
        entry = await store.places.enter("pool", ticket, room)
        assert entry.state is State.WAITING, entry
        async with asyncio.timeout(lease_s + WITHIN_S):
            while not granted.is_set():
                renewal = await store.places.renew("pool", "alive", [], ["mine"], room)
                if renewal.granted:
                    granted.set()
                await asyncio.sleep(0.2)
        free_s = time.monotonic() - killed_at
        left = await store.places.standing("pool")
        await store.places.leave("pool", "mine", "alive", None, room)
    finally:
        await store.client.aclose()
    report(
        "19",
        runs.Finding(
            "killed with places",
            "kill -9 of a process that holds all 8 places of a pool and has 16 requests waiting",
            f"another gateway, which looks every 0.2 s, gets a place {lease_s:g} s later; nobody dead has one",
            f"granted {free_s:.2f} s after the kill; {sum(left.running)} running then",
            # The last renewal may have been just before the kill.
            free_s <= lease_s + 1.5 and sum(left.running) == 1,
            {"granted_s": free_s, "running_after": left.running, "waiting_after": left.waiting},
        ),
    )
