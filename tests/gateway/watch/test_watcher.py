"""The watch over replicas: who asks, what is made of the answers, and that all workers come to know it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from backends.dialects.protocol import Adapter, EngineInfo, EngineLoad, Priority, Readiness
from backends.side import SideChannel, Trouble
from backends.upstream import Upstream
from gateway.admission.opening import Admission
from gateway.config import Settings
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.runtime import Runtime
from gateway.store import MemoryStore, Store
from gateway.watch import notes
from gateway.watch.patrol import has_progressed, prefill_speed
from gateway.watch.watcher import Watcher
from routing.capacity import Capacity
from routing.health import Change, Credential, Credentials
from routing.policies.balanced import LeastOutstanding
from routing.router import Router
from routing.types import Replica
from tests.gateway.watch.engines import Scripted

FAST = {"probe_interval_s": 0.1, "load_interval_s": 0.1}


def settings(count: int = 1, **backend: Any) -> Settings:
    replicas = [{"url": f"http://127.0.0.1:{port}"} for port in range(1, count + 1)]
    data: dict[str, Any] = {
        "models": {"m": {"backend": "pool", "upstream_model": "served"}},
        "backends": {"pool": {"engine": "openai", "replicas": replicas, "health": FAST, **backend}},
    }
    return Settings(**data)


class Worker:
    """A runtime and its watch, without a listener."""

    def __init__(self, runtime: Runtime, watcher: Watcher) -> None:
        self.runtime = runtime
        self.watcher = watcher

    @property
    def upstreams(self) -> list[Upstream]:
        return list(self.runtime.fleet.upstreams())

    @property
    def replica(self) -> Replica:
        return self.upstreams[0].replica


@asynccontextmanager
async def worker(chosen: Settings, dialects: list[Scripted], store: Store | None = None) -> AsyncIterator[Worker]:
    runtime = Runtime(
        chosen, Router(LeastOutstanding(Random(7))), Metrics(), Ledger(None), admission=Admission(chosen, store=store)
    )
    for upstream, dialect in zip(runtime.fleet.upstreams(), dialects, strict=True):
        upstream.dialect = dialect
    watcher = Watcher(runtime, Random(7))
    watcher.start()
    try:
        yield Worker(runtime, watcher)
    finally:
        await watcher.aclose()
        await runtime.aclose()


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Shared(MemoryStore):
    """A store that outlives the runtimes which close it."""

    async def aclose(self) -> None: ...


async def test_what_an_engine_says_of_itself_is_known() -> None:
    engine = Scripted(
        told=EngineInfo(version="1.2", models=("served",), epoch="one"),
        loads=[EngineLoad(running=3, waiting=2, kv_use=0.25)],
        held=[Adapter("a"), Adapter("cold", resident=False)],
    )
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.load is not None and one.replica.adapters is not None)
        assert one.replica.load is not None
        assert (one.replica.load.running, one.replica.load.waiting, one.replica.load.kv_use) == (3, 2, 0.25)
        assert one.replica.adapters == frozenset({"a"})
        assert one.replica.epoch == "one"
        assert one.upstreams[0].info == engine.told
        assert "probe served" in engine.asked


async def test_what_an_engine_takes_at_once_is_what_it_states_or_what_is_seen_of_it() -> None:
    engine = Scripted(
        told=EngineInfo(epoch="one", max_running=64, kv_capacity_tokens=32768, priority=Priority.LOWER_FIRST),
        loads=[EngineLoad(running=3, waiting=0)],
    )
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.meter.capacity.requests)
        assert one.replica.meter.capacity == Capacity(64, 32768, "stated")
        assert one.upstreams[0].info == engine.told
        engine.loads = [EngineLoad(running=40, waiting=5)]
        await until(lambda: one.replica.meter.capacity == Capacity(40, 32768, "measured"))
        engine.loads = [EngineLoad(running=6, max_running=8, waiting=0, kv_capacity_tokens=4096)]
        await until(lambda: one.replica.meter.capacity == Capacity(8, 4096, "stated"))


async def test_every_worker_counts_with_the_same_capacity() -> None:
    store = Shared()
    engine = Scripted(loads=[EngineLoad(running=5, waiting=5)])
    async with worker(settings(), [engine], store) as one, worker(settings(), [Scripted()], store) as other:
        for each in (one, other):
            await until(lambda each=each: each.replica.meter.capacity.requests == 5)  # type: ignore[misc]


async def test_in_another_life_an_engine_has_the_size_that_it_states_then() -> None:
    engine = Scripted(told=EngineInfo(epoch="one", max_running=64, kv_capacity_tokens=100), loads=[EngineLoad()])
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.meter.capacity.requests == 64)
        engine.told = EngineInfo(epoch="two", max_running=16)
        engine.readiness = Readiness.NOT_READY
        await until(lambda: not one.replica.available(time.monotonic()))
        engine.readiness = Readiness.READY
        await until(lambda: one.replica.meter.capacity == Capacity(16, None, "stated"))


async def test_a_replica_that_is_one_rank_has_its_part_of_what_the_engine_states() -> None:
    replicas = [{"url": "http://127.0.0.1:1", "dp_rank": rank} for rank in range(2)]
    told = EngineInfo(epoch="one", max_running=8, kv_capacity_tokens=65536, dp_size=2)
    chosen = settings(engine="sglang", replicas=replicas)
    async with worker(chosen, [Scripted(told=told), Scripted(told=told)]) as one:
        for upstream in one.upstreams:
            await until(
                lambda upstream=upstream: upstream.replica.meter.capacity == Capacity(4, 32768, "stated")  # type: ignore[misc]
            )


async def test_of_several_workers_one_asks_and_all_know() -> None:
    store = Shared()
    engine = Scripted(loads=[EngineLoad(running=3)])
    async with worker(settings(), [engine], store) as one, worker(settings(), [Scripted()], store) as other:
        other.upstreams[0].dialect = idle = Scripted(loads=[EngineLoad(running=99)])
        await until(lambda: one.replica.load and other.replica.load)
        before = len(engine.asked), len(idle.asked)
        await until(lambda: len(engine.asked) > before[0] + 5)
        assert len(idle.asked) == before[1]
        assert other.replica.load is not None
        assert other.replica.load.running == 3


async def test_another_worker_goes_on_when_the_one_that_asked_is_gone() -> None:
    store = Shared()
    second = Scripted(loads=[EngineLoad(running=2)])
    async with worker(settings(), [Scripted(loads=[EngineLoad(running=1)])], store) as one:
        await until(lambda: one.replica.load)
        async with worker(settings(), [second], store) as other:
            await until(lambda: other.replica.load)
            await one.watcher.aclose()
            await until(lambda: other.replica.load and other.replica.load.running == 2)


async def test_what_is_not_offered_is_said_once_and_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine = Scripted()
    async with worker(settings(), [engine]) as one:
        await until(lambda: engine.asked.count("probe served") > 4)
        assert engine.asked.count("load") <= 2  # once more when it turned out which life of the engine this is
        assert one.upstreams[0].signals.lacking["load"] == "it has no such page"
    assert sum("gives no load" in each.getMessage() for each in caplog.records) == 1


async def test_an_engine_that_says_no_gets_no_new_work_until_it_says_yes() -> None:
    engine = Scripted(readiness=Readiness.NOT_READY)
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.unavailable_reason(time.monotonic()) == "not_ready")
        engine.readiness = Readiness.READY
        await until(lambda: one.replica.available(time.monotonic()))


async def test_a_dead_engine_is_known_without_a_request_and_so_is_its_return() -> None:
    engine = Scripted(readiness=Trouble.REFUSED)
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.unavailable_reason(time.monotonic()) == "cooling_down")
        assert one.runtime.witness.changes[("pool", "pool-0", "unreachable")] == 1
        engine.readiness = Readiness.READY
        await until(lambda: one.replica.available(time.monotonic()))


async def test_an_engine_that_answers_requests_is_alive_whatever_its_probe_says() -> None:
    engine = Scripted(readiness=Trouble.TIMEOUT)
    async with worker(settings(), [engine]) as one:
        for _ in range(30):
            one.replica.health.progressed_at = time.monotonic()
            await asyncio.sleep(0.02)
            assert one.replica.available(time.monotonic())
        assert len(engine.asked) > 3


async def test_a_silent_engine_is_given_nothing_new() -> None:
    async with worker(settings(), [Scripted(readiness=Trouble.TIMEOUT)]) as one:
        await until(lambda: one.replica.unavailable_reason(time.monotonic()) == "unresponsive")


async def test_a_refused_key_is_not_the_replicas_fault() -> None:
    engine = Scripted(readiness=Readiness.UNAUTHORIZED)
    async with worker(settings(), [engine]) as one:
        await until(lambda: len(engine.asked) > 3)
        assert one.replica.health.unavailable_reason(time.monotonic()) is None


async def test_a_key_that_serves_requests_is_good_whatever_a_probe_says() -> None:
    engine = Scripted(readiness=Readiness.UNAUTHORIZED)
    async with worker(settings(), [engine]) as one:
        credential = Credential()
        one.replica.credential = Credentials([credential])
        credential.accepted()
        await until(lambda: engine.asked.count("probe served") > 5)
        assert one.replica.available(time.monotonic())
        credential.refused(time.monotonic(), 401)
        assert not credential.proven


async def test_what_probes_said_is_forgotten_where_nobody_probes_any_more() -> None:
    engine = Scripted(readiness=Readiness.NOT_READY)
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.unavailable_reason(time.monotonic()) == "not_ready")
        one.runtime.reload(settings(health={**FAST, "probe": False}))
        one.watcher.refresh()
        asked = len(engine.asked)
        await until(lambda: len(engine.asked) > asked + 1)
        assert one.replica.available(time.monotonic())


async def test_a_replica_that_stays_away_is_not_news_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = Scripted(readiness=Trouble.REFUSED)
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.cooldown.failures >= 3)
    said = [each for each in caplog.records if each.levelno >= logging.WARNING and "fails" in each.getMessage()]
    assert len(said) == 1


async def test_a_new_life_of_the_engine_is_a_new_epoch() -> None:
    engine = Scripted(told=EngineInfo(epoch="one"), held=[Adapter("a")])
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.adapters)
        engine.readiness = Trouble.REFUSED
        await until(lambda: not one.replica.available(time.monotonic()))
        engine.told, engine.held, engine.readiness = EngineInfo(epoch="two"), [], Readiness.READY
        await until(lambda: one.replica.epoch == "two" and one.replica.adapters == frozenset())


async def test_an_engine_without_an_epoch_of_its_own_gets_one_for_every_return() -> None:
    engine = Scripted(told=EngineInfo())
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.epoch)
        first = one.replica.epoch
        engine.readiness = Trouble.REFUSED
        await until(lambda: not one.replica.available(time.monotonic()))
        engine.readiness = Readiness.READY
        await until(lambda: one.replica.epoch != first)


async def test_configured_adapters_are_loaded_once_in_each_life_of_the_engine() -> None:
    engine = Scripted(held=[Adapter("there")])
    wanted = [{"name": "there", "path": "/a"}, {"name": "new", "path": "/b"}]
    async with worker(settings(adapters=wanted), [engine]) as one:
        await until(lambda: one.replica.adapters == frozenset({"there", "new"}))
        assert engine.loaded == [("new", "/b")]
        engine.told = EngineInfo(epoch="two")
        engine.held = []
        engine.readiness = Trouble.REFUSED
        await until(lambda: not one.replica.available(time.monotonic()))
        engine.readiness = Readiness.READY
        await until(lambda: len(engine.loaded) == 3)
        assert sorted(engine.loaded[1:]) == [("new", "/b"), ("there", "/a")]


async def test_an_engine_that_lists_no_adapters_has_those_it_is_sent_by_path_and_no_other() -> None:
    wanted = [{"name": "by-path", "path": "/a"}]
    engine = Scripted(held=None)
    engine.adapters_by_path = True
    async with worker(settings(adapters=wanted), [engine]) as one:
        await until(lambda: one.replica.adapters == frozenset({"by-path"}))
    plain = Scripted(held=None)
    async with worker(settings(adapters=wanted), [plain]) as one:
        await until(lambda: "adapters" in one.upstreams[0].signals.lacking)
        assert one.replica.adapters is None


async def test_an_adapter_whose_loading_broke_off_is_asked_for_again() -> None:
    engine = Scripted(held=[], broken_loads=1)
    async with worker(settings(adapters=[{"name": "new", "path": "/b"}]), [engine]) as one:
        one.watcher.refresh()
        await until(lambda: engine.loaded == [("new", "/b")], within_s=15.0)


async def test_health_is_asked_for_while_an_adapter_takes_its_time_to_load() -> None:
    class Slow(Scripted):
        async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
            self.asked.append("loading")
            await asyncio.Event().wait()

    engine = Slow(held=[])
    async with worker(settings(adapters=[{"name": "new", "path": "/b"}]), [engine]) as one:
        await until(lambda: "loading" in engine.asked)
        engine.readiness = Readiness.NOT_READY
        await until(lambda: one.replica.unavailable_reason(time.monotonic()) == "not_ready")
        assert engine.asked.count("loading") == 1


async def test_a_list_of_thousands_of_adapters_is_still_a_note() -> None:
    engine = Scripted(held=[Adapter(f"adapter-{number}", "/some/long/path" * 10) for number in range(1000)])
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.adapters is not None and len(one.replica.adapters) == 1000)


async def test_an_engine_that_serves_another_model_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    engine = Scripted(told=EngineInfo(models=("qwen",), epoch="one"))
    async with worker(settings(), [engine]) as one:
        await until(lambda: one.replica.epoch)
        await until(lambda: engine.asked.count("probe served") > 4)
    said = [each.getMessage() for each in caplog.records if "is asked for" in each.getMessage()]
    assert said == [
        "replica pool-0 serves 'qwen', and is asked for 'served'; set upstream_model if that is another model"
    ]


async def test_a_drained_replica_stays_drained_over_a_reload_and_in_a_new_worker() -> None:
    store = Shared()
    async with worker(settings(2), [Scripted(), Scripted()], store) as one:
        key = notes.key(notes.DRAIN, one.replica)
        await store.post(key, b'{"since_unix_s":0}')
        await until(lambda: one.replica.draining)
        assert one.replica.unavailable_reason(time.monotonic()) == "draining"
        one.runtime.reload(settings(2, connections={"max": 7}))
        one.watcher.refresh()
        await until(lambda: one.upstreams[0].replica.draining)
        async with worker(settings(2), [Scripted(), Scripted()], store) as other:
            await until(lambda: other.replica.draining)
            assert not other.upstreams[1].replica.draining
            await store.withdraw(key)
            await until(lambda: not one.upstreams[0].replica.draining and not other.replica.draining)


async def test_a_drain_is_of_an_engine_and_not_of_its_place_in_the_configuration() -> None:
    async with worker(settings(2), [Scripted(), Scripted()]) as one:
        first, second = (upstream.replica for upstream in one.upstreams)
        await one.runtime.store.post(notes.key(notes.DRAIN, first), b'{"since_unix_s":0}')
        await until(lambda: first.draining)
        other_order = Settings(
            models={"m": {"backend": "pool"}},  # type: ignore[dict-item]
            backends={"pool": {"engine": "openai", "replicas": [{"url": second.url}, {"url": first.url}]}},  # type: ignore[dict-item]
        )
        one.runtime.reload(other_order)
        one.watcher.refresh()
        await one.watcher.first_look(1.0)
        assert [(each.replica.url, each.replica.draining) for each in one.upstreams] == [
            (second.url, False),
            (first.url, True),
        ]


async def test_a_new_watcher_over_the_same_engine_is_no_new_life_of_it() -> None:
    store = Shared()
    async with worker(settings(), [Scripted(told=EngineInfo())], store) as one:
        await until(lambda: one.replica.epoch)
        epoch = one.replica.epoch
        second = Scripted(told=EngineInfo())
        async with worker(settings(), [second], store) as other:
            await until(lambda: other.replica.epoch == epoch)
            await one.watcher.aclose()
            await until(lambda: second.asked.count("info") > 0)
            await until(lambda: second.asked.count("probe served") > 3)
            assert other.replica.epoch == epoch


async def test_a_page_that_takes_long_keeps_nobody_from_probing() -> None:
    class Slow(Scripted):
        async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
            await asyncio.sleep(60)
            return EngineLoad()

    engine = Slow()
    async with worker(settings(), [engine]) as one:
        await until(lambda: engine.asked.count("probe served") > 3)
        engine.readiness = Readiness.NOT_READY
        await until(lambda: not one.replica.available(time.monotonic()))


async def test_an_ejection_is_told_and_heeded_when_one_has_seen_failures_too() -> None:
    store = Shared()
    scripts = [Scripted(), Scripted()]
    async with worker(settings(2), scripts, store) as one, worker(settings(2), scripts, store) as other:
        now = time.monotonic()
        other.replica.health.failed(now, room=True)
        changes = [one.replica.health.failed(now, room=True) for _ in range(5)]
        assert changes[-1] is Change.EJECTED
        one.runtime.witness.changed(one.replica, Change.EJECTED, "a test")
        await until(lambda: other.replica.unavailable_reason(time.monotonic()) == "ejected")
        assert other.runtime.witness.changes == {("pool", "pool-0", "ejected"): 1}


async def test_one_workers_failures_alone_do_not_eject_for_all() -> None:
    store = Shared()
    scripts = [Scripted(), Scripted()]
    async with worker(settings(2), scripts, store) as one, worker(settings(2), scripts, store) as other:
        for _ in range(5):
            one.replica.health.failed(time.monotonic(), room=True)
        one.runtime.witness.changed(one.replica, Change.EJECTED, "a test")
        await store.post(notes.key(notes.PROBE, other.upstreams[1].replica), b"not a note")
        await store.post(
            notes.key(notes.LOAD, other.replica),
            b'{"load":{"running":7},"prefill_us_per_token":null,"progressed":false}',
        )
        await until(lambda: other.replica.load is not None and other.replica.load.running == 7)
        assert other.replica.available(time.monotonic())


async def test_half_open_one_worker_tries_for_all_and_tells_them() -> None:
    store = Shared()
    chosen = settings(2, health={**FAST, "ejection_s": 0.2})
    scripts = [Scripted(), Scripted()]
    async with worker(chosen, scripts, store) as one, worker(chosen, scripts, store) as other:
        workers = [one, other]
        for each in workers:
            for _ in range(5):
                each.replica.health.failed(time.monotonic(), room=True)
        await until(lambda: any(each.replica.available(time.monotonic()) for each in workers))
        await asyncio.sleep(0.3)
        trying = [each for each in workers if each.replica.available(time.monotonic())]
        assert len(trying) == 1
        pool = trying[0].runtime.fleet.pools["pool"]
        for _ in range(3):
            trying[0].runtime.witness.answered(trying[0].replica, pool.replicas)
        await until(lambda: all(each.replica.available(time.monotonic()) for each in workers))
        assert all(each.replica.health.share(time.monotonic()) < 0.5 for each in workers)


async def test_a_store_that_is_away_stops_nothing() -> None:
    store = MemoryStore()
    await store.aclose()
    async with worker(settings(), [Scripted()], store) as one:
        await asyncio.sleep(0.1)
        assert one.replica.available(time.monotonic())


def test_prefill_speed_is_measured_between_two_reports() -> None:
    first = EngineLoad(prefill_tokens_total=1000, prefill_busy_s_total=2.0)
    assert prefill_speed(first, EngineLoad(prefill_tokens_total=3000, prefill_busy_s_total=2.5)) == 250.0
    assert prefill_speed(None, first) is None
    assert prefill_speed(first, first) is None
    assert prefill_speed(first, EngineLoad(prefill_tokens_total=5, prefill_busy_s_total=0.1)) is None
    assert prefill_speed(first, EngineLoad()) is None


def test_progress_is_any_of_the_engines_own_counters() -> None:
    first = EngineLoad(prefill_tokens_total=10, generated_tokens_total=10)
    assert has_progressed(first, EngineLoad(prefill_tokens_total=10, generated_tokens_total=11))
    assert has_progressed(first, EngineLoad(prefill_tokens_total=11))
    assert not has_progressed(first, first)
    assert not has_progressed(None, first)
