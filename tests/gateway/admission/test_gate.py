"""Keys and limits as clients meet them, through a whole gateway in front of a fake engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from gateway.order import CHAT
from gateway.record import Outcome
from loadtests.engine import FakeEngine
from tests.gateway.admission.keyed import KEY, OTHER, admitting, bearer, body, keyed, static
from tests.support.client import connect, post, until
from tests.support.http import ask, streaming


async def test_without_a_key_nobody_comes_in_and_with_one_the_record_names_it(tmp_path: Path) -> None:
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url])) as gate:
        for headers in ((), (bearer("tgk-something-else-altogether"),), ("authorization: Bearer ",)):
            refused = await ask(gate, body(), CHAT, *headers)
            assert refused.status == 401
            assert refused.json["error"]["code"] == "invalid_api_key"
        assert (await ask(gate, body(), CHAT, bearer())).status == 200
        (record,) = await gate.settled(1)  # nobody unknown fills the usage log
        assert (record.tenant, record.key_id) == ("default", "static:ci")
        families = {family.name: family for family in gate.runtime.metrics.families()}
        turned_away = {sample.labels.get("status"): sample.value for sample in families["tidegate_refused"].samples}
        assert turned_away["401"] == 3
        assert len(engine.requests) == 1
        assert KEY not in str(engine.requests[0].headers)


async def test_the_models_route_asks_for_a_key_and_lists_what_it_may_use(tmp_path: Path) -> None:
    models = {"m": {"backend": "pool"}, "secret": {"backend": "pool"}}
    keys = [static(models=["m"]), static("all", OTHER)]
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url], *keys, models=models)) as gate:
        async with connect(gate.host, gate.port) as client:
            await client.send(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await client.reply()).status == 401
            await client.send(f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{bearer()}\r\n\r\n".encode())
            assert [each["id"] for each in (await client.reply()).json["data"]] == ["m"]
            await client.send(f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{bearer(OTHER)}\r\n\r\n".encode())
            assert [each["id"] for each in (await client.reply()).json["data"]] == ["m", "secret"]
        refused = [await ask(gate, body(model=name), CHAT, bearer()) for name in ("secret", "nothing-of-that-name")]
        assert [each.status for each in refused] == [403, 403]
        assert refused[0].json == refused[1].json
        assert (await ask(gate, body(model="secret"), CHAT, bearer(OTHER))).status == 200
        assert (await ask(gate, body(model="nothing-of-that-name"), CHAT, bearer(OTHER))).status == 404


async def test_requests_beyond_the_burst_are_refused_with_the_time_to_come_back(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 12, "burst_s": 10}  # two at once, one every 5 s
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url], static(limits=limits))) as gate:
        first, second, third = [await ask(gate, body(), CHAT, bearer()) for _ in range(3)]
        assert [first.status, second.status, third.status] == [200, 200, 429]
        assert first.headers["x-ratelimit-limit-requests"] == "12"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        assert third.headers["x-tidegate-store"] == "memory"
        error = third.json["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
        wait_s = int(third.headers["retry-after-ms"]) / 1000
        assert 3.0 < wait_s <= 5.0
        assert float(third.headers["retry-after"]) >= wait_s
        assert len(engine.requests) == 2
        assert (await gate.settled(3))[-1].outcome is Outcome.REJECTED


async def test_tokens_are_settled_with_what_the_engine_counted(tmp_path: Path) -> None:
    limits = {"tokens_per_minute": 60_000}
    script = FakeEngine(prompt_tokens=700, chunks=30)
    async with script as engine, admitting(keyed(tmp_path, [engine.url], static(limits=limits))) as gate:
        reply = await ask(gate, body(), CHAT, bearer())
        reserved = 10_000 - int(reply.headers["x-ratelimit-remaining-tokens"])
        await gate.settled(1)
        after = await ask(gate, body(max_tokens=1), CHAT, bearer())
        used = gate.records[0].usage
        assert used is not None
        total = used.prompt_tokens + used.completion_tokens
        left = int(after.headers["x-ratelimit-remaining-tokens"])
        assert reserved > 500  # the first guess of an output
        refilled = 1000 * 2  # more than what comes back within two seconds
        assert 10_000 - total - 1000 <= left <= 10_000 - total + refilled


async def test_a_client_that_leaves_is_charged_for_what_was_relayed(tmp_path: Path) -> None:
    limits = {"output_tokens_per_minute": 6_000}
    async with (
        FakeEngine(chunks=500, interval_s=0.01) as engine,
        admitting(keyed(tmp_path, [engine.url], static(limits=limits))) as gate,
    ):
        async with streaming(gate, body(stream=True), CHAT, bearer()) as stream:
            for _ in range(20):
                await stream.chunk()
        record = (await gate.settled(1))[0]
        assert record.outcome is Outcome.CLIENT_LEFT
        assert record.usage_estimated
        assert record.usage is not None
        assert 15 <= record.content_events <= record.usage.completion_tokens < 200


async def test_concurrent_requests_are_counted_while_they_run(tmp_path: Path) -> None:
    limits = {"concurrent_requests": 2}
    async with (
        FakeEngine(hang=True) as engine,
        admitting(keyed(tmp_path, [engine.url], static(limits=limits), static("b", OTHER))) as gate,
        connect(gate.host, gate.port) as one,
        connect(gate.host, gate.port) as two,
    ):
        for client in (one, two):
            await client.send(post(CHAT, body(), bearer()))
        await engine.received(2)
        refused = await ask(gate, body(), CHAT, bearer())
        assert refused.status == 429
        assert "concurrent" in refused.json["error"]["message"]
        one.leave("reset")
        await until(lambda: gate.runtime.in_flight == 1)
        engine.script = FakeEngine().script
        assert (await ask(gate, body(), CHAT, bearer())).status == 200
        assert (await ask(gate, body(), CHAT, bearer(OTHER))).status == 200  # without limits of its own


async def test_all_limits_admit_together_or_none_is_charged(tmp_path: Path) -> None:
    sections = {
        "limits": {"key": {"requests_per_minute": 600}},
        "tenants": {"acme": {"limits": {"concurrent_requests": 1}}},
    }
    keys = [static(tenant="acme"), static("b", OTHER, tenant="acme")]
    async with (
        FakeEngine(hang=True) as engine,
        admitting(keyed(tmp_path, [engine.url], *keys, **sections)) as gate,
        connect(gate.host, gate.port) as one,
    ):
        await one.send(post(CHAT, body(), bearer()))
        await engine.received(1)
        for _ in range(3):
            refused = await ask(gate, body(), CHAT, bearer(OTHER))
            assert refused.status == 429
            assert "acme" in refused.json["error"]["message"]
            assert refused.headers["x-ratelimit-remaining-requests"] == "100"


async def test_money_that_is_spent_ends_it_for_the_day_and_survives_a_restart(tmp_path: Path) -> None:
    models = {"m": {"backend": "pool", "price": {"input": 1000.0, "output": 1000.0}}}
    limits = {"usd_per_day": 2.0}
    async with FakeEngine(prompt_tokens=1900, cached_tokens=0, chunks=200) as engine:
        settings = keyed(tmp_path, [engine.url], static(limits=limits), models=models)
        async with admitting(settings) as gate:
            assert (await ask(gate, body(max_tokens=1), CHAT, bearer())).status == 200
            record = (await gate.settled(1))[0]
            assert record.cost_usd is not None
            assert record.cost_usd >= 1.9
            refused = await ask(gate, body(max_tokens=300), CHAT, bearer())
            assert refused.status == 429
            assert refused.json["error"]["code"] == "insufficient_quota"
            assert refused.headers["x-should-retry"] == "false"
        async with admitting(settings) as gate:  # the memory is gone, the record is not
            again = await ask(gate, body(max_tokens=300), CHAT, bearer())
            assert again.json["error"]["code"] == "insufficient_quota"


async def test_a_limit_in_shadow_counts_and_lets_through(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 6, "shadow": True}
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url], static(limits=limits))) as gate:
        assert [(await ask(gate, body(), CHAT, bearer())).status for _ in range(3)] == [200, 200, 200]
        families = {family.name: family for family in gate.runtime.gate.metrics.families(gate.runtime.admission)}
        samples = [sample for sample in families["tidegate_limit_refusals"].samples if sample.name.endswith("_total")]
        assert [(sample.labels, sample.value) for sample in samples] == [
            ({"scope": "key", "limit": "requests", "mode": "shadow"}, 2.0)
        ]


async def test_hard_mode_bounds_an_output_that_nobody_bounded_and_says_so(tmp_path: Path) -> None:
    key = static(limits={"tokens_per_minute": 50_000, "hard_tokens": True}, max_output_tokens=77)
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url], key)) as gate:
        reply = await ask(gate, body(), CHAT, bearer())
        assert reply.headers["x-tidegate-max-tokens"] == "77"
        sent = json.loads(engine.requests[0].body)
        assert 77 in (sent.get("max_tokens"), sent.get("max_completion_tokens"))
        refused = await ask(gate, body(max_tokens=78), CHAT, bearer())
        assert refused.status == 400
        assert refused.json["error"]["param"] == "max_tokens"


async def test_users_of_a_tenant_have_limits_of_their_own(tmp_path: Path) -> None:
    sections = {"limits": {"user": {"requests_per_minute": 6}}}
    async with FakeEngine() as engine, admitting(keyed(tmp_path, [engine.url], **sections)) as gate:
        statuses = [
            (await ask(gate, body(**fields), CHAT, bearer())).status
            for fields in ({"user": "a"}, {"user": "a"}, {"safety_identifier": "b"}, {"user": "a"}, {})
        ]
        assert statuses == [200, 429, 200, 429, 200]


async def test_a_key_is_served_in_its_regions_only(tmp_path: Path) -> None:
    key = static(regions=["eu-west"])
    async with FakeEngine() as home, FakeEngine() as abroad:
        backend = {"replicas": [{"url": home.url, "region": "eu-west"}, {"url": abroad.url, "region": "us-east"}]}
        async with admitting(keyed(tmp_path, [home.url], key, backend=backend)) as gate:
            for _ in range(8):
                assert (await ask(gate, body(), CHAT, bearer())).headers["x-tidegate-region"] == "eu-west"
            refused = await ask(gate, body(), CHAT, bearer(), "x-tidegate-region: us-east")
            assert refused.status == 403
            assert refused.json["error"]["code"] == "data_residency_mismatch"
            assert not abroad.requests


async def test_what_was_reserved_is_given_back_when_no_engine_answers(tmp_path: Path) -> None:
    limits = {"concurrent_requests": 1, "tokens_per_minute": 6000}
    async with admitting(keyed(tmp_path, ["http://127.0.0.1:9"], static(limits=limits))) as gate:
        replies = [await ask(gate, body(max_tokens=50), CHAT, bearer()) for _ in range(5)]
        assert {reply.status for reply in replies} == {502}
        assert int(replies[-1].headers["x-ratelimit-remaining-tokens"]) > 800
        assert not gate.runtime.gate.visits


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_a_burst_of_clients_gets_exactly_the_burst_through(tmp_path: Path, edge: str) -> None:
    limits = {"requests_per_minute": 60, "burst_s": 20}
    async with FakeEngine() as engine:
        settings = keyed(tmp_path, [engine.url], static(limits=limits), server={"edge": edge})
        async with admitting(settings) as gate:
            begun = asyncio.get_running_loop().time()
            replies = await asyncio.gather(*(ask(gate, body(), CHAT, bearer()) for _ in range(80)))
            took_s = asyncio.get_running_loop().time() - begun
            passed = sum(reply.status == 200 for reply in replies)
            assert 20 <= passed <= 20 + int(took_s) + 1
            assert len(engine.requests) == passed


@pytest.mark.parametrize("edge", ["protocol", "asgi"])
@pytest.mark.parametrize("framing", ["content-length: 1000000", "transfer-encoding: chunked"])
async def test_a_large_body_is_not_taken_from_somebody_unknown(tmp_path: Path, edge: str, framing: str) -> None:
    async with (
        FakeEngine() as engine,
        admitting(keyed(tmp_path, [engine.url], server={"edge": edge})) as gate,
        connect(gate.host, gate.port) as client,
    ):
        await client.send(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{bearer(OTHER)}\r\n{framing}\r\n\r\n".encode())
        refused = await client.reply()  # though nothing of the body was sent
        assert (refused.status, refused.json["error"]["code"]) == (401, "invalid_api_key")
        assert gate.runtime.body_budget.used_bytes == 0
        answered = await ask(gate, body(padding="x" * 100_000), CHAT, bearer())
        assert answered.status == 200
