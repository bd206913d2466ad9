"""Concurrency and money of every kind of holder, through a whole gateway: users, models, a tenant's use of a model.

Keys and tenants are in `test_gate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.order import CHAT
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import OTHER, admitting, bearer, body, keyed, static
from tests.support.client import connect, post, until
from tests.support.http import ask

PRICE = {"input": 1000.0, "output": 1000.0}
"""US dollars for a million tokens: 1,900 tokens are 1.90 USD."""

Fields = dict[str, Any]


def holders(
    kind: str, limits: Fields
) -> tuple[Fields, list[Fields], list[tuple[str, Fields]], list[tuple[str, Fields]]]:
    """Settings, keys, requests that share the limits of one holder of this kind, and requests that do not."""
    models: Fields = {name: {"backend": "pool", "price": PRICE} for name in ("m", "n")}
    keys = [static(tenant="acme"), static("b", OTHER, tenant="zeta")]
    mine, other = bearer(), bearer(OTHER)
    if kind == "user":
        sections = {"limits": {"user": limits}, "models": models}
        # The same name in another tenant is another user; without a name nobody is meant.
        return (
            sections,
            keys,
            [(mine, {"user": "ann"}), (mine, {"user": "ann", "model": "n"})],
            [
                (mine, {"user": "bob"}),
                (other, {"user": "ann"}),
                (mine, {}),
            ],
        )
    if kind == "model":
        models["m"]["limits"] = limits
        return {"models": models}, keys, [(mine, {}), (other, {})], [(mine, {"model": "n"}), (other, {"model": "n"})]
    tenants = {"acme": {"model_limits": {"m": limits}}}
    keys.append(static("c", "tgk-third-key-of-sufficient-length", tenant="acme"))
    third = bearer("tgk-third-key-of-sufficient-length")
    return (
        {"models": models, "tenants": tenants},
        keys,
        [(mine, {}), (third, {})],
        [(mine, {"model": "n"}), (other, {})],
    )


KINDS = ["user", "model", "tenant's model"]
LABELS = {"user": "user", "model": "model m", "tenant's model": "model m for tenant acme"}


@pytest.mark.parametrize("kind", KINDS)
async def test_concurrency_is_counted_for_the_holder_and_nobody_else(tmp_path: Path, kind: str) -> None:
    sections, keys, same, others = holders(kind, {"concurrent_requests": 1})
    async with (
        FakeEngine(hang=True) as engine,
        admitting(keyed(tmp_path, [engine.url], *keys, **sections)) as gate,
        connect(gate.host, gate.port) as holder,
    ):
        key, fields = same[0]
        await holder.send(post(CHAT, body(**fields), key))
        await engine.received(1)
        engine.script = FakeEngine().script
        for key, fields in same:
            refused = await ask(gate, body(**fields), CHAT, key)
            assert refused.status == 429
            assert LABELS[kind] in refused.json["error"]["message"]
        assert [(await ask(gate, body(**fields), CHAT, key)).status for key, fields in others] == [200] * len(others)
        holder.leave("reset")
        await until(lambda: gate.runtime.in_flight == 0)
        assert [(await ask(gate, body(**fields), CHAT, key)).status for key, fields in same] == [200, 200]


@pytest.mark.parametrize("kind", KINDS)
async def test_money_is_counted_for_the_holder_and_nobody_else(tmp_path: Path, kind: str) -> None:
    sections, keys, same, others = holders(kind, {"usd_per_day": 2.0})
    async with FakeEngine(prompt_tokens=1900, cached_tokens=0, chunks=20) as engine:
        settings = keyed(tmp_path, [engine.url], *keys, **sections)
        async with admitting(settings) as gate:
            key, fields = same[0]
            assert (await ask(gate, body(max_tokens=1, **fields), CHAT, key)).status == 200
            assert ((await gate.settled(1))[0].cost_usd or 0.0) >= 1.9
            for key, fields in same:
                refused = await ask(gate, body(max_tokens=300, **fields), CHAT, key)
                assert (refused.status, refused.json["error"]["code"]) == (429, "insufficient_quota")
            for key, fields in others:
                assert (await ask(gate, body(max_tokens=300, **fields), CHAT, key)).status == 200
        async with admitting(settings) as gate:  # the memory is gone, the record is not
            key, fields = same[1]
            refused = await ask(gate, body(max_tokens=300, **fields), CHAT, key)
            assert (refused.status, refused.json["error"]["code"]) == (429, "insufficient_quota")


@pytest.mark.parametrize("tokens", [2**64 - 1, -5])
async def test_an_engine_that_counts_absurdly_closes_no_limit_for_years(tmp_path: Path, tokens: int) -> None:
    limits = {"tokens_per_minute": 6_000, "usd_per_day": 50.0}
    models = {"m": {"backend": "pool", "price": PRICE}}
    async with FakeEngine(prompt_tokens=tokens, chunks=5) as engine:
        settings = keyed(tmp_path, [engine.url], static(limits=limits), models=models)
        async with admitting(settings) as gate:
            for number in range(1, 4):
                assert (await ask(gate, body(max_tokens=10), CHAT, bearer())).status == 200
                record = (await gate.settled(number))[-1]
                assert record.usage is not None
                assert record.usage_estimated
                assert 0 <= record.usage.prompt_tokens < 1000
            await until(lambda: gate.runtime.gate.spend.waiting_micros == 0, 20.0)
            assert gate.runtime.gate.spend.lost_micros == 0
