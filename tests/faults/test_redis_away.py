"""Experiments 10, 11, 12 and 14: Redis is killed, frozen, replaced or full. The gateway goes on, and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from gateway.store.limits import Cost, Scope
from loadtests.hammer_bounds import allowed
from loadtests.hammer_crew import Crew
from loadtests.hammer_jobs import Reach
from loadtests.hammer_limits import monotonic_us
from loadtests.hammer_runs import Finding, Target
from loadtests.hammer_stores import open_store
from tests.faults.away import (
    AWAY,
    BACK_WITHIN_S,
    BURST,
    BUSY_S,
    PER_MINUTE,
    PROCESSES,
    TASKS,
    Outage,
    local_bound,
    run_outage,
)
from tests.faults.conftest import Report
from tests.faults.forms import seconds
from tests.support.redis_server import RedisServer

LOAD = f"{PROCESSES} processes x {TASKS} tasks, {PER_MINUTE} requests a minute, burst {BURST}; "


@pytest.fixture
def impatient(crew: Crew, redis_alone: RedisServer) -> Target:
    """With the gateway's own timeout of 50 ms. The clock is this machine's, which Redis uses too, and which answers
    while Redis does not."""
    return Target(crew, Reach(redis_alone.url, timeout_s=0.05), lambda: time.time_ns() // 1000)


def judged(name: str, fault: str, outage: Outage, back_us: int, bursts: int, **also: float) -> Finding:
    """The bounds that hold in every outage."""
    shared_bound = bursts * BURST + allowed(0, PER_MINUTE, outage.took_us)
    local = local_bound(outage.away_us())
    back_s = outage.back_after_s(back_us)
    calls, errors = len(outage.calls()), outage.errors()
    figures = {
        "shared": outage.shared, "shared_bound": shared_bound, "local": outage.local, "local_bound": local,
        "back_s": back_s, "calls": calls, "errors": errors[:5], "away_s": outage.away_us() / 1e6,
        "p99_ms": outage.took_ms(99), "max_ms": outage.took_ms(100), **also,
    }  # fmt: skip
    return Finding(
        name,
        LOAD + fault,
        f"every call answered; by Redis at most {shared_bound}, by local shares at most {local}; "
        f"back within {BACK_WITHIN_S:g} s",
        f"{calls:,} of {calls:,} answered; {outage.shared} and {outage.local} admitted; back after {back_s:.2f} s",
        not errors
        and 0 < outage.shared <= shared_bound
        and 0 < outage.local <= local
        and back_s <= BACK_WITHIN_S + BUSY_S,
        figures,
    )


def leases(url: str, key: str, within_s: float) -> int:
    """Leases that are still there after at most so long."""

    async def count() -> int:
        opened = open_store(Reach(url))
        try:
            await opened.client.connect()
            deadline, number = time.monotonic() + within_s, 0
            while True:
                number += 1
                answer = await opened.limits.admit(f"probe-{number}", (Scope(key, concurrent=10_000),), Cost(), 1000)
                await opened.limits.settle(f"probe-{number}", (Scope(key, concurrent=10_000),), Cost(), Cost())
                if answer.in_use[0] == 1 or time.monotonic() > deadline:
                    return answer.in_use[0] - 1
                await asyncio.sleep(0.1)
        finally:
            await opened.client.aclose()

    return asyncio.run(count())


def test_10_redis_is_killed_and_comes_back_empty(impatient: Target, redis_alone: RedisServer, report: Report) -> None:
    back_us = 0

    def kill_and_restart() -> None:
        nonlocal back_us
        time.sleep(1.0)
        redis_alone.kill()
        time.sleep(seconds(1.2, 5.0))
        redis_alone.start()
        back_us = monotonic_us()

    outage = run_outage(impatient, seconds(5.0, 15.0), kill_and_restart, impatient.clock_us)
    # Twice the burst: an empty Redis begins with a full one.
    report("10", judged("kill -9, empty restart", "Redis killed under load", outage, back_us, bursts=2))
    assert leases(redis_alone.url, outage.key, within_s=6.0) == 0


def test_11_redis_is_frozen(impatient: Target, redis_alone: RedisServer, report: Report) -> None:
    times: dict[str, int] = {}

    def freeze_and_thaw() -> None:
        time.sleep(1.0)
        times["frozen"] = monotonic_us()
        redis_alone.freeze()
        time.sleep(seconds(2.5, 30.0))
        redis_alone.thaw()
        times["thawed"] = monotonic_us()

    outage = run_outage(impatient, seconds(6.5, 35.0), freeze_and_thaw, impatient.clock_us)
    opened_us = times["frozen"] + 300_000
    frozen = outage.calls(since_us=times["frozen"] - 50_000, until_us=times["thawed"])
    slow = [call for call in frozen if call.took_us > 25_000]
    longest_ms = max((call.took_us for call in slow), default=0) / 1000
    later_ms = outage.took_ms(99, since_us=opened_us, until_us=times["thawed"])
    found = judged(
        "frozen", f"Redis stopped for {seconds(2.5, 30.0):g} s", outage, times["thawed"], bursts=1,
        slow=len(slow), longest_ms=longest_ms, later_p99_ms=later_ms,
    )  # fmt: skip
    found = Finding(
        found.name,
        found.fault,
        f"{found.bound}; at most 50 ms for the calls under way, then at most 1 ms",
        f"{found.measured}; {len(slow)} calls waited, up to {longest_ms:.0f} ms, then p99 {later_ms:.2f} ms",
        # What was under way, and at most five more in each process; the wait itself with room for a busy machine.
        found.good and len(slow) <= PROCESSES * (TASKS + 5) and longest_ms <= 50 + 250 and later_ms <= 20,
        found.figures,
    )
    report("11", found)
    assert leases(redis_alone.url, outage.key, within_s=6.0) == 0


@contextlib.contextmanager
def crowded(control: redis.Redis, port: int, most: int) -> Iterator[Callable[[], None]]:
    """Others take all of Redis' connections, and the hammer's are closed; call what is given to do that."""
    hogs: list[socket.socket] = []

    def crowd() -> None:
        # Here first, and the limit second: taking the places of those who were just thrown out would be a race with
        # them, and a hammer that wins it has met with no outage.
        for _ in range(most - 1):
            hogs.append(hog := socket.create_connection(("127.0.0.1", port), timeout=5.0))
            hog.sendall(b"PING\r\n")
            assert hog.recv(7) == b"+PONG\r\n"
        control.config_set("maxclients", most)
        stay = {f"{host}:{own}" for host, own in (hog.getsockname() for hog in hogs)}
        for client in control.client_list(_type="normal"):
            if client["addr"] not in stay and int(client["id"]) != control.client_id():
                with contextlib.suppress(redis.ResponseError):
                    control.client_kill_filter(_id=client["id"])

    try:
        yield crowd
    finally:
        for hog in hogs:
            hog.close()


def test_14_redis_takes_no_more_connections(
    impatient: Target, redis_alone: RedisServer, control: redis.Redis, report: Report
) -> None:
    back_us, connected = 0, 0
    most = PROCESSES * impatient.reach.connections + 1

    def fill_and_leave() -> None:
        nonlocal back_us, connected
        time.sleep(1.0)
        connected = control.info("clients")["connected_clients"] - 1
        with crowded(control, redis_alone.port, most) as crowd:
            crowd()
            time.sleep(seconds(1.0, 10.0))
        back_us = monotonic_us()

    outage = run_outage(impatient, seconds(4.5, 20.0), fill_and_leave, impatient.clock_us)
    found = judged("maxclients", "all connections cut, others take their places", outage, back_us, bursts=1)
    found.figures["connected"] = connected
    report("14", found)
    assert connected == PROCESSES * impatient.reach.connections, (
        "connections are processes x connections, as documented"
    )
    assert leases(redis_alone.url, outage.key, within_s=6.0) == 0


@contextlib.contextmanager
def sentinel_group() -> Iterator[tuple[RedisServer, RedisServer, str]]:
    """A primary with a replica in sync, and a sentinel that watches them: primary, replica, address."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(RedisServer(("repl-diskless-sync-delay", "0")))
        replica = stack.enter_context(RedisServer(("replicaof", "127.0.0.1", str(primary.port))))
        deadline = time.monotonic() + 20.0
        with replica.client() as client:
            while client.info("replication")["master_link_status"] != "up":
                assert time.monotonic() < deadline, replica.log()
                time.sleep(0.05)
        sentinel = stack.enter_context(_sentinel(primary.port))
        yield primary, replica, f"redis+sentinel://127.0.0.1:{sentinel.port}/mymaster"


@contextlib.contextmanager
def _sentinel(port: int) -> Iterator[RedisServer]:
    sentinel = RedisServer()
    config = sentinel.folder / "sentinel.conf"
    config.write_text(
        f"port {sentinel.port}\nbind 127.0.0.1\ndir {sentinel.folder}\n"
        f"sentinel monitor mymaster 127.0.0.1 {port} 1\nsentinel down-after-milliseconds mymaster 500\n"
        f"sentinel failover-timeout mymaster 3000\n"
    )
    wrapper = sentinel.folder / "sentinel.sh"
    wrapper.write_text(f'#!/bin/sh\nexec "{sentinel.binary}" "{config}" --sentinel\n')
    wrapper.chmod(0o755)
    sentinel.binary = str(wrapper)
    with sentinel, sentinel.client() as client:
        deadline = time.monotonic() + 20.0
        # It learns of replicas by asking the primary every ten seconds, and once at the beginning.
        while client.info("sentinel")["master0"]["slaves"] < 1:
            assert time.monotonic() < deadline, sentinel.log()
            time.sleep(0.1)
        yield sentinel


def test_12_sentinel_promotes_the_replica(crew: Crew, report: Report) -> None:
    with sentinel_group() as (primary, replica, url):
        target = Target(crew, Reach(url, timeout_s=0.05), lambda: time.time_ns() // 1000)
        back_us = 0

        def kill_primary() -> None:
            nonlocal back_us
            time.sleep(1.0)
            primary.kill()
            deadline = time.monotonic() + 20.0
            with replica.client() as client:
                while client.info("replication")["role"] != "master":
                    assert time.monotonic() < deadline, replica.log()
                    time.sleep(0.02)
            back_us = monotonic_us()

        outage = run_outage(target, seconds(6.5, 20.0), kill_primary, target.clock_us)
        # Marks that were written and not yet replicated are lost: at most a burst.
        report("12", judged("Sentinel failover", "the primary killed", outage, back_us, bursts=2))
        assert outage.calls(*AWAY)
        assert leases(replica.url, outage.key, within_s=6.0) == 0
