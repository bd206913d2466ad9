"""The map of the fleet: all workers' glances as one, short enough to be sent every second."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import msgspec

from gateway.fleet_view.chart import Chart
from gateway.fleet_view.detail import detail
from gateway.fleet_view.glance import Glance, PoolGlance, ReplicaGlance, glance
from gateway.roster import Roster
from gateway.state import LocalSource
from loadtests.engine import FakeEngine
from tests.support.serving import serving, settings_for

LIVE_BYTES = 20_000


def replica(name: str = "a", **fields: Any) -> ReplicaGlance:
    return ReplicaGlance(
        **{
            **{"name": name, "region": "eu", "engine": "sglang", "hosted": False, "weight": 1.0, "ceiling": 16},
            **{"in_flight": 3, "queued": 1, "draining": False, "available": True, "reason": "", "health": "healthy"},
            **{"share": 1.0, "kv_use": 0.25, "warm_tokens": 5000, "warm_budget": 90_000, "prefill_ms": 0.1},
            **{"step_ms": 8.0, "adapters": [], "loading": []},
            **fields,
        }
    )


def seen(*replicas: ReplicaGlance, worker: int = 0) -> tuple[int, Glance]:
    return worker, Glance(worker, [PoolGlance("pool", "sglang", list(replicas))])


def rows(chart: Chart) -> list[dict[str, Any]]:
    whole = chart.whole()
    named = [dict(zip(whole["fields"], row, strict=False)) for row in whole["now"]]
    return [{**row, **whole["states"][row["state"]]} for row in named]


def test_workers_add_up_what_they_send_and_agree_on_what_is_so() -> None:
    chart = Chart([seen(replica()), seen(replica(in_flight=4, warm_tokens=6000, kv_use=None), worker=1), (2, None)])
    (row,) = rows(chart)
    assert (row["in_flight"], row["queued"], row["kv_use"], row["warm_tokens"]) == (7, 1, 0.25, 6000)
    assert chart.whole()["replicas"][0]["ceiling"] == 32
    assert chart.whole()["silent_workers"] == [2]


def test_a_state_is_one_word_with_a_reason() -> None:
    chart = Chart(
        [
            seen(
                replica("well"),
                replica("drained", draining=True, reason="draining"),
                replica("busy", reason="full"),
                replica("ill", reason="not_ready"),
                replica("back", share=0.4),
            )
        ]
    )
    assert [(row["kind"], row["reason"]) for row in rows(chart)] == [
        ("ok", ""),
        ("draining", "draining"),
        ("full", "full"),
        ("down", "not_ready"),
        ("recovering", ""),
    ]
    assert rows(chart)[-1]["share"] == 0.4


def test_the_digest_changes_with_what_rows_do_not_say_and_with_nothing_else() -> None:
    digest = Chart([seen(replica())]).digest
    assert Chart([seen(replica(in_flight=9, kv_use=0.9, step_ms=3.0, reason="full"))]).digest == digest
    for other in (replica("b"), replica(weight=2.0), replica(adapters=["poet"]), replica(ceiling=None)):
        assert Chart([seen(other)]).digest != digest


def test_two_hundred_busy_replicas_fit_into_an_event() -> None:
    many = [
        replica(f"pool-{at}", in_flight=at, kv_use=at / 201, warm_tokens=90_000 - 37 * at, queued=at % 7, share=0.517)
        for at in range(200)
    ]
    event = json.dumps(Chart([seen(*many)]).now(), separators=(",", ":"))
    assert len(event) < LIVE_BYTES / 2


async def test_a_real_worker_is_seen_as_it_is() -> None:
    async with (
        FakeEngine(prompt_tokens=2000) as engine,
        serving(settings_for([engine.url]), own_policies=True) as gateway,
    ):
        async with httpx2.AsyncClient(trust_env=False) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "tide " * 2000}]}
            answer = await client.post(f"{gateway.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200
        looked = msgspec.json.decode(msgspec.json.encode(glance(gateway.runtime, 0)), type=Glance)
        (pool,) = looked.pools
        (only,) = pool.replicas
        assert (only.name, only.available, only.in_flight, only.health) == ("pool-0", True, 0, "healthy")
        assert only.warm_tokens is not None
        assert only.warm_tokens > 0
        source = LocalSource(gateway.runtime)
        told = detail(Roster.of([(0, await source.fleet()), (1, None)]), "pool", "pool-0")
        assert told["prefix_index"]["tokens"] == only.warm_tokens
        assert told["last_of_pool"] is True
        assert told["silent_workers"] == [1]
