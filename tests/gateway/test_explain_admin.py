"""`POST /admin/explain`: read as the request itself would be, without a trace of it, and without its text."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from gateway.admin.app import MAX_QUESTION_BYTES, admin_app, private_app
from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.sources import RemoteSource, Source
from gateway.state import LocalSource
from gateway.templates import ExactPrompt, ExactPrompts
from loadtests.engine import FakeEngine
from routing.explain import replay
from routing.policies import POLICY_NAMES, make_policy
from tests.gateway.admission.keyed import keyed, static
from tests.gateway.test_admin import BEARER, TOKEN, served
from tests.gateway.test_workers import client
from tests.support.command import run_tidegate, serve_process
from tests.support.http import ask
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
CANARY = "canary-5f1e7a"
LONG = f"{CANARY} " + "all work and no play makes a dull prompt. " * 200
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "system", "content": LONG}, {"role": "user", "content": f"hi {CANARY}"}],
    "prompt_cache_key": f"thread {CANARY}",
    "max_tokens": 40,
}
NOBODY = "http://127.0.0.1:9"

__all__ = ["client"]  # the fixture


@asynccontextmanager
async def explained(settings: Settings) -> AsyncIterator[tuple[Serving, httpx2.AsyncClient]]:
    """A gateway with its own policies, and a client of its admin listener."""
    async with serving(settings, own_policies=True) as gateway:
        app = admin_app([LocalSource(gateway.runtime)], host="127.0.0.1", token=SecretStr(TOKEN))
        async with served(app) as admin:
            admin.headers.update(BEARER)
            yield gateway, admin


async def answer(admin: httpx2.AsyncClient, question: Any, status: int = 200) -> dict[str, Any]:
    reply = await admin.post("/admin/explain", json=question)
    assert reply.status_code == status, reply.text
    assert status != 200 or reply.headers["cache-control"] == "no-store"
    assert CANARY not in reply.text
    told: dict[str, Any] = reply.json()
    return told


async def test_what_is_explained_is_what_happens_then() -> None:
    async with (
        FakeEngine(chunks=2) as first,
        FakeEngine(chunks=2) as second,
        explained(settings_for([first.url, second.url])) as (gateway, admin),
    ):
        reply = await ask(gateway, CHAT)
        told = await answer(admin, CHAT)
        assert told["replica"] == reply.headers["x-tidegate-replica"]
        assert (told["policy"], told["reason"], told["pool"]) == ("cost", "warm", "pool")
        assert told["candidates"][0]["replica"] == told["replica"]
        assert {"round_trip", "wait", "prefill", "decode"} <= set(told["candidates"][0]["terms_ms"])
        again = await ask(gateway, CHAT)
        assert again.headers["x-tidegate-replica"] == told["replica"]
        assert int(again.headers["x-tidegate-predicted-cached-tokens"]) == told["predicted_cached_tokens"] > 1000
        assert again.headers["x-tidegate-route-reason"] == told["reason"]


async def test_explaining_leaves_no_trace() -> None:
    async with (
        FakeEngine(chunks=2) as engine,
        explained(settings_for([engine.url, NOBODY])) as (gateway, admin),
    ):
        await ask(gateway, CHAT)
        await gateway.settled(1)
        before = await LocalSource(gateway.runtime).fleet()
        metrics = (await admin.get("/metrics")).text
        for _ in range(3):
            await answer(admin, CHAT)
        after = await LocalSource(gateway.runtime).fleet()
        assert after == before
        assert len(gateway.records) == 1
        assert len(engine.requests) == 1
        kept = ("tidegate_requests_total", "tidegate_route_decisions_total", "tidegate_tokens_total")
        now = (await admin.get("/metrics")).text
        assert [line for line in now.splitlines() if line.startswith(kept)] == [
            line for line in metrics.splitlines() if line.startswith(kept)
        ]


@pytest.mark.parametrize("policy", POLICY_NAMES)
async def test_an_answer_can_be_replayed_whatever_the_policy(policy: str) -> None:
    models = {"m": {"backend": "pool", "policy": policy}}
    async with (
        FakeEngine(chunks=2) as engine,
        explained(settings_for([engine.url], models=models)) as (gateway, admin),
    ):
        await ask(gateway, CHAT)
        told = await answer(admin, CHAT)
        assert (told["policy"], told["replica"]) == (policy, "pool-0")
        assert replay(told, make_policy)["replica"] == told["replica"]


async def test_the_other_paths_and_headers_are_explained_in_a_wrapper() -> None:
    replicas = [{"url": NOBODY, "region": "eu"}, {"url": NOBODY + "9", "region": "us"}]
    async with explained(settings_for([], backend={"replicas": replicas})) as (_, admin):
        body = {"model": "m", "prompt": LONG}
        for region, name in (("eu", "pool-0"), ("us", "pool-1")):
            question = {"path": "/v1/completions", "body": body, "headers": {"X-Tidegate-Region": region}}
            told = await answer(admin, question)
            assert (told["path"], told["replica"]) == ("/v1/completions", name)
            assert [each["reason"] for each in told["excluded"]] == ["region"]
            assert told["request"]["regions"] == [region]
        told = await answer(admin, {"path": "/v1/embeddings", "body": {"model": "m", "input": [LONG, CANARY]}})
        assert told["request"]["prompt_tokens"] > 1000
        told = await answer(admin, {"body": CHAT, "headers": {"x-tidegate-region": "asia"}})
        assert told["replica"] is None
        assert (told["refusal"]["status"], told["refusal"]["code"]) == (403, "data_residency_mismatch")
        assert [each["reason"] for each in told["excluded"]] == ["region", "region"]


async def test_what_nobody_can_take_says_what_the_client_would_get() -> None:
    async with explained(settings_for([NOBODY])) as (gateway, admin):
        gateway.runtime.fleet.pools["pool"].replicas[0].draining = True
        told = await answer(admin, CHAT)
    assert (told["replica"], told["reason"]) == (None, "none_available")
    assert (told["refusal"]["status"], told["refusal"]["code"]) == (503, "no_replica_available")
    assert told["excluded"] == [{"replica": "pool-0", "region": None, "reason": "draining"}]


@pytest.mark.parametrize(
    ("question", "status", "code", "param"),
    [
        ({**CHAT, "model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"body": {**CHAT, "model": "gpt-9"}}, 404, "model_not_found", "model"),
        ({"messages": [CANARY]}, 400, "missing_model", "model"),
        ({"body": [CANARY]}, 400, "invalid_json", None),
        ([CANARY], 400, "invalid_json", None),
        ({**CHAT, "stream": "yes"}, 400, "invalid_type", "stream"),
        ({"body": CHAT, "path": "/v1/messages"}, 400, "invalid_type", "path"),
        ({"body": CHAT, "path": None}, 400, "invalid_type", "path"),
        ({"body": CHAT, "headers": [CANARY]}, 400, "invalid_type", "headers"),
        ({"body": CHAT, "headers": {"x-a": 1}}, 400, "invalid_type", "headers"),
        ({"body": CHAT, "headers": {"x-a": "a\nb"}}, 400, "invalid_type", "headers"),
        ({"body": CHAT, "headers": {"x-a": "\u20ac"}}, 400, "invalid_type", "headers"),
        ({"body": CHAT, "headers": {"Authorization": f"Bearer {CANARY}"}}, 400, "invalid_type", "headers"),
        ({"body": CHAT, "headers": {"x-tidegate-region": ""}}, 400, "invalid_header", "x-tidegate-region"),
        ({"body": CHAT, "key": 7}, 400, "invalid_type", "key"),
        ({"body": CHAT, "key": "a", "tenant": "b"}, 400, "invalid_type", "tenant"),
        ({"body": CHAT, "keys": "a"}, 400, "invalid_type", "keys"),
        ({"body": CHAT, "key": "key_nobody"}, 404, "unknown_key", "key"),
        ({"body": CHAT, "tenant": "nobody"}, 404, "unknown_tenant", "tenant"),
    ],
)
async def test_errors_are_those_that_the_request_would_get(
    question: Any, status: int, code: str, param: str | None
) -> None:
    async with explained(settings_for([NOBODY])) as (_, admin):
        error = (await answer(admin, question, status))["error"]
    assert (error["code"], error["param"]) == (code, param)


async def test_an_empty_body_is_refused() -> None:
    async with explained(settings_for([NOBODY])) as (_, admin):
        assert (await admin.post("/admin/explain")).status_code == 400


async def test_large_requests_are_explained_and_larger_ones_refused() -> None:
    async with explained(settings_for([NOBODY])) as (_, admin):
        large = {"model": "m", "messages": [{"role": "user", "content": CANARY * 400_000}]}
        assert (await answer(admin, large))["request"]["prompt_tokens"] > 1_000_000
        refused = await admin.post("/admin/explain", content=bytes(MAX_QUESTION_BYTES + 1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")


async def test_keys_and_tenants_are_explained_with_what_they_may(tmp_path: Path) -> None:
    """Permissions, regions and the class are those of the key, which is named by its id."""
    replicas = [{"url": NOBODY, "region": "eu"}, {"url": NOBODY + "9", "region": "us"}]
    keys = [
        static("locked", "tgk-locked-key-of-sufficient-length", tenant="acme", regions=["us"], **{"class": "batch"}),
        static("narrow", "tgk-narrow-key-of-sufficient-length", models=[]),
    ]
    settings = keyed(tmp_path, [], *keys, backend={"replicas": replicas})
    async with explained(settings) as (gateway, admin):
        await gateway.runtime.admission.start()
        told = await answer(admin, {"body": CHAT, "key": "static:locked"})
        assert (told["key"], told["tenant"], told["class"]) == ("static:locked", "acme", "batch")
        assert (told["replica"], told["request"]["priority"]) == ("pool-1", 2)
        asked = {"body": CHAT, "key": "static:locked", "headers": {"x-tidegate-region": "eu"}}
        assert (await answer(admin, asked, 403))["error"]["code"] == "data_residency_mismatch"
        error = (await answer(admin, {"body": CHAT, "key": "static:narrow"}, 403))["error"]
        assert (error["code"], error["param"]) == ("model_not_allowed", "model")
        told = await answer(admin, {"body": CHAT, "tenant": "acme"})
        assert (told["key"], told["tenant"], told["excluded"]) == (None, "acme", [])
        assert (await answer(admin, CHAT))["tenant"] == "default"
        assert (await answer(admin, {"body": CHAT, "key": "static:gone"}, 404))["error"]["code"] == "unknown_key"


async def test_a_key_that_is_not_valid_any_more_is_not_known(tmp_path: Path) -> None:
    async with explained(keyed(tmp_path, [NOBODY])) as (gateway, _):
        await gateway.runtime.admission.start()
        directory = gateway.runtime.gate.directory
        assert directory is not None
        found = directory.principal("static:ci", time.time())
        assert found is not None
        assert found.key_id == "static:ci"
        assert directory.principal("static:ci", float("inf")) is None


async def test_what_the_spill_would_do_is_told_without_doing_it() -> None:
    spill = {
        "backend": "rented",
        "price": {"input": 1.0, "output": 2.0},
        "usd_per_hour": 5.0,
        "usd_per_day": 5.0,
    }
    settings = settings_for(
        [],
        models={"m": {"backend": "pool", "spill": spill}, "home": {"backend": "pool"}},
        backends={
            "pool": {"engine": "openai", "replicas": [{"url": NOBODY}]},
            "rented": {"engine": "openai", "hosted": True, "replicas": [{"url": NOBODY + "9", "region": "us"}]},
        },
    )
    async with explained(settings) as (gateway, admin):
        assert (await answer(admin, {**CHAT, "model": "home"}))["spill"] is None
        stays = (await answer(admin, CHAT))["spill"]
        assert (stays["leaves"], stays["reason"], stays["explanation"]) == (False, "on_target", None)
        (replica,) = gateway.runtime.fleet.pools["pool"].replicas
        replica.work.queue(1_000_000_000, time.monotonic())
        for leaves in [(await answer(admin, CHAT))["spill"] for _ in range(3)]:
            assert (leaves["leaves"], leaves["reason"]) == (True, "predicted_wait")
            assert leaves["own_ttft_ms"] > leaves["ttft_target_ms"]
            assert leaves["most_usd"] > 0
            assert (leaves["explanation"]["pool"], leaves["explanation"]["replica"]) == ("rented", "rented-0")
        # Near its target it would leave too, had one before it left: the questions do not count as that.
        replica.work.unqueue(1_000_000_000, time.monotonic())
        near = int(0.95 * stays["ttft_target_ms"] / replica.speed.prefill_ms)
        replica.work.queue(near, time.monotonic())
        stays = (await answer(admin, CHAT))["spill"]
        assert 0.8 < stays["own_ttft_ms"] / stays["ttft_target_ms"] < 1.2
        assert (stays["leaves"], stays["reason"]) == (False, "on_target")
        replica.work.queue(1_000_000_000, time.monotonic())
        locked = {"body": CHAT, "headers": {"x-tidegate-region": "eu"}}
        assert (await answer(admin, locked))["spill"]["reason"] == "residency"
        flexible = (await answer(admin, {**CHAT, "service_tier": "flex"}))["spill"]
        assert flexible["reason"] == "may_not_leave"
        replica.draining = True
        told = await answer(admin, CHAT)
        assert (told["spill"]["reason"], told["spill"]["own_ttft_ms"]) == ("own_unavailable", None)
        text = (await admin.get("/metrics")).text
        assert "tidegate_spill_total{" not in text
        assert "tidegate_spill_kept_total{" not in text
        assert 'tidegate_spill_window_usd{model="m",window="hour",worker="0"} 0.0' in text


async def test_a_remote_worker_explains_as_a_local_one_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    uds = str(tmp_path_factory.mktemp("s") / "w.sock")
    question = json.dumps(CHAT).encode()
    async with serving(settings_for([NOBODY]), own_policies=True) as gateway:
        local = LocalSource(gateway.runtime, index=1)
        async with served(private_app([local]), uds):
            remote = RemoteSource(1, uds)
            here, there = await local.explain(question), await remote.explain(question)
            assert here.keys() == there.keys()
            assert (there["worker"], there["replica"]) == (1, "pool-0")
            with pytest.raises(GatewayError) as refused:
                await remote.explain(b'{"model":"gpt-9"}')
            assert (refused.value.status, refused.value.param) == (404, "model")


async def test_the_first_worker_that_answers_is_asked(tmp_path_factory: pytest.TempPathFactory) -> None:
    nowhere = str(tmp_path_factory.mktemp("s") / "none.sock")
    async with serving(settings_for([NOBODY]), own_policies=True) as gateway:
        sources: list[Source] = [RemoteSource(0, nowhere), LocalSource(gateway.runtime, index=1)]
        async with served(private_app(sources)) as admin:
            assert (await answer(admin, CHAT))["worker"] == 1
        async with served(private_app(sources[:1])) as admin:
            assert (await answer(admin, CHAT, 503))["error"]["code"] == "no_worker_answers"


async def test_two_workers_explain_through_their_parent(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with (
        FakeEngine(chunks=2) as engine,
        serve_process(tmp_path, [engine.url, NOBODY], "--workers", "2") as gateway,
    ):
        url = f"{await gateway.admin_url()}/admin/explain"
        await gateway.url()
        headers = {"authorization": f"Bearer {gateway.token}"}
        reply = await client.post(url, json=CHAT, headers=headers)
        assert reply.status_code == 200, reply.text
        told = reply.json()
        assert {each["name"] for each in told["state"]} == {"pool-0", "pool-1"}
        assert replay(told, make_policy)["replica"] == told["replica"]
        assert CANARY not in reply.text
        refused = await client.post(url, json={**CHAT, "model": "gpt-9"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        assert (await client.post(url, json=CHAT)).status_code == 401
        file = tmp_path / "request.json"
        file.write_text(json.dumps(CHAT))
        environ = {"TIDEGATE_STATE_DIR": str(gateway.state)}
        where = ("--url", await gateway.admin_url())
        code, out, err = await run_tidegate("explain", str(file), *where, environ=environ)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].startswith(f"{told['replica']} (cost, ") or "drawn from 2" in out
        assert not any(CANARY in text for text in (out, *gateway.log))


async def test_a_long_prompt_that_a_tokenizer_reads_does_not_hold_the_event_loop() -> None:
    threads: list[int] = []

    def encode(text: str, special: bool) -> list[int]:
        threads.append(threading.get_ident())
        return list(text.encode())

    async with explained(settings_for([NOBODY])) as (gateway, admin):
        gateway.runtime.fleet.models["m"].reader.exact = ExactPrompts({"m": ExactPrompt(encode, None)})
        for prompt, in_a_thread in (("short", False), ("long " * 4000, True)):
            asked = {"body": {"model": "m", "prompt": prompt}, "path": "/v1/completions"}
            assert (await answer(admin, asked))["request"]["prompt_tokens"] == len(prompt)
            assert (threads.pop() != threading.get_ident()) is in_a_thread
