"""Overflow to rented replicas, end to end: own replicas that are predicted late or refuse, money, and coming home."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.admission.waits import ToldWaits
from gateway.order import CHAT as CHAT_PATH
from gateway.order import COMPLETIONS, EMBEDDINGS
from gateway.record import Outcome
from gateway.state import LocalSource
from gateway.store.places import Band
from gateway.templates import ExactPrompt, ExactPrompts
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from routing.types import InferenceRequest, Replica, View
from tests.gateway.admission.keyed import KEY, OTHER, bearer, keyed, static
from tests.support.client import until
from tests.support.http import ask, streaming
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
STREAM = {**CHAT, "stream": True}
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
MILLION = 1_000_000


@dataclass
class Two:
    """A gateway with an own engine and a rented one."""

    gateway: Serving
    own: FakeEngine
    rented: FakeEngine

    def busy(self, tokens: int = 1_000_000_000) -> None:
        """Have the own replica so much to do that it is late, however fast it has shown itself."""
        (replica,) = self.gateway.runtime.fleet.pools["pool"].replicas
        replica.work.queue(tokens, time.monotonic())

    @property
    def asked(self) -> tuple[int, int]:
        return len(self.own.requests), len(self.rented.requests)


def spill(**fields: Any) -> dict[str, Any]:
    return {
        "backend": "rented",
        "upstream_model": "far/m",
        "price": {"input": 1.0, "output": 2.0},
        "usd_per_hour": 5.0,
        "usd_per_day": 5.0,
        **fields,
    }


def sections(own: FakeEngine, rented: FakeEngine, fields: dict[str, Any]) -> dict[str, Any]:
    backend = {
        "engine": "openai",
        "replicas": [{"url": own.url, **fields.pop("replica", {})}],
        **fields.pop("pool", {}),
    }
    rented_at = {"url": rented.url, "region": "us-east"}
    host = {"engine": "openai", "hosted": True, "replicas": [rented_at], **fields.pop("host", {})}
    return {
        "models": {"m": {"backend": "pool", "price": {"input": 0.0}, "spill": spill(**fields)}},
        "backends": {"pool": backend, "rented": host},
    }


@asynccontextmanager
async def two(edge: str = "protocol", **fields: Any) -> AsyncIterator[Two]:
    async with (
        FakeEngine(chunks=2) as own,
        FakeEngine(chunks=2) as rented,
        serving(settings_for([], edge=edge, **sections(own, rented, fields)), own_policies=True) as gateway,
    ):
        yield Two(gateway, own, rented)


async def metric(gateway: Serving, name: str, **labels: str) -> float:
    families = await LocalSource(gateway.runtime).metrics()
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@EDGES
@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_a_late_request_goes_to_the_rented_replica_and_says_so(edge: str, body: dict[str, Any]) -> None:
    async with two(edge) as both:
        gateway = both.gateway
        reply = await ask(gateway, body)
        assert (both.asked, reply.headers["x-tidegate-replica"]) == ((1, 0), "pool-0")
        both.busy()
        reply = await ask(gateway, body)
        assert (reply.status, both.asked) == (200, (1, 1))
        assert reply.headers["x-tidegate-route-reason"] == "spill"
        assert reply.headers["x-tidegate-replica"] == "rented-0"
        assert reply.headers["x-tidegate-region"] == "us-east"
        assert json.loads(both.rented.requests[0].body)["model"] == "far/m"
        home, away = await gateway.settled(2)
        assert (home.spill, away.spill, away.pool) == ("", "predicted_wait", "rented")
        # By the host's price, and at what its own usage says: 256 tokens and 2.
        assert home.cost_usd == 0.0
        assert away.cost_usd == pytest.approx((256 * 1.0 + 2 * 2.0) / MILLION)
        assert await metric(gateway, "tidegate_spill_total", model="m", reason="predicted_wait") == 1
        assert await metric(gateway, "tidegate_spill_usd_total", model="m") == pytest.approx(away.cost_usd)
        assert await metric(gateway, "tidegate_spill_window_usd", window="day") == pytest.approx(away.cost_usd)


class Foremost:
    """A policy of the operator's own, which has a name of its own."""

    name = "foremost"

    def __init__(self, rng: Random) -> None: ...

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        return candidates[0]


async def test_models_with_a_policy_of_the_operators_own_spill_too() -> None:
    async with FakeEngine(chunks=2) as own, FakeEngine(chunks=2) as rented:
        given = sections(own, rented, {})
        given["models"]["m"]["policy"] = f"{__name__}:Foremost"
        async with serving(settings_for([], **given), own_policies=True) as gateway:
            gateway.runtime.fleet.pools["pool"].replicas[0].draining = True
            reply = await ask(gateway, CHAT)
            assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "rented-0")


async def test_a_long_prompt_that_a_tokenizer_reads_is_read_once_and_not_on_the_event_loop() -> None:
    threads: list[int] = []

    def encode(text: str, special: bool) -> list[int]:
        threads.append(threading.get_ident())
        return list(text.encode())

    def count(text: str) -> int:
        threads.append(threading.get_ident())
        return len(text)

    async with two() as both:
        runtime = both.gateway.runtime
        runtime.fleet.models["m"].reader.exact = ExactPrompts({"m": ExactPrompt(encode, None)})
        runtime.gate.estimator.use_tokenizers({"m": count})
        runtime.fleet.pools["pool"].replicas[0].draining = True
        reply = await ask(both.gateway, {"model": "m", "prompt": "long " * 4000}, COMPLETIONS)
        assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "rented-0")
        assert len(threads) == 2
        assert threading.get_ident() not in threads


async def test_own_replicas_that_cannot_serve_at_all_are_stood_in_for() -> None:
    async with two() as both:
        (replica,) = both.gateway.runtime.fleet.pools["pool"].replicas
        replica.draining = True
        reply = await ask(both.gateway, CHAT)
        assert (reply.status, both.asked) == (200, (0, 1))
        (record,) = await both.gateway.settled()
        assert record.spill == "own_unavailable"


async def test_the_ceiling_is_held_while_requests_are_under_way_and_after() -> None:
    """Reserved is the most that a request can cost, here 1000 tokens of output: 0.002 and something; 2 fit, never 3."""
    body = {**STREAM, "max_tokens": 1000}
    async with two(usd_per_hour=0.006, usd_per_day=0.006) as both:
        gateway = both.gateway
        both.busy()
        both.rented.script = Behaviour(chunks=2, ttft_s=30.0)
        waiting = [asyncio.create_task(ask(gateway, body)) for _ in range(2)]
        await both.rented.received(2)
        reply = await ask(gateway, body)
        assert reply.headers["x-tidegate-replica"] == "pool-0"
        assert await metric(gateway, "tidegate_spill_kept_total", reason="hour_ceiling") == 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await gateway.settled(3)
        # Nobody knows what those that broke off have cost.
        assert await metric(gateway, "tidegate_spill_window_usd", window="hour") > 0.0
        both.rented.script = Behaviour(chunks=2)
        sent = 0
        for _ in range(6):
            reply = await ask(gateway, body)
            sent += reply.headers["x-tidegate-replica"] == "rented-0"
        assert await metric(gateway, "tidegate_spill_window_usd", window="hour") <= 0.006


async def test_what_was_reserved_comes_back_when_the_answer_was_short() -> None:
    async with two(usd_per_hour=0.006, usd_per_day=0.006) as both:
        both.busy()
        for _ in range(8):
            reply = await ask(both.gateway, {**CHAT, "max_tokens": 1000})
            assert reply.headers["x-tidegate-replica"] == "rented-0"


@pytest.mark.parametrize(
    ("path", "body", "header"),
    [
        (EMBEDDINGS, {"model": "m", "input": "x"}, ""),
        (CHAT_PATH, {**CHAT, "service_tier": "flex"}, ""),
        (CHAT_PATH, CHAT, "x-tidegate-class: batch"),
        (CHAT_PATH, CHAT, "x-tidegate-region: eu-west"),
    ],
)
async def test_some_never_leave(path: str, body: dict[str, Any], header: str) -> None:
    """Embeddings, flexible requests, classes without a target, and what is locked to another region."""
    async with two(replica={"region": "eu-west"}) as both:
        both.busy()
        reply = await ask(both.gateway, body, path, *([header] if header else []))
        assert (reply.status, both.asked) == (200, (1, 0))


async def test_a_lock_on_the_hosts_region_may_leave() -> None:
    async with two(replica={"region": "us-east"}) as both:
        both.busy()
        await ask(both.gateway, CHAT, CHAT_PATH, "x-tidegate-region: us-east")
        assert both.asked == (0, 1)


async def test_an_adapter_never_leaves() -> None:
    async with two(pool={"adapters": [{"name": "a", "path": "/a"}]}) as both:
        both.busy()
        (replica,) = both.gateway.runtime.fleet.pools["pool"].replicas
        replica.adapters = frozenset({"a"})
        replica.draining = True
        reply = await ask(both.gateway, {**CHAT, "model": "m:a"})
        assert (reply.status, both.asked) == (503, (0, 0))


async def test_a_budget_that_only_the_host_is_beyond_keeps_the_request_at_home(tmp_path: Path) -> None:
    async with FakeEngine(chunks=2) as own, FakeEngine(chunks=2) as rented:
        poor = static(limits={"usd_per_day": 0.0001})
        async with serving(keyed(tmp_path, [], poor, **sections(own, rented, {})), own_policies=True) as gateway:
            await gateway.runtime.admission.start()
            both = Two(gateway, own, rented)
            both.busy()
            reply = await ask(gateway, CHAT, CHAT_PATH, bearer())
            assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, "pool-0")
            await gateway.settled()
            assert await metric(gateway, "tidegate_spill_window_usd") == 0.0
            assert not gateway.runtime.gate.visits


@pytest.mark.parametrize(
    ("failing", "may_be_billed"),
    [(Behaviour(status=status), False) for status in (400, 429, 500, 503)] + [(Behaviour(raw=""), True)],
)
async def test_a_failed_host_sends_the_request_home_and_costs_nothing(failing: Behaviour, may_be_billed: bool) -> None:
    """But when the connection breaks while the host is at work: nobody knows whether that is billed."""
    async with two() as both:
        both.busy()
        both.rented.script = failing
        reply = await ask(both.gateway, CHAT)
        assert (reply.status, both.asked) == (200, (1, 1))
        assert reply.headers["x-tidegate-replica"] == "pool-0"
        assert reply.headers["x-tidegate-route-reason"] != "spill"
        (record,) = await both.gateway.settled()
        assert (record.outcome, record.pool, record.cost_usd, record.spill) == (Outcome.COMPLETED, "pool", 0.0, "")
        assert (await metric(both.gateway, "tidegate_spill_window_usd") > 0.0) is may_be_billed


async def test_a_stream_whose_head_is_out_still_comes_home() -> None:
    """Its client has comments only; with content it would be too late."""
    async with FakeEngine(chunks=2) as own, FakeEngine(role_only_then_hang=True) as rented:
        settings = settings_for([], stream={"hold_s": 0.1, "heartbeat_s": 0.1}, **sections(own, rented, {}))
        async with serving(settings, own_policies=True) as gateway:
            Two(gateway, own, rented).busy()
            async with streaming(gateway, STREAM) as stream:
                await stream.until(b": ping")
                rented.script = Behaviour(status=500)
                rented.drop_connections()
                assert (await stream.rest()).endswith(b"data: [DONE]\n\n")
            assert len(own.requests) == 1
            (record,) = await gateway.settled()
            assert (record.outcome, record.spill, record.pool) == (Outcome.COMPLETED, "", "pool")


async def test_it_comes_home_once_only() -> None:
    async with two() as both:
        both.busy()
        both.own.script = both.rented.script = Behaviour(status=503)
        reply = await ask(both.gateway, CHAT)
        assert (reply.status, both.asked) == (503, (1, 1))
        assert reply.headers["x-tidegate-attempts"] == "2"


@EDGES
@pytest.mark.parametrize(
    ("queue", "status", "asked"),
    [({"max_waiting": 1}, 200, 1), ({"max_waiting_per_tenant": 1}, 429, 0)],
    ids=["full", "full of this tenant"],
)
async def test_what_the_queue_refuses_may_leave_unless_the_tenant_itself_fills_it(
    edge: str, queue: dict[str, int], status: int, asked: int
) -> None:
    """One runs, one waits, and there is room for no more."""
    async with two(edge, replica={"max_in_flight": 1}, pool={"queue": {**queue, "headroom": 0}}) as both:
        both.own.script = Behaviour(chunks=2, ttft_s=30.0)
        own = [asyncio.create_task(ask(both.gateway, STREAM)) for _ in range(2)]
        await both.own.received(1)
        async with asyncio.timeout(10.0):
            while not both.gateway.runtime.gate.waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        reply = await ask(both.gateway, STREAM)
        assert (reply.status, len(both.rented.requests)) == (status, asked)
        if asked:
            assert reply.headers["x-tidegate-replica"] == "rented-0"
            assert reply.headers["x-tidegate-route-reason"] == "spill"
            async with asyncio.timeout(10.0):
                while not both.gateway.records:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert both.gateway.records[-1].spill == "queue_refused"
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)


async def test_only_those_that_are_allowed_leave(tmp_path: Path) -> None:
    async with FakeEngine(chunks=2) as own, FakeEngine(chunks=2) as rented:
        settings = keyed(
            tmp_path,
            [],
            static(),
            static("home", OTHER, metadata={"spill": "never"}),
            static("other", OTHER + "-2", tenant="strict"),
            tenants={"strict": {}},
            **sections(own, rented, {"allow": {"tenants": ["default"]}}),
        )
        async with serving(settings, own_policies=True) as gateway:
            await gateway.runtime.admission.start()
            both = Two(gateway, own, rented)
            both.busy()
            for key, replica in ((KEY, "rented-0"), (OTHER, "pool-0"), (OTHER + "-2", "pool-0")):
                reply = await ask(gateway, CHAT, CHAT_PATH, bearer(key))
                assert (reply.status, reply.headers["x-tidegate-replica"]) == (200, replica)


async def test_several_gateways_each_have_their_part() -> None:
    async with two(usd_per_hour=0.006, usd_per_day=0.006) as both:
        both.busy()
        both.gateway.runtime.gate.home.gateways = 4
        reply = await ask(both.gateway, {**CHAT, "max_tokens": 1000})
        assert reply.headers["x-tidegate-replica"] == "pool-0"


async def test_a_reload_keeps_what_was_spent_and_goes_by_the_new_ceiling() -> None:
    async with two() as both:
        both.busy()
        await ask(both.gateway, CHAT)
        await both.gateway.settled(1)
        spent = await metric(both.gateway, "tidegate_spill_window_usd", window="day")
        assert spent > 0
        tight = settings_for([], **sections(both.own, both.rented, {"usd_per_hour": spent, "usd_per_day": spent}))
        both.gateway.runtime.reload(tight)
        await ask(both.gateway, CHAT)
        assert both.asked == (1, 1)
        assert await metric(both.gateway, "tidegate_spill_window_usd", window="day") == spent


async def test_what_was_spent_is_not_forgotten_while_a_reload_has_taken_the_spill_out() -> None:
    async with two() as both:
        runtime = both.gateway.runtime
        given = sections(both.own, both.rented, {})
        without: dict[str, Any] = {**given, "models": {"m": {"backend": "pool"}}}
        both.busy()
        both.rented.queue.append(Behaviour(chunks=2, hang_mid=1))
        async with streaming(both.gateway, STREAM) as reply:
            await reply.until(b"data:")
            reserved = await metric(both.gateway, "tidegate_spill_window_usd", window="day")
            runtime.reload(settings_for([], **without))
            assert await metric(both.gateway, "tidegate_spill_window_usd", window="day") == 0.0
        await both.gateway.settled()
        runtime.reload(settings_for([], **given))
        assert await metric(both.gateway, "tidegate_spill_window_usd", window="day") == reserved > 0.0


async def test_what_a_rented_replica_answers_after_a_reload_has_taken_it_out_counts_as_rented() -> None:
    async with two() as both:
        runtime = both.gateway.runtime
        without: dict[str, Any] = sections(both.own, both.rented, {})
        without["models"]["m"].pop("spill")
        without["backends"].pop("rented")
        both.busy()
        both.rented.queue.append(Behaviour(chunks=2, interval_s=0.5))
        async with streaming(both.gateway, STREAM) as reply:
            await reply.until(b"data:")
            runtime.reload(settings_for([], **without))
            await reply.until(b"[DONE]")
        await both.gateway.settled()
        assert await metric(both.gateway, "tidegate_tokens_total", kind="completion", source="rented") == 2
        assert await metric(both.gateway, "tidegate_tokens_total", kind="completion", source="own") == 0
        await until(lambda: not runtime.metrics.rented)


async def test_what_the_queue_foretells_counts_as_waiting() -> None:
    async with two(replica={"max_in_flight": 4}) as both:
        gate = both.gateway.runtime.gate
        gate.told.note("pool", Band.STANDARD, 60.0, time.monotonic())
        reply = await ask(both.gateway, CHAT)
        assert reply.headers["x-tidegate-replica"] == "rented-0"
        (record,) = await both.gateway.settled(1)
        assert record.spill == "predicted_wait"
        gate.told.note("pool", Band.STANDARD, 60.0, time.monotonic() - 120.0)  # the line is gone since
        async with asyncio.timeout(10.0):  # and a second after the rush so is the rush
            while (await ask(both.gateway, CHAT)).headers["x-tidegate-replica"] != "pool-0":
                pass


async def test_the_queue_notes_what_it_tells() -> None:
    told = ToldWaits()
    told.note("pool", Band.STANDARD, 5.0, 100.0)
    assert [told.expected_s("pool", Band.STANDARD, now) for now in (100.0, 103.0, 106.0)] == [5.0, 2.0, 0.0]
    assert told.expected_s("pool", Band.BATCH, 100.0) == told.expected_s("other", Band.STANDARD, 100.0) == 0.0
    slow: dict[str, Any] = {
        "replica": {"max_in_flight": 1},
        "pool": {"queue": {"headroom": 0}},
        "allow": {"classes": []},
    }
    async with two(**slow) as both:
        gate = both.gateway.runtime.gate
        both.own.script = Behaviour(chunks=2, ttft_s=0.2)
        asked = [asyncio.create_task(ask(both.gateway, STREAM)) for _ in range(5)]
        async with asyncio.timeout(20.0):  # until places become free at a known rate, nobody is told anything
            while not gate.told.expected_s("pool", Band.STANDARD, time.monotonic()):
                under_way = [each for each in asked if not each.done()]
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                asked.append(asyncio.create_task(ask(both.gateway, STREAM)))
        replies = await asyncio.gather(*asked)
        assert {reply.headers["x-tidegate-replica"] for reply in replies} == {"pool-0"}
        await ask(both.gateway, STREAM)
        assert gate.told.expected_s("pool", Band.STANDARD, time.monotonic()) == 0.0
