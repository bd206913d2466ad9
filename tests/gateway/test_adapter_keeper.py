"""Loading LoRA adapters for requests: in whose place, one after the other, and what becomes of those who wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from backends.dialects.protocol import Adapter, AdapterRefused, EngineInfo, EngineLoad, NotOffered, Readiness
from backends.side import SideChannel, SideChannelError, Trouble
from backends.upstream import Upstream
from gateway.adapters import AdapterAway
from gateway.admission.opening import Admission
from gateway.config import Settings
from gateway.errors import UpstreamTimeout
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.runtime import Runtime
from gateway.store import MemoryStore, Store
from gateway.watch.watcher import Watcher
from routing.types import Replica
from tests.gateway.watch.engines import Scripted
from tests.gateway.watch.test_watcher import FAST, Shared, until

NAMES = ("a", "b", "c", "d")
LONG_S = 20.0


class Engine(Scripted):
    """Has slots, takes its time, and notes what it was told in which order."""

    loads_adapters = True

    def __init__(self, *held: str, slots: int = 2, delay_s: float = 0.0) -> None:
        super().__init__(held=[Adapter(name, f"/{name}") for name in held])
        self.slots = slots
        self.delay_s = delay_s
        self.orders: list[str] = []
        self.changing = 0
        self.overlaps = 0
        self.most_held = len(held)
        self.refusing: Exception | None = None
        self.running: tuple[str, ...] = ()

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        return EngineLoad(running=len(self.running), adapter_slots=self.slots, resident_adapters=self.running)

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        await self._change(f"load {name}")
        assert self.held is not None
        if any(each.name == name for each in self.held):
            raise AdapterRefused("already loaded")
        self.held.append(Adapter(name, path))
        self.most_held = max(self.most_held, len(self.held))

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        await self._change(f"unload {name}")
        assert self.held is not None
        self.held = [each for each in self.held if each.name != name]

    async def _change(self, order: str) -> None:
        self.orders.append(order)
        if self.refusing is not None:
            raise self.refusing
        self.changing += 1
        self.overlaps += self.changing > 1
        await asyncio.sleep(self.delay_s)
        self.changing -= 1


def settings(ports: Sequence[int] = (1,), ranks: int | None = None, **backend: Any) -> Settings:
    replicas: list[dict[str, Any]] = [
        {"url": f"http://127.0.0.1:{port}", **({} if ranks is None else {"dp_rank": rank})}
        for port in ports
        for rank in range(ranks or 1)
    ]
    pool = {
        "engine": "openai",
        "replicas": replicas,
        "health": FAST,
        "adapters": [{"name": name, "path": f"/{name}"} for name in NAMES],
        "adapter_slots": 2,
        **backend,
    }
    data: dict[str, Any] = {"models": {"m": {"backend": "pool"}}, "backends": {"pool": pool}}
    return Settings(**data)


class Worker:
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def upstreams(self) -> list[Upstream]:
        return list(self.runtime.fleet.upstreams())

    @property
    def replica(self) -> Replica:
        return self.upstreams[0].replica

    async def use(self, name: str, within_s: float = LONG_S) -> None:
        """As a request for the adapter does; it is in use from here on."""
        use = self.replica.adapter_use
        use[name] = use.get(name, 0) + 1
        self.replica.shelf.used[name] = self.runtime.loop.time()
        await self.runtime.adapters.ensure(self.upstreams[0], name, within_s)

    def leave(self, name: str) -> None:
        use = self.replica.adapter_use
        use[name] -= 1
        if not use[name]:
            del use[name]

    async def visit(self, name: str) -> None:
        await self.use(name)
        assert name in (self.replica.adapters or ())
        self.leave(name)


@asynccontextmanager
async def worker(
    engine: Engine, chosen: Settings | None = None, *, store: Store | None = None, watch: bool = False
) -> AsyncIterator[Worker]:
    chosen = chosen or settings()
    runtime = Runtime(chosen, None, Metrics(), Ledger(None), admission=Admission(chosen, store=store or MemoryStore()))
    for upstream in runtime.fleet.upstreams():
        upstream.dialect = engine
        upstream.loadable = upstream.replica.loadable = frozenset(NAMES)
        upstream.replica.speed.adapter_ms = 1.0  # nothing has to stay for longer than 10 ms
        upstream.holds(tuple(engine.held or ()))
    watcher = Watcher(runtime, Random(7)) if watch else None
    if watcher is not None:
        watcher.start()
    try:
        yield Worker(runtime)
    finally:
        if watcher is not None:
            await watcher.aclose()
        await runtime.aclose()


async def test_an_adapter_is_loaded_once_and_the_time_it_takes_is_learned() -> None:
    engine = Engine(delay_s=0.02)
    async with worker(engine) as one:
        await one.visit("a")
        await one.visit("a")
        assert engine.orders == ["load a"]
        assert one.replica.speed.adapter_ms >= 20.0
        assert one.replica.loading == frozenset()
        assert one.runtime.adapters.loads == {("pool", "loaded"): 1}


async def test_all_who_want_the_same_adapter_wait_for_one_load() -> None:
    engine = Engine(delay_s=0.05)
    async with worker(engine) as one:
        await asyncio.gather(*(one.use("a") for _ in range(20)))
        assert engine.orders == ["load a"]


async def test_the_longest_unused_makes_room_and_slots_are_never_exceeded() -> None:
    engine = Engine()
    async with worker(engine) as one:
        for name in ("a", "b", "a", "c"):
            await one.visit(name)
            await asyncio.sleep(0.03)  # nobody has just been loaded any more
        assert engine.orders == ["load a", "load b", "unload b", "load c"]
        assert engine.most_held == 2
        assert one.runtime.adapters.evictions == {"pool": 1}


async def test_one_load_at_a_time_at_each_engine() -> None:
    engine = Engine(slots=4, delay_s=0.02)
    async with worker(engine, settings(adapter_slots=4)) as one:
        await asyncio.gather(*(one.use(name) for name in NAMES))
        assert sorted(engine.orders) == [f"load {name}" for name in NAMES]
        assert engine.overlaps == 0


async def test_what_is_in_use_stays_until_it_is_not() -> None:
    engine = Engine("a", "b")
    async with worker(engine) as one:
        await one.use("a")
        await one.use("b")
        waiting = asyncio.create_task(one.use("c"))
        await until(lambda: len(one.replica.adapters or ()) == 1)  # one gets no new requests
        assert engine.orders == []
        (leaving,) = {"a", "b"} - (one.replica.adapters or frozenset())
        one.leave(leaving)
        await asyncio.wait_for(waiting, LONG_S)
        assert engine.orders == [f"unload {leaving}", "load c"]


async def test_another_that_becomes_free_first_goes_instead_of_the_one_that_was_to() -> None:
    engine = Engine("a", "b")
    async with worker(engine) as one:
        await one.use("a")
        await one.use("b")
        waiting = asyncio.create_task(one.use("c"))
        await until(lambda: len(one.replica.adapters or ()) == 1)
        (staying,) = one.replica.adapters or frozenset()
        one.leave(staying)
        await asyncio.wait_for(waiting, LONG_S)
        assert engine.orders == [f"unload {staying}", "load c"]
        assert one.replica.adapters == frozenset({"a", "b", "c"}) - {staying}


async def test_when_nobody_waits_any_more_nothing_is_unloaded_and_all_is_as_before() -> None:
    engine = Engine("a", "b")
    async with worker(engine) as one:
        await one.use("a")
        await one.use("b")
        waiting = asyncio.create_task(one.use("c"))
        await until(lambda: len(one.replica.adapters or ()) == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: one.replica.adapters == frozenset({"a", "b"}))
        assert engine.orders == []
        await until(lambda: one.replica.loading == frozenset())


async def test_what_the_engine_runs_for_others_is_not_dropped() -> None:
    engine = Engine("a", "b")
    engine.running = ("a",)
    async with worker(engine) as one:
        one.replica.shelf.used = {"a": 1.0, "b": 2.0}
        await one.visit("c")
        assert engine.orders == ["unload b", "load c"]


async def test_waiting_ends_with_the_requests_time_and_the_load_goes_on() -> None:
    engine = Engine(delay_s=0.5)
    async with worker(engine) as one:
        with pytest.raises(UpstreamTimeout):
            await one.use("a", within_s=0.05)
        await until(lambda: "a" in (one.replica.adapters or ()))


async def test_an_engine_that_refuses_is_not_asked_again_at_once() -> None:
    engine = Engine()
    engine.refusing = AdapterRefused("/secret/place is empty")
    async with worker(engine) as one:
        with pytest.raises(AdapterAway) as error:
            await one.use("a")
        assert "secret" not in error.value.message
        assert one.replica.shelf.refused_until.keys() == {"a"}
        assert one.runtime.adapters.loads == {("pool", "failed"): 1}
        engine.refusing = SideChannelError(Trouble.TIMEOUT, "it did not answer")
        with pytest.raises(SideChannelError):
            await one.use("b")
        engine.refusing = None
        await one.visit("b")


async def test_an_engine_that_cannot_be_told_is_left_alone_until_it_begins_anew() -> None:
    engine = Engine()
    engine.refusing = NotOffered("start it with --enable-lora")
    async with worker(engine, settings(adapters_load="on_demand"), watch=True) as one:
        await until(lambda: one.replica.epoch == "one")
        with pytest.raises(AdapterAway):
            await one.use("a")
        assert one.replica.loadable == frozenset()
        assert "adapters" in one.upstreams[0].signals.lacking
        engine.readiness = Trouble.REFUSED
        await until(lambda: one.replica.cooldown.failures)
        engine.readiness, engine.told = Readiness.READY, EngineInfo(epoch="two")
        await until(lambda: one.replica.epoch == "two", LONG_S)
        assert one.replica.loadable == frozenset(NAMES)


async def test_an_adapter_that_is_no_longer_configured_is_not_loaded() -> None:
    async with worker(Engine()) as one:
        with pytest.raises(AdapterAway):
            await one.use("unheard-of")


async def test_all_ranks_of_an_engine_have_what_one_was_told_to_load() -> None:
    engine = Engine()
    async with worker(engine, settings(ranks=2)) as one:
        await one.visit("a")
        assert [each.replica.adapters for each in one.upstreams] == [frozenset({"a"})] * 2
        one.upstreams[1].replica.adapter_use["a"] = 1
        await one.visit("b")
        await asyncio.sleep(0.03)
        await one.visit("c")
        assert engine.orders == ["load a", "load b", "unload b", "load c"]


async def test_two_workers_do_not_change_one_engine_at_once() -> None:
    store, engine = Shared(), Engine(delay_s=0.05)
    async with worker(engine, store=store, watch=True) as one, worker(engine, store=store, watch=True) as other:
        await asyncio.gather(one.visit("a"), other.visit("b"))
        await asyncio.gather(one.visit("c"), other.visit("d"))
        assert engine.overlaps == 0
        assert engine.most_held == 2
        await until(lambda: one.replica.adapters == other.replica.adapters)


async def test_what_another_worker_is_loading_is_waited_for_and_known() -> None:
    store, engine = Shared(), Engine(delay_s=0.4)
    async with worker(engine, store=store, watch=True) as one, worker(engine, store=store, watch=True) as other:
        first = asyncio.create_task(one.visit("a"))
        await until(lambda: other.replica.loading == frozenset({"a"}))
        await other.visit("a")
        await first
        assert engine.orders == ["load a"]
        await until(lambda: other.replica.loading == frozenset())


async def test_without_the_store_adapters_are_loaded_all_the_same() -> None:
    store, engine = MemoryStore(), Engine()
    async with worker(engine, store=store) as one:
        await store.aclose()
        await one.visit("a")


async def test_the_gateways_end_ends_those_who_wait() -> None:
    engine = Engine("a", "b")
    async with worker(engine) as one:
        await one.use("a")
        await one.use("b")
        waiting = asyncio.create_task(one.use("c"))
        await until(lambda: one.replica.loading)
        await one.runtime.adapters.aclose()
        with pytest.raises(AdapterAway):
            await asyncio.wait_for(waiting, LONG_S)


@pytest.mark.parametrize(
    ("mode", "slots", "expected"),
    [
        ("always", 2, {"a", "b", "c", "d"}),
        ("on_demand", 8, set()),
        ("auto", 2, set()),
        ("auto", 4, {"a", "b", "c", "d"}),
    ],
)
async def test_what_is_loaded_from_the_start_is_what_the_settings_say(
    mode: str, slots: int, expected: set[str]
) -> None:
    engine = Engine(slots=slots)
    async with worker(engine, settings(adapters_load=mode, adapter_slots=None), watch=True) as one:
        await until(lambda: one.replica.adapter_slots == slots)
        await until(lambda: one.replica.adapters is not None and one.replica.adapters == expected)
        assert {order.removeprefix("load ") for order in engine.orders} == expected
