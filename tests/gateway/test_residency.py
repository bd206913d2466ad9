"""A region lock holds on every hop: first choice, retry, spill and return; and no word of a prompt is written down."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from backends.ticker import Ticker
from gateway.admission.opening import Admission
from gateway.answers import none_left
from gateway.errors import NoReplicaAvailable
from gateway.fleet import Fleet, build_fleet
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.order import CHAT as CHAT_PATH
from gateway.order import Call, Order, read_order
from gateway.record import Exchange, Outcome
from gateway.spill import Overflow
from gateway.state import LocalSource
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from routing.types import Replica
from tests.support.http import ask, error_of, streaming
from tests.support.serving import serving, settings_for

LOOPS = ("uvloop",)
EU = "x-tidegate-region: eu-west"
REGIONS = ("eu-west", "us-east", "ap-south", None)
SPILL: dict[str, Any] = {
    "backend": "rented",
    "price": {"input": 1.0, "output": 1.0},
    "usd_per_hour": 1000.0,
    "usd_per_day": 1000.0,
}
POLICIES = ("cost", "random", "round_robin", "least_outstanding", "power_of_two", "consistent_hash", "lmetric")


def replicas_of(regions: tuple[str | None, ...], port: int) -> list[dict[str, Any]]:
    return [{"url": f"http://127.0.0.1:{port + index}", "region": region} for index, region in enumerate(regions)]


def fleet_of(own: tuple[str | None, ...], rented: tuple[str | None, ...], policy: str) -> tuple[Fleet, Overflow]:
    pools = {
        "pool": {"engine": "openai", "replicas": replicas_of(own, 2000)},
        "rented": {"engine": "openai", "hosted": True, "replicas": replicas_of(rented, 3000)},
    }
    model = {"backend": "pool", "aliases": ["alias"], "policy": policy, "spill": SPILL}
    settings = settings_for([], models={"m": model}, backends=pools)
    fleet = build_fleet(settings, Ticker(), 0.0)
    return fleet, Overflow(settings, Admission(settings).gate, lambda: fleet)


def make_unwell(replica: Replica, how: int, now: float) -> None:
    if how == 1:
        replica.draining = True
    elif how == 2:
        replica.max_in_flight = replica.in_flight = 1
    elif how == 3:
        replica.cooldown.failed(now)
    elif how == 4:
        replica.work.queue(500_000, now)


SOME = st.lists(st.tuples(st.sampled_from(REGIONS), st.integers(0, 4)), min_size=1, max_size=5)
LOCKS = st.lists(st.sampled_from(("eu-west", "us-east", "ap-south", "nowhere")), min_size=1, max_size=3, unique=True)


@hypothesis_settings(max_examples=150, deadline=None)
@given(SOME, SOME, LOCKS, st.sampled_from(POLICIES), st.sampled_from(("m", "alias")), st.data())
def test_no_hop_ever_leaves_the_allowed_regions(
    own: list[tuple[str | None, int]],
    rented: list[tuple[str | None, int]],
    lock: list[str],
    policy: str,
    model: str,
    data: st.DataObject,
) -> None:
    now = time.monotonic()
    fleet, overflow = fleet_of(tuple(each for each, _ in own), tuple(each for each, _ in rented), policy)
    for pool, states in (("pool", own), ("rented", rented)):
        for replica, (_, how) in zip(fleet.pools[pool].replicas, states, strict=True):
            make_unwell(replica, how, now)
    caller = Principal(None, ANONYMOUS)
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10}).encode()
    call = Call(CHAT_PATH, [(b"x-tidegate-region", ", ".join(lock).encode())], body, now)
    order = read_order(call, fleet, "req_1", caller)
    exchange = Exchange("req_1", CHAT_PATH, now, 0.0, tenant="default")
    order = overflow.consider(order, exchange, caller, now)
    for _ in range(3):  # the first pool, the other one, and perhaps back
        order, error = hop(order, exchange, lock, now, data)
        if error is None:
            break
        other = overflow.instead(order, exchange, caller, error, now)
        if other is None:
            break
        order = other


def hop(
    order: Order, exchange: Exchange, lock: list[str], now: float, data: st.DataObject
) -> tuple[Order, NoReplicaAvailable | None]:
    """Replicas of one pool, until one answers or none is left: what the client would be told."""
    route, tried = order.route, list[Replica]()
    while True:
        decision = route.router.decide(order.request, route.pool.replicas, now, tried)
        if decision.replica is None:
            error = none_left(decision)
            assert isinstance(error, NoReplicaAvailable)
            somewhere = any(each.region in lock for each in route.pool.replicas)
            assert (error.status, error.code) == (
                (503, "no_replica_available") if somewhere else (403, "data_residency_mismatch")
            )
            return order, error
        assert decision.replica.region in lock
        exchange.attempts += 1
        if data.draw(st.booleans(), label=f"{decision.replica.name} answers"):
            return order, None
        tried.append(decision.replica)


async def test_the_allowed_replicas_fail_one_after_the_other_and_no_other_is_ever_asked(tmp_path: Path) -> None:
    """Two in the region, one elsewhere, one nowhere, one rented elsewhere: in the end it is 503, and never they."""
    async with (
        FakeEngine(status=500) as first,
        FakeEngine(status=503) as second,
        FakeEngine() as abroad,
        FakeEngine() as unknown,
        FakeEngine() as rented,
    ):
        log = tmp_path / "usage.jsonl"
        own = [
            {"url": first.url, "region": "eu-west"},
            {"url": abroad.url, "region": "us-east"},
            {"url": second.url, "region": "eu-west"},
            {"url": unknown.url},
        ]
        settings = settings_for(
            [],
            models={"m": {"backend": "pool", "spill": SPILL}},
            backends={
                "pool": {"engine": "openai", "replicas": own},
                "rented": {"engine": "openai", "hosted": True, "replicas": [{"url": rented.url, "region": "us-east"}]},
            },
        )
        async with serving(settings, usage_log=log) as gateway:
            for body in (CHAT, {**CHAT, "stream": True}):
                reply = await ask(gateway, body, CHAT_PATH, EU)
                assert reply.status in (500, 502, 503)
            for replica in gateway.runtime.fleet.pools["pool"].replicas:
                replica.draining = replica.region == "eu-west"
            reply = await ask(gateway, CHAT, CHAT_PATH, EU)
            assert (reply.status, error_of(reply.body)["code"]) == (503, "no_replica_available")
            reply = await ask(gateway, CHAT, CHAT_PATH, "x-tidegate-region: sa-east")
            assert (reply.status, error_of(reply.body)["code"]) == (403, "data_residency_mismatch")
            assert error_of(reply.body)["type"] == "request_forbidden"
            assert first.requests
            assert second.requests
            assert abroad.requests == unknown.requests == rented.requests == []
            reply = await ask(gateway, CHAT)  # without a lock, anybody may
            assert reply.status == 200
            records = await gateway.settled(5)
            assert [each.region for each in records[:4]] == ["eu-west", "eu-west", None, None]
        assert [json.loads(line)["region"] for line in log.read_text().splitlines()][:2] == ["eu-west", "eu-west"]


SECRET = "the-words-of-a-locked-prompt"


@pytest.mark.parametrize(
    "failing",
    [
        Behaviour(status=500, error_body=json.dumps({"error": {"message": f"cannot render {SECRET}"}})),
        Behaviour(status=400, error_body=json.dumps({"error": {"message": f"bad: {SECRET}"}})),
        Behaviour(raw=f"HTTP/1.1 {SECRET}\r\n\r\n"),
        Behaviour(bad_json=True),
        Behaviour(cut_after=1),
        Behaviour(error_first=True),
    ],
)
async def test_nothing_of_a_prompt_is_in_logs_metrics_or_records(
    failing: Behaviour, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    body = {**CHAT, "messages": [{"role": "user", "content": SECRET}]}
    async with FakeEngine(failing) as bad, FakeEngine(failing) as worse:
        own = [{"url": each.url, "region": "eu-west"} for each in (bad, worse)]
        log = tmp_path / "usage.jsonl"
        async with serving(settings_for([], backend={"replicas": own}), usage_log=log) as gateway:
            await ask(gateway, body, CHAT_PATH, EU)
            async with streaming(gateway, {**body, "stream": True}, CHAT_PATH, EU):
                pass
            records = await gateway.settled(2)
            assert all(each.region == "eu-west" for each in records)
            assert all(each.outcome is not Outcome.INTERNAL for each in records)
            families = await LocalSource(gateway.runtime).metrics()
        written = log.read_text() + caplog.text + repr([family.samples for family in families])
        assert '"region":"eu-west"' in written
        assert SECRET not in written


def test_a_replica_without_a_region_is_never_in_one() -> None:
    fleet, _ = fleet_of((None,), ("eu-west",), "cost")
    body = b'{"model":"m","messages":[]}'
    order = read_order(
        Call(CHAT_PATH, [(b"x-tidegate-region", b"eu-west")], body, 0.0), fleet, "r", Principal(None, ANONYMOUS)
    )
    decision = order.route.router.decide(order.request, order.route.pool.replicas, 0.0)
    assert [each.reason for each in decision.excluded] == ["region"]


async def test_who_may_be_served_nowhere_is_told_at_once_and_does_not_queue_first() -> None:
    async with FakeEngine(hang=True) as engine:
        full = [{"url": engine.url, "region": "eu-west", "max_in_flight": 1}]
        async with serving(settings_for([], backend={"replicas": full, "queue": {"headroom": 0}})) as gateway:
            holding = asyncio.create_task(ask(gateway, CHAT))
            await engine.received(1)
            reply = await ask(gateway, CHAT, CHAT_PATH, "x-tidegate-region: us-east")
            assert (reply.status, error_of(reply.body)["code"]) == (403, "data_residency_mismatch")
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)


async def test_who_waits_for_a_replica_that_a_reload_takes_out_of_the_region_is_told_then() -> None:
    async with FakeEngine(chunks=2) as here, FakeEngine(chunks=2) as there:

        def settings(region: str) -> Any:
            replicas = [
                {"url": here.url, "region": region, "max_in_flight": 1},
                {"url": there.url, "region": "us-east", "max_in_flight": 1},
            ]
            return settings_for([], backend={"replicas": replicas, "queue": {"enabled": True}})

        here.queue.append(Behaviour(chunks=2, hang_mid=1))
        async with serving(settings("eu-west")) as gateway, streaming(gateway, {**CHAT, "stream": True}, CHAT_PATH, EU):
            waiting = asyncio.create_task(ask(gateway, CHAT, CHAT_PATH, EU))
            async with asyncio.timeout(10.0):
                while len(gateway.runtime.gate.visits) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            gateway.runtime.reload(settings("us-east"))
            reply = await asyncio.wait_for(waiting, 10.0)  # and not after queue.max_wait_s, which are 30
            assert (reply.status, error_of(reply.body)["code"]) == (403, "data_residency_mismatch")
        assert (len(here.requests), len(there.requests)) == (1, 0)
