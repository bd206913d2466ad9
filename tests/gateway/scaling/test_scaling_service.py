"""The loop that decides: when it comes round, and what it keeps and gives back when settings or the store change."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from gateway.admin.desk import Desk
from gateway.config import Settings
from gateway.notices import HOLD, ORDER
from gateway.scaling.agents import PoolReport, Report
from gateway.scaling.service import ScalingService
from gateway.scaling.standing import FILE, Hold, Kept, KeptPool, Leaving, Standing, write_kept
from tests.support.scaled_worker import ScaledWorker
from tests.support.serving import settings_for

SLOW = {"provider": "command", "command": {"words": [sys.executable, "-c", "import time; time.sleep(60)"]}}


class Worker(ScaledWorker):
    """The one worker, and the store behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.draining: set[str] = set()
        self.claims: list[tuple[str, float]] = []

    async def retract(self, key: str) -> None:
        await super().retract(key)
        if key.startswith("drain/"):
            self.draining.discard(key.rpartition("/")[2])

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        self.claims.append((lease, time.monotonic()))
        return True

    async def drain(self, pool: str, replica: str, draining: bool) -> None:
        self.draining.add(replica)


def scaled(**scaling: Any) -> Settings:
    return settings_for(["http://127.0.0.1:9"], backend={"scaling": {"max": 4, **scaling}} if scaling else {})


class Gateway:
    def __init__(self, settings: Settings, worker: Worker, folder: Path | None = None, period_s: float = 5.0) -> None:
        self.desk = SimpleNamespace(
            settings=settings, sources=[worker], state_dir=folder, members=SimpleNamespace(of=lambda pool: ())
        )
        self.service = ScalingService(cast(Desk, self.desk), period_s=period_s)


async def test_a_provider_that_takes_its_time_does_not_cost_the_gateway_its_leases() -> None:
    worker = Worker()
    gateway = Gateway(scaled(min=3, **SLOW), worker, period_s=2.0)
    await gateway.service.start()
    async with asyncio.timeout(20.0):
        while len(worker.claims) < 2:  # noqa: ASYNC110 - the loop goes by the clock
            await asyncio.sleep(0.05)
    await gateway.service.aclose()
    times = [at for _, at in worker.claims]
    assert times[1] - times[0] < 3.5, "one that waits for the provider takes no longer than any other"


async def test_those_that_were_to_go_get_work_again_when_nobody_is_to_scale_the_pool_any_more() -> None:
    worker = Worker()
    gateway = Gateway(scaled(min=1, provider="webhook", webhook={"url": "http://127.0.0.1:1/"}), worker)
    await gateway.service.round()
    await gateway.service.hold("pool", 1, 600.0, "ann")
    await gateway.service.round()
    assert worker.draining == {"a"}
    assert [*msgspec.json.decode(worker.facts[f"{ORDER}/pool"], type=Standing).leaving] == ["a"]
    gateway.desk.settings = scaled()
    await gateway.service.round()
    assert not gateway.service.helms
    assert not worker.draining
    assert f"{ORDER}/pool" not in worker.facts
    await gateway.service.aclose()


async def test_a_held_number_that_was_taken_back_elsewhere_does_not_come_back_with_a_gateway(tmp_path: Path) -> None:
    hold = Hold(4, time.time() + 600.0, "ann")
    kept = Kept({"pool": KeptPool(Standing(wanted=4, at_unix_s=1.0), hold)})
    for store_remembers in (True, False):
        write_kept(tmp_path / FILE, msgspec.json.encode(kept))
        worker = Worker()
        if store_remembers:
            worker.facts[f"{ORDER}/pool"] = msgspec.json.encode(Standing(by="another", wanted=2, at_unix_s=2.0))
        gateway = Gateway(scaled(min=1), worker, tmp_path)
        await gateway.service.round()
        assert (f"{HOLD}/pool" in worker.facts) == (not store_remembers)
        await gateway.service.aclose()


async def test_a_pool_that_was_at_zero_stays_there_over_a_restart_until_something_is_decided(tmp_path: Path) -> None:
    launch = {"launch": {"model": "/models/m.gguf", "count": 2}, "scaling": {"max": 4, "min": 0, "provider": "local"}}
    settings = settings_for([], engine="llamacpp", backend=launch)
    for decided, count in ((False, 2), (True, 0)):
        kept = Kept({"pool": KeptPool(Standing(wanted=0, at_unix_s=float(decided)))})
        write_kept(tmp_path / FILE, msgspec.json.encode(kept))
        worker = Worker()
        worker.facts.clear()
        gateway = Gateway(settings, worker, tmp_path)
        await gateway.service.round()
        orders = await gateway.service.reported("box", Report({"pool": PoolReport(max=4)}))
        assert orders.pools["pool"].count == count
        await gateway.service.aclose()


async def test_agents_roll_one_after_the_other_also_over_a_restart_of_the_gateway() -> None:
    """Each has one server: at the same time they would take the whole pool away."""
    launch = {"launch": {"model": "/models/m.gguf", "count": 2}}
    worker = Worker()

    async def told(agent: str, roll: int) -> int:
        report = Report({"pool": PoolReport(launched=1, ready=1, max=1, roll=roll)})
        return (await service.reported(agent, report)).pools["pool"].roll

    service = Gateway(settings_for([], engine="llamacpp", backend=launch), worker).service
    assert [await told(agent, 0) for agent in ("a", "b", "c")] == [0, 0, 0]
    assert await service.roll("pool") == 1
    assert [await told(agent, 0) for agent in ("c", "b", "a")] == [0, 0, 1]
    assert [await told("a", 1), await told("b", 0), await told("c", 0)] == [1, 1, 0]
    worker.facts.clear()  # with its store
    service = Gateway(settings_for([], engine="llamacpp", backend=launch), worker).service
    await told("a", 1)
    assert [await told("b", 0), await told("c", 0), await told("b", 1), await told("c", 0)] == [1, 0, 1, 1]


async def test_agents_are_known_and_forgotten_where_nobody_scales() -> None:
    launch = {"launch": {"model": "/models/m.gguf"}}
    worker = Worker()
    gateway = Gateway(settings_for([], engine="llamacpp", backend=launch), worker)
    worker.facts["agent/elsewhere"] = msgspec.json.encode(Report({"pool": PoolReport(launched=1)}))
    await gateway.service.round()
    assert [*gateway.service.agents] == ["elsewhere"], "it speaks to another gateway on the same store"
    await gateway.service.reported("here", Report({"pool": PoolReport(launched=1)}))
    assert sorted(gateway.service.agents) == ["elsewhere", "here"]
    del worker.facts["agent/elsewhere"]  # as when its time is over
    await gateway.service.round()
    assert [*gateway.service.agents] == ["here"]
    gateway.desk.settings = scaled()
    worker.facts.clear()
    gateway.service._heard.clear()
    await gateway.service.round()
    assert not gateway.service.agents, "the last pool that was launched is gone"


async def test_what_another_gateway_had_drained_is_carried_on_with() -> None:
    worker = Worker()
    leaving = {"b": Leaving("b", time.time())}
    worker.facts[f"{ORDER}/pool"] = msgspec.json.encode(Standing("gone", time.time(), 1, leaving=leaving))
    worker.facts[f"{HOLD}/pool"] = msgspec.json.encode(Hold(1, time.time() + 600.0, "ann"))
    gateway = Gateway(scaled(min=1, provider="webhook", webhook={"url": "http://127.0.0.1:1/"}), worker)
    await gateway.service.round()
    assert [*msgspec.json.decode(worker.facts[f"{ORDER}/pool"], type=Standing).leaving] == ["b"]
    assert worker.draining == {"b"}, "the last one ended between its word and its deed"
    await gateway.service.aclose()
