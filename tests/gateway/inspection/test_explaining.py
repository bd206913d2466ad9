"""What is kept of decisions: the truth, at a bounded pace and size."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.inspection import explaining
from gateway.inspection.explaining import MAX_OF_ONE, Explaining
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.order import Call, Order, read_order
from gateway.reading import read_prompt
from gateway.record import Exchange
from gateway.runtime import Runtime
from loadtests.engine import FakeEngine
from routing.explain import decided
from tests.gateway.admission.keyed import keyed
from tests.support.http import ask
from tests.support.serving import Serving, serving, settings_for

BODY = b'{"model": "m", "messages": [{"role": "user", "content": "%b"}]}' % (b"word " * 400)
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
NOBODY = [f"http://127.0.0.1:{port}" for port in range(9001, 9005)]

__all__ = ["keyed"]


def ordered(runtime: Runtime, id: str = "req_1") -> Order:
    call = Call("/v1/chat/completions", [], BODY, time.monotonic())
    order = read_order(call, runtime.fleet, id, Principal(None, ANONYMOUS))
    read_prompt(order, Exchange(id, order.path, 0.0, 0.0))
    return order


@pytest.fixture
async def gateway() -> Any:
    async with serving(settings_for(NOBODY), own_policies=True) as found:
        yield found


def kept(seen: Explaining, gateway: Serving, ids: Iterator[str] | list[str], now: float, **more: Any) -> None:
    for id in ids:
        order = ordered(gateway.runtime, id)
        decision = order.route.router.decide(order.request, order.route.pool.replicas, now)
        seen.take(order, now, (), decision, **more)


async def test_what_is_kept_is_what_was_decided(gateway: Serving) -> None:
    order, now = ordered(gateway.runtime), time.monotonic()
    replicas = order.route.pool.replicas
    replicas[1].draining = True
    replicas[2].work.queue(50_000, now)
    decision = order.route.router.decide(order.request, replicas, now, [replicas[3]])
    seen = Explaining(10.0)
    seen.take(order, now, [replicas[3]], decision)
    (told,) = seen.of("req_1")
    assert (told["replica"], told["reason"], told["policy"]) == ("pool-0", decision.reason, "cost")
    assert [each["replica"] for each in told["candidates"]] == ["pool-0", "pool-2"]
    assert told["predicted_ttft_ms"] == pytest.approx(decision.predicted_ttft_ms, abs=0.001)
    for each in told["candidates"]:
        assert sum(each["terms_ms"].values()) == pytest.approx(each["cost_ms"], abs=0.1)
    assert {each["replica"]: each["reason"] for each in told["excluded"]} == {
        "pool-1": "draining",
        "pool-3": "already_tried",
    }
    assert b"word" not in b"".join(seen._kept["req_1"])


async def test_nobody_left_is_explained_too(gateway: Serving) -> None:
    order, now = ordered(gateway.runtime), time.monotonic()
    for replica in order.route.pool.replicas:
        replica.draining = True
    seen = Explaining(10.0)
    seen.take(order, now, (), order.route.router.decide(order.request, order.route.pool.replicas, now))
    (told,) = seen.of("req_1")
    assert (told["replica"], told["candidates"], len(told["excluded"])) == (None, [], 4)


async def test_the_pace_is_kept_whatever_comes(gateway: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "SHARE", 1.0)
    seen, ids = Explaining(10.0), (f"req_{number}" for number in range(1000))
    for tick in range(300):
        now = 1000.0 + tick / 100
        if now >= seen.due_at:
            kept(seen, gateway, [next(ids)], now)
    # A second's worth at once, and ten a second then.
    assert 20 <= seen.taken <= 42


async def test_expensive_explanations_are_made_less_often(gateway: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "SHARE", 1e-9)
    seen = Explaining(1000.0)
    kept(seen, gateway, ["req_1", "req_2"], 1000.0)
    assert seen.taken == 1
    assert seen.due_at > 2000.0


async def test_none_are_kept_where_none_are_wanted_but_those_that_are_asked_for(gateway: Serving) -> None:
    seen = Explaining(0.0)
    kept(seen, gateway, ["req_1"], 1000.0)
    assert not seen.explains("req_1")
    kept(seen, gateway, ["req_1"], 1000.0, asked=True)
    assert seen.explains("req_1")


async def test_later_decisions_of_an_explained_request_follow_and_have_an_end(gateway: Serving) -> None:
    seen = Explaining(1.0)
    kept(seen, gateway, ["req_1"] * (MAX_OF_ONE + 5), 1000.0)
    kept(seen, gateway, ["req_2"], 1000.0)
    assert len(seen.of("req_1")) == MAX_OF_ONE
    assert not seen.of("req_2")


async def test_the_oldest_make_room(gateway: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "MAX_KEPT_BYTES", 20_000)
    seen = Explaining(0.0)
    kept(seen, gateway, [f"req_{number}" for number in range(40)], 1000.0, asked=True)
    assert seen.kept_bytes <= 20_000
    assert seen.explains("req_39")
    assert not seen.explains("req_0")
    assert seen.kept_bytes == sum(len(text) for texts in seen._kept.values() for text in texts)


async def test_explaining_changes_no_decision(gateway: Serving) -> None:
    order, now = ordered(gateway.runtime), time.monotonic()
    router, replicas = order.route.router, order.route.pool.replicas
    decision = router.decide(order.request, replicas, now)
    before = repr([(each.work, each.speed) for each in replicas])
    assert decided(router, order.request, replicas, now, (), decision)["replica"] == decision.replica.name  # type: ignore[arg-type, union-attr]
    assert repr([(each.work, each.speed) for each in replicas]) == before


async def test_each_attempt_of_a_failing_request_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "SHARE", 1.0)
    async with (
        FakeEngine(status=500) as bad,
        FakeEngine() as good,
        serving(settings_for([bad.url, good.url], admin={"explained_per_s": 1000}), own_policies=True) as gateway,
    ):
        async with asyncio.timeout(10):
            while True:
                reply = await ask(gateway, CHAT)
                (*_, record) = await gateway.settled()
                if record.attempts == 2:
                    break
        assert reply.status == 200
        first, second = gateway.runtime.explaining.of(record.request_id)
        assert (first["replica"], second["replica"]) == ("pool-0", "pool-1")
        assert second["excluded"][0] == {"replica": "pool-0", "region": None, "reason": "already_tried"}
