"""Several keys of one backend: which is used, when the next one is, and that none is ever shown.

The header that carries the key is the fake engine's own `x-fake`, so that a key says how the engine answers it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.config import ConfigError, Settings, load
from gateway.state import LocalSource, fleet_state
from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from loadtests.rawclient import CHAT
from routing.credential import Credentials
from routing.retry_budget import Ruling
from tests.support.http import ask, error_of
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])
STREAM = {**CHAT, "stream": True}
GOOD, ALSO_GOOD, THIRD = "chunks=2", "chunks=3", "chunks=4"


def with_keys(*keys: str, **backend: Any) -> dict[str, Any]:
    return {"hosted": True, "key_header": {"name": "x-fake", "scheme": ""}, "api_keys": list(keys), **backend}


def used(engine: FakeEngine) -> list[str]:
    """The keys that requests came with."""
    return [dict(each.headers)[b"x-fake"].decode() for each in engine.requests]


def ring(gateway: Serving) -> Credentials:
    credentials = gateway.runtime.fleet.pools["pool"].credentials
    assert credentials is not None
    return credentials


@EDGES
@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize("status", [401, 402, 403, 429])
async def test_a_refused_or_limited_key_gives_way_to_the_next(edge: str, body: dict[str, Any], status: int) -> None:
    bad = f"status={status};retry_after=60" if status == 429 else f"status={status}"
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], edge=edge, backend=with_keys(bad, GOOD))) as gateway,
    ):
        reply = await ask(gateway, body)
        assert (reply.status, reply.headers["x-tidegate-attempts"]) == (200, "2")
        assert used(engine) == [bad, GOOD]
        if status != 403:  # said of single requests too: three in a row put the key aside
            assert (await ask(gateway, body)).headers["x-tidegate-attempts"] == "1"
            assert used(engine)[2:] == [GOOD]


async def test_a_key_is_used_until_it_gives_way_and_not_in_turn() -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys(GOOD, ALSO_GOOD))) as gateway,
    ):
        for _ in range(10):
            await ask(gateway, CHAT)
        assert set(used(engine)) == {GOOD}
        ring(gateway).refused(time.monotonic(), 401, ring(gateway).keys[0])
        await ask(gateway, CHAT)
        ring(gateway).accepted(ring(gateway).keys[0])
        await ask(gateway, CHAT)
        assert used(engine)[10:] == [ALSO_GOOD] * 2


async def test_more_keys_than_attempts_are_all_tried() -> None:
    bad = [f"status=401;chunks={number}" for number in range(5)]
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys(*bad, GOOD))) as gateway,
    ):
        assert (await ask(gateway, CHAT)).status == 200
        assert used(engine) == [*bad, GOOD]


async def test_when_all_are_refused_that_is_said_and_nobody_is_asked() -> None:
    async with FakeEngine(ports=(0, 0)) as engine:
        keys = with_keys("status=401", "status=401;chunks=2")
        async with serving(settings_for(engine.urls, backend=keys)) as gateway:
            for _ in range(3):
                reply = await ask(gateway, CHAT)
                assert (reply.status, error_of(reply.body)["code"]) == (502, "upstream_auth_failed")
            assert len(engine.requests) == 2


async def test_when_all_are_limited_the_client_learns_when_the_first_is_not() -> None:
    async with FakeEngine() as engine:
        keys = with_keys("status=429;retry_after=200", "status=429;retry_after=100")
        async with serving(settings_for([engine.url], backend=keys)) as gateway:
            for sent in (2, 2):
                reply = await ask(gateway, CHAT)
                assert reply.status == 429
                assert 95 <= int(reply.headers["retry-after"]) <= 121
                assert len(engine.requests) == sent


async def test_a_limit_without_a_time_leaves_the_key_alone_for_a_moment() -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys("status=429", GOOD))) as gateway,
    ):
        for _ in range(5):
            assert (await ask(gateway, CHAT)).status == 200
        assert used(engine) == ["status=429", *[GOOD] * 5]


async def test_a_403_about_one_prompt_takes_no_key_away() -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys(GOOD, ALSO_GOOD))) as gateway,
    ):
        engine.script = Behaviour()
        (first, second) = ring(gateway).keys
        for _ in range(2):
            ring(gateway).refused(time.monotonic(), 403, first)
        assert (await ask(gateway, CHAT)).status == 200
        assert used(engine) == [GOOD]
        assert first.usable("m", time.monotonic())
        assert second.usable("m", time.monotonic())


async def test_a_burst_at_a_key_that_is_limited_moves_to_the_next_without_charge() -> None:
    limited = "status=429;retry_after=60;delay_head_s=0.1"
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys(limited, GOOD))) as gateway,
    ):
        replies = await asyncio.gather(*(ask(gateway, CHAT) for _ in range(60)))
        assert {reply.status for reply in replies} == {200}
        counts = gateway.runtime.fleet.pools["pool"].retries.counts
        assert counts[Ruling.REFUSED] == 0
        assert used(engine).count(GOOD) == 60


async def test_a_reload_keeps_what_is_known_of_keys_that_stay() -> None:
    async with FakeEngine() as engine:
        first = settings_for([engine.url], backend=with_keys("status=401", GOOD))
        async with serving(first) as gateway:
            await ask(gateway, CHAT)
            gateway.runtime.reload(settings_for([engine.url], backend=with_keys(THIRD, "status=401", GOOD)))
            states = [key.usable("m", time.monotonic()) for key in ring(gateway).keys]
            assert states == [True, False, True]
            assert [key.position for key in ring(gateway).keys] == [0, 1, 2]
            await ask(gateway, CHAT)
            assert used(engine)[-1] == GOOD, "the model stays with the key that has its prompts"
            gateway.runtime.reload(settings_for([engine.url], backend=with_keys(THIRD, "status=401")))
            await ask(gateway, CHAT)
            assert used(engine)[-1] == THIRD


async def test_questions_aside_go_with_a_key_that_works() -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys("status=401", GOOD))) as gateway,
    ):
        (upstream,) = gateway.runtime.fleet.upstreams()
        await upstream.side.get("/health")
        await ask(gateway, CHAT)
        await upstream.side.get("/health")
        asked_with = [dict(each.headers)[b"x-fake"].decode() for each in engine.probes]
        assert asked_with == ["status=401", GOOD]


async def test_operators_see_each_key_by_its_place() -> None:
    async with FakeEngine() as engine:
        backend = with_keys("status=401", "status=429;retry_after=50", GOOD)
        async with serving(settings_for([engine.url], backend=backend)) as gateway:
            await ask(gateway, CHAT)
            (pool,) = fleet_state(gateway.runtime, 0, time.monotonic())["pools"]
            assert [(key["position"], key["state"]) for key in pool["keys"]] == [
                (0, "refused"),
                (1, "limited"),
                (2, "usable"),
            ]
            assert 45 < pool["keys"][1]["limited_s"]["m"] <= 50
            assert pool["retries"]["refused"] == 0


async def test_no_key_is_printed_anywhere(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    canaries = ["sk-canary-one-5f3c", "sk-canary-two-9a71", "sk-canary-three-77e0"]
    async with FakeEngine() as engine:
        settings = settings_for([engine.url], backend={"hosted": True, "api_keys": canaries})
        async with serving(settings) as gateway:
            said: list[str] = []
            for failing in (
                Behaviour(
                    status=401, error_body='{"error":{"message":"Incorrect API key provided: sk-canary-one-5f3c"}}'
                ),
                Behaviour(status=429, retry_after="60"),
                Behaviour(status=403),
                Behaviour(),
            ):
                engine.script = failing
                for body in (CHAT, STREAM):
                    reply = await ask(gateway, body)
                    said += [reply.body.decode(), repr(reply.headers)]
            keys = gateway.runtime.fleet.pools["pool"].credentials
            state = fleet_state(gateway.runtime, 0, time.monotonic())
            metrics = await LocalSource(gateway.runtime).metrics()
            said += [repr(keys), repr(state), repr(settings), settings.model_dump_json(), repr(metrics)]
            said += [repr(upstream.__dict__.get("keys")) for upstream in gateway.runtime.fleet.upstreams()]
            said += [repr(record) for record in gateway.records]
            assert used_bearer(engine) >= set(canaries[:2]), "else nothing is shown by this"
    said += [record.getMessage() for record in caplog.records] + list(capsys.readouterr())
    for canary in canaries:
        assert not [text for text in said if canary in text]


def used_bearer(engine: FakeEngine) -> set[str]:
    return {dict(each.headers)[b"authorization"].decode().removeprefix("Bearer ") for each in engine.requests}


# -- the configuration

HEAD = "models: {m: {backend: pool}}\nbackends:\n  pool:\n    engine: openai\n    replicas: [{url: 'http://a'}]\n"


def loaded(folder: Path, text: str) -> Settings:
    path = folder / "tidegate.yaml"
    path.write_text(HEAD + text)
    return load(path, {"A": "sk-first", "B": "sk-second"})


def test_keys_are_read_from_wherever_each_is(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-a-file\n")
    settings = loaded(tmp_path, "    api_keys: [{env: A}, {file: key}]\n")
    keys = settings.backends["pool"].api_keys or ()
    assert [key.get_secret_value() for key in keys] == ["sk-first", "sk-from-a-file"]
    assert "sk-" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("    api_key: {env: A}\n    api_keys: [{env: B}]\n", ["api_keys", "backends.pool.api_key is given as well"]),
        ("    api_keys: []\n", ["api_keys"]),
        ("    api_keys: [{env: A}, {env: A}]\n", ["api_keys[1]", "the same key as [0]"]),
        ("    api_keys: [{env: A}, {env: NOT_THERE}]\n", ["api_keys[1].env", "NOT_THERE"]),
        ("    api_keys: [sk-written-out-in-full]\n", ["api_keys[0]", "wrong place"]),
        ("    retries: {share: 1.5}\n", ["retries.share"]),
        ("    retries: {attempts: 0}\n", ["retries.attempts"]),
    ],
)
def test_what_is_wrong_with_them_is_said_and_no_key_with_it(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    for word in words:
        assert word in str(caught.value)
    assert "sk-" not in str(caught.value)


async def test_a_limited_key_says_nothing_of_what_the_server_takes_with_the_next_one() -> None:
    limited, slow = "status=429;retry_after=60", "chunks=2;ttft_s=0.5"
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys(limited, slow))) as gateway,
    ):
        replies = await asyncio.gather(*(ask(gateway, CHAT) for _ in range(20)))
        assert {reply.status for reply in replies} == {200}
        (replica,) = gateway.runtime.fleet.pools["pool"].replicas
        assert replica.meter.capacity.requests is None
        again = await asyncio.gather(*(ask(gateway, CHAT) for _ in range(20)))
        assert {reply.status for reply in again} == {200}


async def test_a_prompt_that_is_forbidden_with_every_key_puts_none_aside() -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys("chunks=2", "chunks=3", "chunks=4"))) as gateway,
    ):
        forbidden = {**CHAT, "fake": {"status": 403}}
        for _ in range(6):
            assert (await ask(gateway, forbidden)).status == 502
        now = time.monotonic()
        assert all(now >= key.until for key in ring(gateway).keys)
        assert (await ask(gateway, CHAT)).status == 200


async def test_a_key_that_is_forbidden_what_another_may_is_put_aside() -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url], backend=with_keys("status=403", "status=403;chunks=3", GOOD))) as gateway,
    ):
        for _ in range(3):
            assert (await ask(gateway, CHAT)).status == 200
        now = time.monotonic()
        assert [now < key.until for key in ring(gateway).keys] == [True, True, False]
