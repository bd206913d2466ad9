"""What becomes of requests that wait for a first replica: one worker in the test's own loop, over real sockets.

What its gateway would tell of starts is posted, and replicas come by reloads, as they do when some are found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import msgspec
import pytest

from gateway.admission import holding
from gateway.config import Settings
from gateway.inspection.door import Door
from gateway.notices import HOLD, START
from gateway.record import Outcome
from gateway.scaling.standing import Hold
from gateway.starting.note import StartNote
from loadtests.engine import FakeEngine
from tests.support.redis_server import RedisServer
from tests.support.serving import Serving, serving, settings_for

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
PATIENCE_S = 20.0


class Held:
    """One gateway, and clients that each have a connection of their own."""

    def __init__(self, gateway: Serving, client: httpx2.AsyncClient, sections: dict[str, Any]) -> None:
        self.gateway, self.client, self._sections = gateway, client, sections

    @property
    def gate(self) -> Any:
        return self.gateway.runtime.gate

    def tell(self, kind: str, rest: str, what: msgspec.Struct | None) -> None:
        value = None if what is None else msgspec.json.encode(what)
        self.gateway.runtime.notices.apply(kind, f"{kind}/{rest}", value)

    def starts(self, **fields: Any) -> None:
        self.tell(START, "pool/gw", StartNote(**{"starting": 1, "since_unix_s": time.time(), **fields}))

    def have(self, *urls: str, **fields: Any) -> None:
        """These replicas are there from now on, and no other."""
        self.gateway.runtime.reload(settings(urls, fields, **self._sections))

    async def ask(self, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
        url = f"{self.gateway.url}/v1/chat/completions"
        return await self.client.post(url, json={**CHAT, **fields}, headers=headers)

    async def waiting(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.gate.waiting != count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def settings(urls: Sequence[str], fields: dict[str, Any], **sections: Any) -> Settings:
    backend = {"discovery": {"registration": {}}, "health": {"probe": False}, "warm_up": {"within_s": 0}}
    pool = {"engine": "openai", **backend, "replicas": [{"url": url, **fields} for url in urls]}
    backends = {"pool": {**pool, **sections.pop("backend", {})}, **sections.pop("backends", {})}
    return settings_for([], backends=backends, **sections)


@asynccontextmanager
async def held(*urls: str, replica: dict[str, Any] | None = None, **sections: Any) -> AsyncIterator[Held]:
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(serving(settings(urls, replica or {}, **sections)))
        await gateway.runtime.admission.start()
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False, timeout=60.0))
        yield Held(gateway, client, sections)


async def test_a_start_that_fails_ends_the_wait_with_how_far_it_was_and_when_to_come_back() -> None:
    async with held(backend={"queue": {"start_wait_s": 0.3}}) as side:
        fields = {"phase": "loading", "progress": 0.4, "lead_s": 100.0}
        side.starts(detail="it ended with code 1: no memory, see /var/log/engines/r0.log", **fields)
        answer = await side.ask()
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (503, "model_starting", "server_error")
        assert "none was ready within 0.3 s: one has been starting for 0 s, loading (40%)" in error["message"]
        assert "no memory" not in error["message"]  # what engines say is for operators
        assert 95 < int(answer.headers["retry-after"]) <= 121
        assert float(answer.headers["x-tidegate-queue-ms"]) >= 300
        side.starts(since_unix_s=time.time() - 90, lead_s=100.0)
        assert int((await side.ask()).headers["retry-after"]) <= 12
        (first, _) = await side.gateway.settled(2)
        assert (first.outcome, first.error_code, first.pool) == (Outcome.UNAVAILABLE, "model_starting", "pool")
        assert first.queue_s >= 0.3


async def test_who_cannot_wait_as_long_as_starts_are_known_to_take_is_refused_at_once() -> None:
    async with held() as side:
        side.starts(lead_s=100.0, learned=True)
        began = time.monotonic()
        answer = await side.ask(headers={"x-tidegate-deadline-ms": "60000"})
        assert answer.json()["error"]["code"] == "model_starting"
        assert time.monotonic() - began < 30.0
        assert 95 < int(answer.headers["retry-after"]) <= 121
        assert (await side.ask(headers={"x-stainless-read-timeout": "50"})).json()["error"]["code"] == "model_starting"
        asked = asyncio.create_task(side.ask())  # ten minutes are enough
        await side.waiting(1)
        async with FakeEngine() as engine:
            side.have(engine.url)
            assert (await asked).status_code == 200


async def test_nobody_waits_where_nobody_starts_a_replica() -> None:
    async with held(
        backend={"scaling": {"min": 0, "max": 1, "provider": "webhook", "webhook": {"url": "http://x/"}}}
    ) as side:
        side.tell(HOLD, "pool", Hold(0, time.time() + 60, "ann"))
        assert (await side.ask()).json()["error"]["code"] == "no_replica_available"
        side.tell(HOLD, "pool", None)
        await asyncio.sleep(0.15)  # a pool's room is good for a tenth of a second
        asked = asyncio.create_task(side.ask())
        await side.waiting(1)
        side.tell(HOLD, "pool", Hold(0, time.time() + 60, "ann"))
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica_available")


async def test_a_client_that_leaves_is_out_of_line_and_its_place_goes_to_nobody() -> None:
    async with held() as side, FakeEngine() as engine:
        side.starts()
        asked = [asyncio.create_task(side.ask()) for _ in range(3)]
        await side.waiting(3)
        asked[1].cancel()
        await side.waiting(2)
        side.have(engine.url)
        assert [(await each).status_code for each in (asked[0], asked[2])] == [200, 200]
        assert len(engine.requests) == 2
        records = await side.gateway.settled(3)
        assert sorted(str(each.outcome) for each in records) == ["client_left", "completed", "completed"]
        assert side.gate.visits == {}
        assert side.gateway.runtime.body_budget.used_bytes == 0


async def test_no_more_wait_than_the_queue_has_room_for() -> None:
    queue = {"max_waiting": 3, "max_waiting_per_tenant": 2}
    async with held(backend={"queue": queue}) as side:
        side.starts()
        asked = [asyncio.create_task(side.ask()) for _ in range(2)]
        await side.waiting(2)
        refused = await side.ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        for each in asked:
            each.cancel()
        await side.waiting(0)


async def test_what_is_in_line_when_the_last_replica_leaves_goes_to_the_next_one_and_never_to_that() -> None:
    async with FakeEngine(hang=True) as old, FakeEngine() as new:
        queue = {"max_wait_s": 0.5}
        async with held(old.url, replica={"max_in_flight": 1}, backend={"queue": queue}) as side:
            running = asyncio.create_task(side.ask())
            await old.received(1)
            in_line = [asyncio.create_task(side.ask()) for _ in range(3)]
            await side.waiting(3)
            side.starts()
            side.have()
            done, _ = await asyncio.wait(in_line, timeout=1.0)  # twice as long as a place is waited for
            assert not done
            running.cancel()  # its place is free, and nobody gets it
            done, _ = await asyncio.wait(in_line, timeout=0.5)
            assert not done
            side.have(new.url)
            assert [each.status_code for each in await asyncio.gather(*in_line)] == [200] * 3
            assert (len(old.requests), len(new.requests)) == (1, 3)


async def test_what_has_waited_goes_to_replicas_that_have_come_since() -> None:
    async with (
        FakeEngine(hang=True) as full,
        FakeEngine() as new,
        held(full.url, replica={"max_in_flight": 1}) as side,
    ):
        running = asyncio.create_task(side.ask())
        await full.received(1)
        asked = asyncio.create_task(side.ask())
        await side.waiting(1)
        side.have(full.url, new.url, max_in_flight=1)
        assert (await asked).status_code == 200
        assert (len(full.requests), len(new.requests)) == (1, 1)
        running.cancel()
        await asyncio.wait([running])


async def test_fields_that_the_engine_that_comes_may_not_be_asked_for_are_refused_then() -> None:
    async with held() as side, FakeEngine() as engine:
        side.starts()
        asked = asyncio.create_task(side.ask(bootstrap_host="10.0.0.1"))
        await side.waiting(1)
        side.have(engine.url, engine="sglang")
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "reserved_parameter"), answer.text
        assert not engine.requests


async def test_a_fallback_is_asked_before_a_request_waits_and_it_waits_where_that_cannot_answer() -> None:
    async with FakeEngine(models=("other",)) as other, FakeEngine() as engine:
        models = {"m": {"backend": "pool", "fallbacks": [{"model": "other"}]}, "other": {"backend": "others"}}
        others = {"engine": "openai", "replicas": [{"url": other.url}], "health": {"probe": False}}
        async with held(models=models, backends={"others": others}) as side:
            side.starts()
            answer = await side.ask()
            assert (answer.status_code, answer.headers["x-tidegate-model"]) == (200, "other"), answer.text
            await other.stop()
            asked = asyncio.create_task(side.ask())
            await side.waiting(1)
            side.have(engine.url)
            answer = await asked
            assert answer.status_code == 200, answer.text
            assert "x-tidegate-model" not in answer.headers
            record = (await side.gateway.settled(2))[-1]
            assert (record.pool, record.fallback_from, record.model) == ("pool", "", "m")
            assert len(engine.requests) == 1


async def test_a_stream_is_kept_open_while_it_waits_and_told_in_an_event_when_that_was_in_vain() -> None:
    stream = {"hold_s": 0.2, "heartbeat_s": 0.2}
    async with held(backend={"queue": {"start_wait_s": 1.0}}, stream=stream) as side:
        side.starts(phase="compiling")
        answer = await side.ask(stream=True)
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
        assert answer.text.startswith(": ping")
        assert '"code":"model_starting"' in answer.text
        assert "[DONE]" not in answer.text


@asynccontextmanager
async def one_ahead(store: str) -> AsyncIterator[tuple[Held, Held, FakeEngine, asyncio.Task[httpx2.Response]]]:
    """Two gateways on one Redis, of which only the second has found the replica, and a request that waits at the
    first."""
    async with FakeEngine() as engine:
        behind = held(store=store)
        ahead = held(engine.url, replica={"max_in_flight": 4}, store=store)
        async with behind as first, ahead as second:
            first.starts()
            asked = asyncio.create_task(first.ask())
            await first.waiting(1)
            yield first, second, engine, asked


async def test_a_place_from_a_gateway_that_knows_of_the_replica_is_kept_until_this_one_knows_too(
    redis_server: RedisServer,
) -> None:
    async with one_ahead(redis_server.url) as (first, second, engine, asked):
        async with asyncio.timeout(PATIENCE_S):
            while not any(visit.granted for visit in first.gate.visits.values()):
                assert (await second.ask()).status_code == 200  # each looks who is next
        done, _ = await asyncio.wait([asked], timeout=0.5)
        assert not done
        first.have(engine.url, max_in_flight=4)
        assert (await asked).status_code == 200


@asynccontextmanager
async def left_by_the_last(
    old: FakeEngine, sections: dict[str, Any]
) -> AsyncIterator[tuple[Held, asyncio.Task[httpx2.Response]]]:
    """A request in line, behind one that never ends, when their replica leaves and another one starts."""
    async with held(old.url, replica={"max_in_flight": 1}, **sections) as side:
        running = asyncio.create_task(side.ask())
        await old.received(1)
        in_line = asyncio.create_task(side.ask())
        await side.waiting(1)
        side.starts()
        side.have()
        yield side, in_line
        running.cancel()
        await asyncio.wait([running])


async def test_what_is_in_line_when_the_last_replica_leaves_is_sent_to_its_fallback_at_once() -> None:
    async with FakeEngine(hang=True) as old, FakeEngine(models=("other",)) as other:
        models = {"m": {"backend": "pool", "fallbacks": [{"model": "other"}]}, "other": {"backend": "others"}}
        others = {"engine": "openai", "replicas": [{"url": other.url}], "health": {"probe": False}}
        sections: dict[str, Any] = {"models": models, "backends": {"others": others}}
        async with left_by_the_last(old, sections) as (_, in_line):
            async with asyncio.timeout(PATIENCE_S):  # and not after max_wait_s, which is 30
                answer = await in_line
            assert (answer.status_code, answer.headers["x-tidegate-model"]) == (200, "other"), answer.text


@pytest.mark.parametrize("usd_per_hour", [5.0, 0.000001])
async def test_what_is_in_line_when_the_last_replica_leaves_is_sent_to_rented_ones_if_it_may(
    usd_per_hour: float,
) -> None:
    async with FakeEngine(hang=True) as old, FakeEngine() as rented, FakeEngine() as new:
        spill = {"backend": "rented", "price": {"input": 1.0, "output": 2.0}, "usd_per_day": 5.0}
        spill["usd_per_hour"] = usd_per_hour
        models = {"m": {"backend": "pool", "price": {"input": 0.0}, "spill": spill}}
        host = {"engine": "openai", "hosted": True, "replicas": [{"url": rented.url}], "health": {"probe": False}}
        sections: dict[str, Any] = {"models": models, "backends": {"rented": host}}
        async with left_by_the_last(old, sections) as (side, in_line):
            if usd_per_hour < 1.0:  # too dear: it stays in line for the next replica
                done, _ = await asyncio.wait([in_line], timeout=1.5)
                assert not done
                side.have(new.url)
            async with asyncio.timeout(PATIENCE_S):
                answer = await in_line
            assert answer.status_code == 200, answer.text
            assert (len(rented.requests), len(new.requests)) == ((0, 1) if usd_per_hour < 1.0 else (1, 0))


@pytest.mark.parametrize("gap", [False, True])
async def test_what_waits_for_a_replica_in_its_region_goes_to_one_that_has_come_since(gap: bool) -> None:
    async with FakeEngine(hang=True) as full, FakeEngine() as far, FakeEngine() as new:

        def backend(*urls: tuple[str, str], places: int = 1) -> dict[str, Any]:
            return {"replicas": [{"url": url, "region": region, "max_in_flight": places} for url, region in urls]}

        here = {"x-tidegate-region": "eu"}
        first = (full.url, "eu"), (far.url, "us")
        async with held(backend=backend(*first)) as side:
            running = asyncio.create_task(side.ask(headers=here))
            await full.received(1)
            asked = asyncio.create_task(side.ask(headers=here))
            async with asyncio.timeout(PATIENCE_S):
                # Until it has given up the place that is of no use to it.
                while [visit.granted for visit in side.gate.visits.values()] != [True, False]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            if gap:
                side.starts()
                side.gateway.runtime.reload(settings((), {}))
                await side.waiting(1)
                side.gateway.runtime.reload(settings((), {}, backend=backend((new.url, "eu"), places=4)))
            else:
                side.gateway.runtime.reload(settings((), {}, backend=backend(*first, (new.url, "eu"))))
            async with asyncio.timeout(PATIENCE_S):
                answer = await asked
            assert (answer.status_code, len(new.requests)) == (200, 1), answer.text
            running.cancel()
            await asyncio.wait([running])


async def test_who_has_a_place_at_a_replica_that_is_not_found_is_told_how_long_it_really_waited(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "OPEN_WITHIN_S", 0.3)
    async with one_ahead(redis_server.url) as (_, second, _, asked):
        async with asyncio.timeout(PATIENCE_S):
            while not asked.done():
                assert (await second.ask()).status_code == 200
        answer = await asked
        assert answer.json()["error"]["code"] == "model_starting"
        assert "within 300.0 s" not in answer.json()["error"]["message"]


async def play(side: Held, door: Door) -> int:
    headers = [("x-tidegate-trial", '{"policy": "round_robin"}')]
    raw = msgspec.json.encode(CHAT)
    async with door.ask(side.gateway.runtime.settings, "/v1/chat/completions", headers, raw) as answer:
        return answer.status


async def test_a_trial_of_a_policy_waits_where_its_replicas_start_and_asks_no_fallback() -> None:
    async with FakeEngine(models=("other",)) as other, FakeEngine() as engine:
        models = {"m": {"backend": "pool", "fallbacks": [{"model": "other"}]}, "other": {"backend": "others"}}
        others = {"engine": "openai", "replicas": [{"url": other.url}], "health": {"probe": False}}
        async with held(models=models, backends={"others": others}) as side:
            runtime = side.gateway.runtime
            runtime.trial_secret = "s" * 43
            door = Door((side.gateway.host, side.gateway.port), runtime.trial_secret)
            side.starts()
            asked = asyncio.create_task(play(side, door))
            await side.waiting(1)
            side.have(engine.url)
            assert await asked == 200
            assert (len(engine.requests), len(other.requests)) == (1, 0)


async def test_what_a_fallback_has_no_more_room_in_line_for_waits_where_its_own_replicas_start() -> None:
    async with FakeEngine(models=("other",), hang=True) as other, FakeEngine() as engine:
        models = {"m": {"backend": "pool", "fallbacks": [{"model": "other"}]}, "other": {"backend": "others"}}
        others = {"engine": "openai", "replicas": [{"url": other.url, "max_in_flight": 1}], "health": {"probe": False}}
        others["queue"] = {"max_waiting_per_tenant": 1}
        async with held(models=models, backends={"others": others}) as side:
            side.starts()
            filling = [asyncio.create_task(side.ask(model="other"))]
            await other.received(1)
            filling.append(asyncio.create_task(side.ask(model="other")))
            await side.waiting(1)
            asked = asyncio.create_task(side.ask())
            await side.waiting(2)
            side.have(engine.url)
            answer = await asked
            assert (answer.status_code, len(engine.requests)) == (200, 1), answer.text
            for each in filling:
                each.cancel()
            await asyncio.wait(filling)


async def test_a_trial_of_a_policy_that_is_in_line_when_the_last_replica_leaves_is_not_sent_to_rented_ones() -> None:
    async with FakeEngine(hang=True) as old, FakeEngine() as rented, FakeEngine() as new:
        spill = {"backend": "rented", "price": {"input": 1.0, "output": 2.0}, "usd_per_day": 5.0, "usd_per_hour": 5.0}
        models = {"m": {"backend": "pool", "price": {"input": 0.0}, "spill": spill}}
        host = {"engine": "openai", "hosted": True, "replicas": [{"url": rented.url}], "health": {"probe": False}}
        sections: dict[str, Any] = {"models": models, "backends": {"rented": host}}
        async with held(old.url, replica={"max_in_flight": 1}, **sections) as side:
            side.gateway.runtime.trial_secret = "s" * 43
            running = asyncio.create_task(side.ask())
            await old.received(1)
            asked = asyncio.create_task(play(side, Door((side.gateway.host, side.gateway.port), "s" * 43)))
            await side.waiting(1)
            side.starts()
            side.have()
            done, _ = await asyncio.wait([asked], timeout=1.5)
            assert not done
            side.have(new.url)
            assert await asked == 200
            assert (len(new.requests), len(rented.requests)) == (1, 0)
            running.cancel()
            await asyncio.wait([running])


async def test_none_is_kept_for_minutes_while_half_of_the_memory_for_bodies_is_taken() -> None:
    async with (
        held(server={"max_in_flight_bytes": 1_000_000, "max_body_bytes": 500_000}) as side,
        FakeEngine() as engine,
    ):
        side.starts(lead_s=100.0)
        large = {**CHAT, "messages": [{"role": "user", "content": "x" * 300_000}]}
        waiting = [asyncio.create_task(side.ask(messages=large["messages"])) for _ in range(2)]
        await side.waiting(1)  # the second has found half of it taken, itself included
        refused = next(done.result() for done in (await asyncio.wait(waiting, return_when="FIRST_COMPLETED"))[0])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_starting")
        assert side.gate.waiting == 1
        side.have(engine.url)
        assert sorted([answer.status_code for answer in await asyncio.gather(*waiting)]) == [200, 503]
