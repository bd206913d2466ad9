"""A request that goes on at another pool: its first place and reservation come back, and it waits for others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.admission.visit import Visit
from gateway.errors import GatewayError
from gateway.limits.errors import InsufficientQuota
from gateway.order import CHAT, Call, read_order
from gateway.record import Exchange
from gateway.relay import Relay
from gateway.runtime import Runtime
from tests.gateway.admission.keyed import KEY, admitting, keyed, static


class Nobody:
    """A reply that is never written."""

    started = False
    on_pause = None


def relay_of(exchange: Exchange, runtime: Runtime) -> Relay:
    timing = runtime.fleet.models["m"].timing
    reply: Any = Nobody()
    return Relay(
        exchange,
        reply,
        timing,
        runtime.ticker,
        runtime.loop,
        expected_choices=1,
        hide_usage=False,
        max_event_bytes=1,
        max_response_bytes=1,
    )


class Going:
    """One request at the gate, without anything behind it."""

    def __init__(self, runtime: Runtime, **headers: str) -> None:
        self.runtime = runtime
        self.headers = [(b"authorization", f"Bearer {KEY}".encode())]
        self.headers += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.exchange = runtime.begin(self.call("m"))
        self.relay = relay_of(self.exchange, runtime)
        self.caller = runtime.gate.identify(self.headers)

    def call(self, model: str) -> Call:
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100})
        return Call(CHAT, self.headers, body.encode(), asyncio.get_running_loop().time())

    async def enter(self, model: str = "m") -> Visit:
        order = read_order(self.call(model), self.runtime.fleet, self.exchange.request_id, self.caller)
        visit = self.runtime.gate.visit(self.caller, order, self.exchange)
        assert visit is not None
        await self.runtime.gate.enter(visit, self.relay)
        return visit

    async def move(self, visit: Visit, model: str) -> Visit:
        order = read_order(self.call(model), self.runtime.fleet, self.exchange.request_id, self.caller)
        moved = await self.runtime.gate.move(visit, order, self.relay)
        assert moved is not None
        return moved


@asynccontextmanager
async def two_pools(folder: Path, **limits: Any) -> AsyncIterator[Runtime]:
    backends = {
        name: {"engine": "openai", "replicas": [{"url": f"http://127.0.0.1:{port}", "max_in_flight": 1}]}
        for name, port in (("pool", 9), ("rented", 10))
    }
    models = {
        "m": {"backend": "pool", "price": {"input": 1.0, "output": 1.0}},
        "dear": {"backend": "rented", "price": {"input": 10_000.0, "output": 10_000.0}},
    }
    settings = keyed(folder, ["http://127.0.0.1:9"], static(limits=limits), models=models, backends=backends)
    async with admitting(settings) as gate:
        yield gate.runtime


async def running(runtime: Runtime, pool: str) -> int:
    return sum(runtime.gate.home.near.standing(pool).running)


async def test_the_first_place_is_free_and_the_second_taken_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    async with two_pools(tmp_path, concurrent_requests=1, requests_per_minute=60) as runtime:
        going = Going(runtime)
        first = await going.enter()
        assert (await running(runtime, "pool"), await running(runtime, "rented")) == (1, 0)
        second = await going.move(first, "dear")
        assert (await running(runtime, "pool"), await running(runtime, "rented")) == (0, 1)
        assert second.admission is not None
        assert second.admission.in_use == (1,)
        going.exchange.attempts = 1
        runtime.gate.leave(second, going.exchange)
        assert await running(runtime, "rented") == 0
        again = await Going(runtime).enter()
        assert again.admission is not None
        owed_us = again.admission.marks_us[0] - again.admission.now_us
        assert owed_us <= 2 * 1_000_000 + 10  # two requests at one a second, not three


async def test_it_waits_for_the_second_within_what_is_left_of_the_same_deadline(tmp_path: Path) -> None:
    async with two_pools(tmp_path) as runtime:
        holder = await Going(runtime).enter("dear")
        going = Going(runtime, x_tidegate_deadline_ms="2000")
        first = await going.enter()
        going.exchange.started_at -= 0.4
        begun = asyncio.get_running_loop().time()
        with pytest.raises(GatewayError) as refused:
            await going.move(first, "dear")
        assert refused.value.code == "queue_timeout"
        assert asyncio.get_running_loop().time() - begun < 0.4  # a quarter of two seconds, less what had passed
        assert await running(runtime, "pool") == 0
        assert await running(runtime, "rented") == 1
        runtime.gate.leave(holder, holder.exchange)


async def test_its_money_is_reserved_anew_at_the_other_price(tmp_path: Path) -> None:
    async with two_pools(tmp_path, usd_per_day=0.5) as runtime:
        going = Going(runtime)
        first = await going.enter()
        with pytest.raises(InsufficientQuota):
            await going.move(first, "dear")
        assert not runtime.gate.visits
        cheap = await Going(runtime).enter()
        assert cheap.admission is not None
        assert cheap.admission.spent_micros[0] == cheap.reserved.micros  # nothing of what was refused stays reserved
