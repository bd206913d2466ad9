"""What a scaler has learned, at a gateway: in its file, in the store, and when neither can be believed."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from gateway.admin.desk import Desk
from gateway.config import Settings
from gateway.notices import AGENT, DEMAND, LEARNED, ORDER
from gateway.scaling.combining import PoolView, by_pool
from gateway.scaling.memory import EVERY_S, LAST_CHANGES, Memory, Taken, kind_of, merged
from gateway.scaling.notes import PoolDemand
from gateway.scaling.service import ScalingService
from gateway.scaling.standing import FILE, Change, Hold, Kept, KeptPool, Standing, read_kept, write_kept
from routing.scaling import Demand, Rules, Scaler
from tests.support.learning import SERVES, taken, taught
from tests.support.scaled_worker import ScaledWorker
from tests.support.serving import settings_for

BACKEND = {"scaling": {"max": 4}}


class Worker(ScaledWorker):
    """The one worker, and the store behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    async def announce(self, key: str, value: bytes, ttl_s: float | None) -> None:
        await super().announce(key, value, ttl_s)
        self.told.append(key)

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        for _ in range(100):  # it takes a while, as a store does
            await asyncio.sleep(0)
        return True


def service_on(worker: Worker, folder: Path | None = None, settings: Settings | None = None) -> ScalingService:
    settings = settings_for(["http://127.0.0.1:9"], backend=BACKEND) if settings is None else settings
    members = SimpleNamespace(of=lambda pool: ())
    desk = SimpleNamespace(settings=settings, sources=[worker], state_dir=folder, members=members)
    return ScalingService(cast(Desk, desk))


def reason(service: ScalingService) -> str:
    return service.helms["pool"].standing.reasons[0].text


KIND = kind_of(settings_for(["http://127.0.0.1:9"], backend=BACKEND), "pool")


async def test_a_gateway_goes_on_from_its_file(tmp_path: Path) -> None:
    kept = KeptPool(learned=msgspec.Raw(taken(taught(KIND))))
    write_kept(tmp_path / FILE, msgspec.json.encode(Kept({"pool": kept})))
    service = service_on(Worker(), tmp_path)
    await service.round()
    assert SERVES in reason(service)
    await service.aclose()
    again = service_on(Worker(), tmp_path)
    await again.round()
    assert SERVES in reason(again)
    await again.aclose()


async def test_a_gateway_that_takes_over_goes_on_from_what_the_other_one_had_learned() -> None:
    worker = Worker()
    changes = [Change(float(number), number % 2, 1, "why") for number in range(LAST_CHANGES)]
    worker.facts[f"{LEARNED}/pool"] = taken(taught(KIND), by="gone", starts=[("a", 12.5)], history=changes)
    service = service_on(worker)
    await service.round()
    helm = service.helms["pool"]
    assert SERVES in reason(service)
    assert helm.starts == [("a", 12.5)]
    assert helm.history[: LAST_CHANGES - 1] == changes[:-1]
    await service.aclose()


async def test_what_was_learned_from_less_is_not_taken_over(tmp_path: Path) -> None:
    kept = KeptPool(learned=msgspec.Raw(taken(taught(KIND))))
    write_kept(tmp_path / FILE, msgspec.json.encode(Kept({"pool": kept})))
    worker = Worker()
    less = taught(KIND, seconds=600)
    assert less.capacity.line is not None
    slow = replace(less.capacity.line, w=2.0 * less.capacity.line.w, bw=2.0 * less.capacity.line.bw)
    worker.facts[f"{LEARNED}/pool"] = taken(replace(less, capacity=replace(less.capacity, line=slow)), by="newer")
    service = service_on(worker, tmp_path)
    await service.round()
    assert SERVES in reason(service)
    await service.aclose()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data.replace(b'"version":1', b'"version":2'), "version 2"),
        (lambda data: data.replace(KIND.encode(), b"0" * 16), "another model"),
        (lambda data: data.replace(b'"weight":', b'"weight":-'), "capacity.line.weight is -"),
        (lambda data: data.replace(b'"weight":', b'"weight":1e300, "x":'), r"capacity.line.weight is 1e\+300"),
        (lambda data: data.replace(b'"weight":', b'"weight":1e999, "x":'), "out of range"),
        (lambda data: data.replace(b'"weight":', b'"weight":null, "x":'), "Expected `float`"),
        (lambda data: data.replace(b'"by":""', b'"by":7'), "Expected `str`"),
        (lambda data: data.replace(b'"at_unix_s":', b'"at_unix_s":1e18, "x":'), "age"),
        (lambda data: b"[" * 900 + b"]" * 900, "Expected `object"),
        (lambda data: b'"' + b"x" * 60_000 + b'"', "more than 49152 bytes"),
    ],
)
async def test_what_cannot_be_is_refused_once_in_the_log_and_costs_nothing_else(
    spoil: Any, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = spoil(taken(taught(KIND)))
    standing = Standing(wanted=3, current=3, at_unix_s=5.0)
    kept = Kept({"pool": KeptPool(standing, starts=[("a", 7.0)], learned=msgspec.Raw(bad))})
    write_kept(tmp_path / FILE, msgspec.json.encode(kept))
    worker = Worker()
    worker.facts[f"{LEARNED}/pool"] = bad
    service = service_on(worker, tmp_path)
    with caplog.at_level(logging.WARNING):
        await service.round()
        worker.facts[f"{LEARNED}/pool"] = bad + b" "
        await service.round()
    assert SERVES not in reason(service)
    assert service.helms["pool"].starts == [("a", 7.0)]
    assert [change.wanted for change in service.helms["pool"].history] == [2]
    said = [record.getMessage() for record in caplog.records]
    assert all("pool pool: what" in line for line in said)
    assert caplog.messages, "it is said"
    assert len(said) <= 2, "once of the file, once of the store"
    assert re.search(why, said[0])
    await service.aclose()


async def test_of_what_is_refused_nothing_is_taken_over_and_of_a_history_nothing_that_is_to_come() -> None:
    worker = Worker()
    changes = [Change(time.time() - 60.0, 3, 1, "past"), Change(1e18, 4, 3, "to come")]
    good = taken(taught(KIND), by="other", starts=[("a", 900.0)], history=changes)
    worker.facts[f"{LEARNED}/pool"] = good.replace(b'"version":1', b'"version":2')
    service = service_on(worker)
    await service.round()
    helm = service.helms["pool"]
    assert not helm.starts
    assert "past" not in [each.why for each in helm.history]
    worker.facts[f"{LEARNED}/pool"] = good
    await service.round()
    assert helm.starts == [("a", 900.0)]
    assert next(each.why for each in helm.history) == "past"
    assert "to come" not in [each.why for each in helm.history]
    await service.aclose()


def test_gateways_that_see_the_same_do_not_take_it_over_from_each_other_again_and_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that follows has seen a few seconds less, at all times."""
    first, second = Scaler(Rules(max=4), "kind"), Scaler(Rules(max=4), "kind")
    memory = Memory("pool", second, b"null")
    caplog.set_level(logging.INFO, "tidegate")
    for at in range(0, 7200, 5):
        for scaler, begins in ((first, 0), (second, 600)):
            if at >= begins:
                seen = Demand(at_s=float(at), arrivals_per_s=2.0, served_per_s=2.0, in_flight=90, replicas_ready=1)
                scaler.decide(replace(seen, capacity_requests=100.0), float(at))
        if at >= 600:
            memory.begin(float(at))
            if at % 60 == 0:
                memory.hear(taken(first.learned(float(at)), by="first", ago_s=2.5), "second", float(at))
    assert [record.getMessage().startswith("pool pool: scaling goes on") for record in caplog.records] == [True]


def test_it_is_taken_once_a_minute_and_told_as_often() -> None:
    scaler = Scaler(Rules(max=4), "kind")
    memory = Memory("pool", scaler, b"null")
    told = []
    memory.begin(0.0)
    for second in range(0, 600, 5):
        memory.take(float(second))
        if memory.to_tell("me", [], []) is not None:
            told.append(second)
    assert told == [60 * number for number in range(1, 10)]
    assert EVERY_S == 60.0
    memory.take(596.0, at_once=True)
    assert memory.to_tell("me", [("x" * 900, 1.0)] * 99, [Change(1.0, 1, 1, "y" * 10_000)] * 99) is not None


async def test_in_its_first_minute_a_gateway_neither_loses_what_its_file_has_nor_tells_less_than_was_told() -> None:
    worker = Worker()
    before = worker.facts[f"{LEARNED}/pool"] = b'{"of":"another version"}'
    service = service_on(worker)
    await service.round()
    assert worker.facts[f"{LEARNED}/pool"] == before
    helm = service.helms["pool"]
    helm.memory.take(time.monotonic() + 61.0)
    await service.round()
    assert msgspec.json.decode(worker.facts[f"{LEARNED}/pool"], type=Taken).by == service.holder
    assert worker.told.count(f"{LEARNED}/pool") == 1
    await service.aclose()


async def test_what_was_learned_is_forgotten_when_other_engines_are_configured(tmp_path: Path) -> None:
    kept = KeptPool(learned=msgspec.Raw(taken(taught(KIND))))
    write_kept(tmp_path / FILE, msgspec.json.encode(Kept({"pool": kept})))
    service = service_on(Worker(), tmp_path)
    await service.round()
    assert SERVES in reason(service)
    cast(Any, service)._desk.settings = settings_for(["http://127.0.0.1:9"], engine="vllm", backend=BACKEND)
    await service.round()
    assert SERVES not in reason(service)
    await service.aclose()


def test_the_kind_of_replicas_is_their_models_engine_and_launch_and_not_where_or_how_many() -> None:
    def kind(engine: str = "llamacpp", **launch: Any) -> str:
        told = {"launch": {"model": "/models/m.gguf", **launch}, "scaling": {"max": 4, "provider": "local"}}
        return kind_of(settings_for([], engine=engine, backend=told), "pool")

    same = {kind(), kind(count=3), kind(port=31_000), kind(stop_timeout_s=5.0), kind(host="127.0.0.2")}
    others = {kind("sglang"), kind(model="/models/n.gguf"), kind(flags=["--parallel", "8"]), kind(max_running=9)}
    others |= {kind(env={"GGML_CUDA": "1"}), kind(context_tokens=4096)}
    assert len(same) == 1
    assert len(others) == 6
    assert not same & others


def test_two_histories_become_one() -> None:
    def changes(*pairs: tuple[float, int]) -> list[Change]:
        return [Change(at, wanted, 1, "") for at, wanted in pairs]

    mine = changes((1.0, 1), (21.5, 3), (50.0, 4))
    others = changes((1.0, 1), (20.0, 3), (30.0, 2), (40.0, 3))
    assert [(each.unix_s, each.wanted) for each in merged(mine, others)] == [
        (1.0, 1),
        (20.0, 3),
        (30.0, 2),
        (40.0, 3),
        (50.0, 4),
    ]


# -- what others tell


@pytest.mark.parametrize(
    "bad",
    [
        b'{"life":"\xff\xfe","age_s":1.0}',
        b"[" * 3000,
        b'{"life":"x","age_s":-1.0}',
        b'{"life":"x","age_s":1.0,"arrivals":-5}',
        b'{"life":"x","age_s":1.0,"arrivals":%d}' % 10**18,
        b'{"life":"x","age_s":1.0,"arrival_tokens":1e300}',
        b'{"life":"x","age_s":1.0,"waits":{"-3":1}}',
        b'{"life":"x","age_s":1.0,"ttfts":{"9999":1}}',
        b'{"life":"x","age_s":1.0,"replicas":[["a","a",-4]]}',
    ],
)
async def test_a_notice_that_cannot_be_is_nobodys_and_stops_nothing(bad: bytes) -> None:
    worker = Worker()
    assert [*by_pool(worker.facts)["pool"]] == ["w0"]
    worker.facts[f"{DEMAND}/pool/w1"] = worker.facts[f"{AGENT}/x"] = worker.facts[f"{ORDER}/pool"] = bad
    assert [*by_pool(worker.facts)["pool"]] == ["w0"]
    service = service_on(worker)
    await service.round()
    assert service.helms["pool"].standing.wanted == 2
    await service.aclose()


async def test_a_pool_whose_round_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = {"engine": "openai", "replicas": [{"url": "http://127.0.0.1:9"}], "scaling": {"max": 4}}
    settings = settings_for(["http://127.0.0.1:9"], backends={"pool": pool, "other": pool})
    worker = Worker()
    worker.facts[f"{DEMAND}/other/w0"] = worker.facts[f"{DEMAND}/pool/w0"]
    service = service_on(worker, settings=settings)
    await service.round()

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(service.helms["pool"], "look", fails)
    before = service.helms["other"].standing.at_unix_s
    with pytest.raises(ZeroDivisionError):
        await service.round()
    assert service.helms["other"].standing.at_unix_s > before
    await service.aclose()


def test_requests_at_a_worker_that_has_just_begun_are_as_long_as_those_at_the_others() -> None:
    view = PoolView()
    for age_s in (10.0, 20.0):
        notes = {
            "old": PoolDemand("a", 100.0 + age_s, arrivals=int(age_s), arrival_tokens=500.0 * age_s),
            "new": PoolDemand("b", age_s, arrivals=int(age_s)),
        }
        view.read(notes, age_s)
    demand = view.demand(0, 2, 20.0)
    assert demand is not None
    assert (demand.arrivals_per_s, demand.arrival_tokens_per_s) == (2.0, 1000.0)


async def test_a_held_number_without_an_end_in_the_file_is_not_told_and_stops_nothing(tmp_path: Path) -> None:
    kept = Kept({"pool": KeptPool(Standing(wanted=4, at_unix_s=1.0), Hold(4, 1e18, "ann"))})
    write_kept(tmp_path / FILE, msgspec.json.encode(kept))
    service = service_on(Worker(), tmp_path)
    await service.round()
    assert service.helms["pool"].hold is None
    await service.aclose()


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"pools":{"\xff":{}}}', b'{"pools":{"pool":{"roll":1e400}}}'])
def test_a_file_that_cannot_be_read_is_put_aside(data: bytes, tmp_path: Path) -> None:
    write_kept(tmp_path / FILE, data)
    assert read_kept(tmp_path / FILE) == Kept()
    assert (tmp_path / f"{FILE}.broken").read_bytes() == data


def test_start_times_that_cannot_be_do_not_make_a_lead_time() -> None:
    scaler = Scaler(Rules(max=4))
    for seconds in (-1.0, 1e308, float("inf"), float("nan")):
        scaler.learned_start(seconds)
    assert not scaler.learned(0.0).starts
