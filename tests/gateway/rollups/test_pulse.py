"""What a worker tells of itself: from real requests, and cheaply."""

from __future__ import annotations

import asyncio
import math
import time

import httpx2
import msgspec
import pytest

from backends.usage import Usage
from gateway.histogram import FINE_RATIO
from gateway.ledger import Ledger
from gateway.metrics import TTFT_FINE_S
from gateway.record import OUTRUN, Attempt, Exchange, Outcome
from gateway.rollups.outcomes import FAILED, UNCOUNTED
from gateway.rollups.pace import Pace
from gateway.rollups.pulse import MAX_MODELS, OTHER_MODELS, Pulse, ReplicaPulse
from gateway.rollups.pulser import Pulser
from gateway.rollups.quantiles import quantiles
from gateway.rollups.tally import difference
from gateway.rollups.view import figures, models
from gateway.state import LocalSource
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from tests.support.serving import Serving, serving, settings_for


async def chat(gateway: Serving, *, stream: bool, count: int = 1, model: str = "m") -> None:
    body = {"model": model, "messages": [], "stream": stream}
    async with httpx2.AsyncClient(trust_env=False) as client:
        for _ in range(count):
            await client.post(f"{gateway.url}/v1/chat/completions", json=body)


def settled(model: str, replica: str) -> Exchange:
    exchange = Exchange("req_1", "/v1/chat/completions", 10.0, 0.0, model=model, stream=True, pool="pool")
    exchange.replica, exchange.outcome, exchange.attempts = replica, Outcome.COMPLETED, 1
    exchange.dispatched_at, exchange.first_content_at, exchange.finished_at = 10.1, 10.3, 12.0
    exchange.tries = (Attempt("pool", replica, "", 10.0, sent_at=10.1, first_content_at=10.3, ended_at=12.0),)
    exchange.usage = Usage(100, 7, 60)
    return exchange


def replica(pulse: Pulse, place: int = 0) -> ReplicaPulse:
    return pulse.pools[0].replicas[place]


def test_every_outcome_is_good_or_bad_or_does_not_count() -> None:
    assert {Outcome.COMPLETED} | FAILED | UNCOUNTED == set(Outcome)
    assert not FAILED & UNCOUNTED


async def test_requests_and_times_are_counted_as_they_were() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        engine.script = Behaviour(ttft_s=0.08, prompt_tokens=100, cached_tokens=60, chunks=7)
        await chat(gateway, stream=True, count=4)
        engine.script = Behaviour(delay_head_s=0.05, prompt_tokens=100, cached_tokens=60, chunks=7)
        await chat(gateway, stream=False, count=2)
        await gateway.settled(6)
        engine.script = Behaviour(status=500)
        await chat(gateway, stream=False)
        await gateway.settled(7)
        pulse = await LocalSource(gateway.runtime, 3).pulse()
        assert (pulse.worker, pulse.requests) == (3, {"completed": 6, "upstream_error": 1})
        model = pulse.models["m"]
        assert (model.requests, model.failed, model.prompt_tokens, model.cached_tokens) == (7, 1, 600, 360)
        assert (model.completion_tokens, sum(model.duration)) == (42, 7)
        (median_s,) = quantiles(dict(enumerate(model.ttft)), TTFT_FINE_S, (0.5,))
        times = sorted(each.ttft_s for each in gateway.records if each.ttft_s is not None)
        true_s = times[math.ceil(len(times) / 2) - 1]
        assert median_s is not None
        assert true_s / FINE_RATIO <= median_s <= true_s * FINE_RATIO
        seen = replica(pulse)
        assert (seen.streams, seen.wholes, seen.state, seen.reason) == (4, 2, "healthy", "")
        assert 0.08 <= math.exp(seen.streams_log_s / 4) < 1.0
        assert 0.05 <= math.exp(seen.wholes_log_s / 2) < 1.0
        assert seen.unanswered >= 1


async def test_engines_that_do_not_say_what_was_cached_do_not_spoil_the_share_of_those_that_do() -> None:
    async with serving(settings_for(["http://127.0.0.1:1"])) as gateway:
        for cached_tokens in (60, None, None):
            exchange = settled("m", "pool-0")
            exchange.usage = Usage(100, 7, cached_tokens)
            gateway.runtime.metrics.observe(exchange)
        tally = difference(None, await LocalSource(gateway.runtime).pulse())
        assert (tally.models["m"].prompt_tokens, tally.models["m"].cached_tokens) == (300, 60)
        assert figures(tally)["cached_ratio"] == models(tally)[0]["cached_ratio"] == 0.6


async def test_a_storm_of_refusals_does_not_make_answers_look_quick() -> None:
    async with serving(settings_for(["http://127.0.0.1:1"])) as gateway:
        gateway.runtime.metrics.observe(settled("m", "pool-0"))  # took two seconds
        for _ in range(99):
            refused = Exchange("req_2", "/v1/chat/completions", 10.0, 0.0, model="m", outcome=Outcome.REJECTED)
            refused.finished_at = 10.001
            gateway.runtime.metrics.observe(refused)
        told = figures(difference(None, await LocalSource(gateway.runtime).pulse()))
        assert told["requests"] == 100
        assert told["duration_ms"]["p50"] == pytest.approx(2000, rel=0.1)


async def test_a_second_look_counts_nothing_twice() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        pulser = Pulser(gateway.runtime, 0)
        await chat(gateway, stream=True, count=2)
        await gateway.settled(2)
        first, second = pulser.pulse(), pulser.pulse()
        assert (replica(first).streams, replica(second).streams) == (2, 2)
        await chat(gateway, stream=True)
        await gateway.settled(3)
        assert replica(pulser.pulse()).streams == 3
        # What was told does not change behind the back of whoever was told it.
        assert sum(first.models["m"].ttft) == 2


async def test_a_slow_replica_shows_though_another_one_answers_for_it() -> None:
    """Of a hedged pair, the slower one has taken as long as it was waited for, at least."""
    ledger = Ledger(None)
    exchange = settled("m", "pool-1")
    slower = Attempt("pool", "pool-0", "", 8.0, sent_at=8.0, ended_at=10.0, code=OUTRUN)
    failed = Attempt("pool", "pool-0", "", 7.0, sent_at=7.0, ended_at=7.9, code="upstream_disconnected")
    exchange.tries = (failed, slower, *exchange.tries)
    ledger.record(exchange)
    pace = Pace(ledger)
    pace.catch_up({("pool", "pool-0"), ("pool", "pool-1")})
    assert {at: (sums[0], round(math.exp(sums[1]), 3)) for at, sums in pace.of.items()} == {
        ("pool", "pool-0"): (1, 2.0),
        ("pool", "pool-1"): (1, 0.2),
    }


async def test_a_stream_without_content_shows_where_it_waits() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        engine.script = Behaviour(hang=True)
        async with httpx2.AsyncClient(trust_env=False) as client:
            request = client.build_request(
                "POST", f"{gateway.url}/v1/chat/completions", json={"model": "m", "messages": [], "stream": True}
            )
            task = asyncio.create_task(client.send(request, stream=True))
            await engine.received()
            seen = replica(Pulser(gateway.runtime, 0).pulse())
            assert (seen.waiting, seen.in_flight) == (1, 1)
            assert 0.0 <= seen.oldest_s < 10.0
            task.cancel()
            await asyncio.wait([task])
        await gateway.settled(1)
        assert replica(Pulser(gateway.runtime, 0).pulse()).waiting == 0


async def test_a_pulse_comes_through_a_socket_as_it_was() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        await chat(gateway, stream=True, count=2)
        await gateway.settled(2)
        pulse = await LocalSource(gateway.runtime).pulse()
        assert msgspec.json.decode(msgspec.json.encode(pulse), type=Pulse) == pulse


async def test_models_beyond_the_limit_are_told_together() -> None:
    async with serving(settings_for(["http://127.0.0.1:9"])) as gateway:
        for number in range(MAX_MODELS + 3):
            exchange = settled(model=f"m{number}", replica="pool-0")
            gateway.runtime.metrics.observe(exchange)
        pulse = Pulser(gateway.runtime, 0).pulse()
        assert len(pulse.models) == MAX_MODELS + 1
        assert pulse.models[OTHER_MODELS].requests == 3
        assert sum(pulse.models[OTHER_MODELS].ttft) == 3


@pytest.mark.alone
async def test_a_pulse_of_two_hundred_replicas_takes_a_millisecond() -> None:
    urls = [f"http://127.0.0.1:{40_000 + number}" for number in range(200)]
    models = {f"m{number}": {"backend": "pool"} for number in range(10)}
    async with serving(settings_for(urls, models=models)) as gateway:
        metrics = gateway.runtime.metrics
        for number in range(1000):
            exchange = settled(model=f"m{number % 10}", replica=f"pool-{number % 200}")
            metrics.observe(exchange)
            gateway.runtime.ledger.record(exchange)
        pulser = Pulser(gateway.runtime, 0)
        pulser.pulse()
        took_s = []
        for _ in range(50):
            begun = time.perf_counter()
            pulser.pulse()
            took_s.append(time.perf_counter() - begun)
        assert min(took_s) < 1e-3
