"""What the watch over replicas tells routing: another life, another size, what fits."""

from __future__ import annotations

import pytest

from backends.dialects.protocol import EngineInfo, EngineLoad, Readiness
from backends.ticker import Ticker
from gateway.config import Settings
from gateway.fleet import build_fleet
from routing.keys import seed_of, token_prefix
from routing.policies import PolicyError
from routing.router import HEADROOM, PoolState
from routing.work import NOTHING
from tests.gateway.watch.engines import Scripted
from tests.gateway.watch.test_watcher import Worker, settings, until, worker

PROMPT = token_prefix(range(1000), seed_of("m"))


def routing(one: Worker) -> PoolState:
    return one.runtime.fleet.pools["pool"].routing


async def another_life(one: Worker, engine: Scripted, told: EngineInfo) -> None:
    """The engine is gone for a moment and comes back as `told`."""
    engine.told = told
    engine.readiness = Readiness.NOT_READY
    await until(lambda: one.replica.health.unavailable_reason(0.0) is not None, 10)
    engine.readiness = Readiness.READY
    await until(lambda: one.replica.epoch == told.epoch, 10)


async def test_what_is_believed_of_a_cache_is_void_in_another_life_of_the_engine() -> None:
    engine = Scripted(told=EngineInfo(epoch="one"), loads=[EngineLoad()])
    async with worker(settings(), [engine]) as one:
        state = routing(one)
        slot = state.slot(one.replica)
        state.index.insert(slot, PROMPT)
        await until(lambda: one.replica.epoch == "one", 10)
        assert state.index.match(PROMPT) == {slot: 1000}, "that it is known now which life it is changes nothing"
        await another_life(one, engine, EngineInfo(epoch="two"))
        assert state.index.match(PROMPT) == {}
        state.index.insert(slot, PROMPT)
        assert state.slot(one.replica) == slot
        assert state.index.match(PROMPT) == {slot: 1000}


async def test_the_index_has_the_size_that_the_engine_states() -> None:
    engine = Scripted(told=EngineInfo(epoch="one", kv_capacity_tokens=100_000), loads=[EngineLoad()])
    async with worker(settings(), [engine]) as one:
        state = routing(one)
        slot = state.slot(one.replica)

        def budget() -> int:
            return state.index.stats().targets[slot].budget_tokens

        await until(lambda: budget() == 100_000 * HEADROOM, 10)
        engine.loads = [EngineLoad(kv_capacity_tokens=40_000)]
        await until(lambda: budget() == 40_000 * HEADROOM, 10)


async def test_what_fits_there_is_what_the_engine_says_in_this_life() -> None:
    engine = Scripted(told=EngineInfo(epoch="one", context_tokens=32_768), loads=[EngineLoad(adapter_slots=4)])
    async with worker(settings(), [engine]) as one:
        assert one.replica.context_tokens is None
        await until(lambda: one.replica.context_tokens == 32_768 and one.replica.adapter_slots == 4, 10)
        engine.loads = [EngineLoad()]
        await another_life(one, engine, EngineInfo(epoch="two"))
        assert one.replica.context_tokens is None
        assert one.replica.adapter_slots is None


def test_a_reload_keeps_what_is_believed_of_a_pool() -> None:
    """The board and the listeners of KV events hold on to it."""
    chosen: Settings = settings()
    ticker = Ticker()
    fleet = build_fleet(chosen, ticker, 0.0)
    again = build_fleet(settings(2), ticker, 1.0, fleet)
    assert again.pools["pool"].routing is fleet.pools["pool"].routing


async def test_work_of_clients_beside_the_gateway_counts_when_two_reports_show_it() -> None:
    busy = EngineLoad(running=9, waiting=3, waiting_uncached_tokens=5000)
    engine = Scripted(told=EngineInfo(epoch="one"), loads=[EngineLoad(running=0, waiting=0)])
    async with worker(settings(), [engine]) as one:
        work = one.replica.work
        await until(lambda: one.replica.load is not None, 10)
        assert (work.running, work.queued) == (0, 0)
        engine.loads = [busy]
        await until(lambda: (work.running, work.queued, work.queued_tokens) == (9, 3, 5000), 10)
        assert work.own == NOTHING, "peers are not told of it: they read the same reports"
        work.queue(700, 0.0)
        await until(lambda: (work.running + work.queued, work.queued_tokens) == (12, 5000), 10)
        work.unqueue(700, 0.0)
        engine.loads = [EngineLoad(running=1, waiting=0)]
        await until(lambda: (work.running, work.queued) == (0, 0), 10)


async def test_work_of_other_clients_ends_with_the_reports_of_it() -> None:
    """Else an engine whose load page has gone away would look busy for ever."""
    engine = Scripted(told=EngineInfo(epoch="one"), loads=[EngineLoad(running=9, waiting=3)])
    async with worker(settings(), [engine]) as one:
        work = one.replica.work
        await until(lambda: (work.running, work.queued) == (9, 3), 10)
        engine.loads = [EngineLoad(waiting=3)]
        await until(lambda: (work.running, work.queued) == (0, 0), 10)
        engine.loads = [EngineLoad(running=9, waiting=3)]
        await until(lambda: (work.running, work.queued) == (9, 3), 10)
        engine.loads = []
        await until(lambda: (work.running, work.queued) == (0, 0), 20)
        assert one.replica.load is None


def test_a_fleet_that_cannot_be_made_leaves_the_old_one_as_it_was() -> None:
    fleet = build_fleet(settings(2), Ticker(), 0.0)
    leaving = fleet.pools["pool"].replicas[1]
    slot = fleet.pools["pool"].routing.slot(leaving)
    chosen = settings(1)
    model = chosen.models["m"].model_copy(update={"policy": "no_such_policy"})
    wrong = chosen.model_copy(update={"models": {"m": model}})
    with pytest.raises(PolicyError):
        build_fleet(wrong, Ticker(), 1.0, fleet)
    assert fleet.pools["pool"].routing.slots == {leaving: slot}
    assert not leaving.retired
    build_fleet(settings(1), Ticker(), 2.0, fleet)
    assert fleet.pools["pool"].routing.slots == {}
    assert leaving.retired
