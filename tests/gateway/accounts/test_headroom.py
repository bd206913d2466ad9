"""Limits as a worker tells of them, and how the answers of several become one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from gateway.accounts.headroom import Headroom, gauges_of
from gateway.accounts.headroom_of_record import with_spend_of_record
from gateway.accounts.limit_rows import Gauge, HolderLimits, LimitsAnswer, LimitsQuestion, merged, money_gauge, shown
from gateway.database.answers import Changes
from gateway.database.database import Database
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.sets import LimitSet, Raise
from gateway.store.limits import Budget, Rate, Reading, Scope, Unit
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import admitting, bearer, body, keyed, static
from tests.support.client import connect, post
from tests.support.redis_server import RedisServer

NOW_US = 1_795_000_000_000_000


def holder(scope: str = "{t:a}:t", *gauges: Gauge, **fields: Any) -> HolderLimits:
    nearest = max(gauges, key=lambda gauge: gauge.share)
    return HolderLimits(scope, "tenant", nearest.share, nearest.limit, tenant="a", limits=list(gauges), **fields)


def test_a_mark_ahead_of_now_says_how_much_of_the_burst_is_taken() -> None:
    limits = LimitSet(requests_per_minute=600, concurrent_requests=4, usd_per_day=1.0)
    scope = Scope("k", (Rate(Unit.REQUESTS, 600, 100, 100),), 4, (Budget("d20261122", 10**6, 0, NOW_US + 60_000_000),))
    rate, concurrent, money = gauges_of(scope, limits, Reading(NOW_US, (NOW_US + 2_000_000,), 3, 200_000, (700_000,)))
    assert (rate.used, rate.remaining, rate.capacity, rate.share, rate.resets_s) == (20, 80, 100, 0.2, 2.0)
    assert (concurrent.used, concurrent.remaining, concurrent.share) == (3, 1, 0.75)
    assert (money.used, money.reserved, money.share, money.resets_s) == (0.7, 0.2, 0.9, 60.0)
    assert round(money.remaining, 9) == 0.1
    (idle, *_) = gauges_of(scope, limits, Reading(NOW_US, (5,), 0, 0, (0,)))
    assert (idle.used, idle.remaining, idle.resets_s) == (0, 100, 0)
    (owing, *_) = gauges_of(scope, limits, Reading(NOW_US, (NOW_US + 20_000_000,), 0, 0, (0,)))
    assert (owing.used, owing.remaining, owing.share) == (200, 0, 2.0)


def test_answers_of_workers_become_one_that_begins_with_the_nearest() -> None:
    def gauge(share: float, refused: int) -> Gauge:
        return Gauge("requests_per_minute", 60, share * 10, 10 - share * 10, share, refused=refused, would_refuse=1)

    one = LimitsAnswer([holder("x", gauge(0.2, 1), in_line=2), holder("y", gauge(0.5, 0))], 2, True, "redis")
    other = LimitsAnswer([holder("x", gauge(0.7, 3), in_line=1)], 1, False, "local")
    both = merged([one, other], 10)
    assert [(row.scope, row.share, row.in_line) for row in both.rows] == [("x", 0.7, 3), ("y", 0.5, 0)]
    assert (both.rows[0].limits[0].refused, both.rows[0].limits[0].would_refuse) == (4, 2)
    assert (both.complete, both.store, both.looked_at) == (False, "local", 2)
    assert set(shown(both.rows[0])) >= {"scope", "raised", "shadow", "limits"}


def test_a_budget_is_shown_by_the_spend_of_record_when_that_is_more(tmp_path: Path) -> None:
    database = Database.open(f"sqlite:///{tmp_path / 'spend.db'}")
    database.spend.add("one", {("{t:a}:t", "d20261122"): 900_000, ("{t:b}:t", "d20261122"): 10})
    rows = [
        holder("{t:b}:t", money_gauge("d20261122", 10**6, 500_000, 0, 60.0)),
        holder("{t:a}:t", money_gauge("d20261122", 10**6, 100_000, 50_000, 60.0)),
    ]
    with_spend_of_record(rows, lambda: database)
    assert [(row.scope, row.share, row.limits[0].used, row.limits[0].reserved) for row in rows] == [
        ("{t:a}:t", 0.95, 0.9, 0.05),
        ("{t:b}:t", 0.5, 0.5, 0.0),
    ]
    with_spend_of_record(rows, lambda: None)
    database.close()
    with_spend_of_record(rows, lambda: database)  # away: the store's own count stands


async def test_ten_thousand_keys_are_looked_at_in_bounded_time_the_active_first(tmp_path: Path) -> None:
    records = tuple(
        KeyRecord(
            f"key_{number}",
            number.to_bytes(32, "big"),
            f"t{number % 50}",
            limits=LimitSet(requests_per_minute=60),
            raises=(Raise(LimitSet(requests_per_minute=90), time.time() + 60),) if number == 3 else (),
        )
        for number in range(10_000)
    )
    tenants = tuple(TenantRecord(f"t{number}", limits=LimitSet(usd_per_day=9)) for number in range(50))
    async with FakeEngine() as engine:
        settings = keyed(
            tmp_path,
            [engine.url],
            static(limits={"requests_per_minute": 1}),
            models={"m": {"backend": "pool", "price": {"input": 1, "output": 1}, "limits": {"concurrent_requests": 5}}},
        )
        async with admitting(settings) as gate, connect(gate.host, gate.port) as client:
            directory = gate.runtime.gate.directory
            assert directory is not None
            directory.apply(Changes(1, records, tenants=tenants))
            await client.send(post("/v1/chat/completions", json.loads(body()), bearer()))
            assert (await client.reply()).status == 200
            headroom = Headroom(gate.runtime.gate)
            before = repr(gate.runtime.gate.home.near._limits._limiter._states.keys())
            answer = await headroom.answer(LimitsQuestion())
            assert repr(gate.runtime.gate.home.near._limits._limiter._states.keys()) == before
            assert (answer.rows[0].key, answer.rows[0].share > 0.5) == ("static:ci", True)  # of a minute
            assert (answer.looked_at, answer.complete, len(answer.rows)) == (4096, False, 100)
            live = await headroom.answer(LimitsQuestion(idle=False))
            assert {row.kind for row in live.rows} == {"key", "model"}
            (one,) = (await headroom.answer(LimitsQuestion(key="key_3", model=None))).rows[:1]
            third = (await headroom.answer(LimitsQuestion(key="key_3"))).rows
            assert {row.kind for row in third} == {"key", "tenant", "model"}
            row = next(each for each in third if each.kind == "key")
            assert (row.raised, row.limits[0].most) == ({"requests_per_minute": [60, 90]}, 90)
            assert one.share == 0
            of_tenant = await headroom.answer(LimitsQuestion(tenant="t7", most=500))
            assert (of_tenant.complete, of_tenant.looked_at) == (True, 201)
            day = time.strftime("d%Y%m%d", time.gmtime())
            spent = {"{t:t49}:t": {day: 10_000_000}}
            for idle in (False, True):  # whoever has spent it all, however long ago it was active
                answer = await headroom.answer(LimitsQuestion(idle=idle, spent=spent))
                assert ("t49", "usd_per_day") in [(row.tenant, row.nearest) for row in answer.rows[:2] if row.share > 1]
            of_model = await headroom.answer(LimitsQuestion(model="m"))
            assert [row.kind for row in of_model.rows] == ["model"]


async def test_without_its_redis_a_worker_tells_what_it_decides_by_itself(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    async with FakeEngine() as engine:
        limits = {"requests_per_minute": 1}
        settings = keyed(tmp_path, [engine.url], static(limits=limits), store=redis_server.url)
        async with admitting(settings) as gate, connect(gate.host, gate.port) as client:
            await client.send(post("/v1/chat/completions", json.loads(body()), bearer()))
            assert (await client.reply()).status == 200
            headroom = Headroom(gate.runtime.gate)
            answer = await headroom.answer(LimitsQuestion())
            (gauge,) = answer.rows[0].limits
            assert (answer.store, gauge.share > 0.5, gauge.remaining) == ("redis", True, 0)
            gate.runtime.gate.store_changed(False)
            answer = await headroom.answer(LimitsQuestion())
            assert (answer.store, answer.rows[0].limits[0].limit) == ("local", "requests_per_minute")
