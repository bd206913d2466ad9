"""Members that are wrong, late, from elsewhere or somebody else's: what they must not be able to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.discovery.member import Member
from gateway.config import load
from gateway.members import kept, service
from gateway.members.drains import Drains
from gateway.steering.files import OverrideFile
from gateway.steering.overrides import Book, Override
from gateway.steering.reading import ConfigReader
from loadtests.engine import FakeEngine
from loadtests.ports import free_port
from tests.gateway.members.test_members_served import CHAT, WITHIN_S, Side, side
from tests.support.redis_server import RedisServer

SECRET = "sk-abcdefghijklmnopqrstuvwxyz0123456789"


async def states(gateway: Side) -> dict[str, bool]:
    """Whether each replica is drained, as the first worker says."""
    worker = (await gateway.gateway.fleet(gateway.client))[0]
    return {each["name"]: each["draining"] for each in worker["pools"][0]["replicas"]}


async def until(gateway: Side, wanted: dict[str, bool], meanwhile: Callable[[], Any]) -> None:
    end = time.monotonic() + WITHIN_S + 20.0
    while (now := await states(gateway)) != wanted:
        assert time.monotonic() < end, now
        await meanwhile()
        await asyncio.sleep(0.3)


async def test_a_member_that_does_not_go_with_the_configuration_keeps_nobody_from_reading_it(tmp_path: Path) -> None:
    models = {"m": {"backend": "pool", "hedge": {}}}  # which no pool of hosted replicas alone may have
    async with FakeEngine() as engine, side(tmp_path, models=models) as gateway:
        refused = await gateway.admin("PUT", f"/admin/registrations/pool/{SECRET}", {"url": engine.url})
        assert refused.status_code == 400
        assert SECRET not in refused.text
        await gateway.register("rented", "http://127.0.0.1:9", engine="deepseek")
        await gateway.gateway.logged("pool: rented was found, and is left out: .*hedge")
        assert (await gateway.admin("POST", "/admin/reload")).status_code == 200
        await gateway.register("rented", "http://127.0.0.1:9", engine="deepseek")
        (shown,) = (await gateway.members())["members"]
        assert not shown["in_pool"]
        assert "hedge" in shown["refused"]
        await gateway.register("well", engine.url)
        await gateway.at_work({"well"})
        assert (await gateway.ask()).status_code == 200


async def test_a_pool_that_takes_no_registrations_any_more_loses_those_it_has(tmp_path: Path) -> None:
    async with FakeEngine() as engine, side(tmp_path) as gateway:
        await gateway.register("r", "http://127.0.0.1:9")
        await gateway.until({"r"})
        config = yaml.safe_load(gateway.gateway.config.read_text())
        config["backends"]["pool"] = {"engine": "openai", "replicas": [{"name": "fixed", "url": engine.url}]}
        gateway.gateway.config.write_text(yaml.safe_dump(config))
        assert (await gateway.admin("POST", "/admin/reload")).status_code == 200
        await gateway.until({"fixed"})


async def test_a_machine_of_one_team_neither_joins_another_teams_pool_nor_takes_its_replicas_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "token").write_text(token := "token-of-team-a-0123456789")
    pool = {"engine": "openai", "discovery": {"registration": {"ttl_s": 60}}}
    tokens = {"team-a": {"role": "registrar", "token": {"file": str(tmp_path / "token")}, "pools": ["a"]}}
    models = {"m": {"backend": "a"}, "n": {"backend": "b"}}
    backends = {"a": pool, "b": pool}
    async with side(tmp_path, backends=backends, models=models, admin={"port": 0, "tokens": tokens}) as gateway:

        async def as_team(method: str, where: str, body: Any = None) -> tuple[int, str]:
            url = f"{gateway.admin_url}/admin/{where}"
            answer = await gateway.client.request(method, url, json=body, headers={"authorization": f"Bearer {token}"})
            return answer.status_code, answer.json().get("error", {}).get("message", "")

        mine = {"url": "http://127.0.0.1:9"}
        assert (await gateway.admin("PUT", "/admin/registrations/b/theirs", mine)).status_code == 200
        assert (await as_team("PUT", "registrations/a/mine", mine))[0] == 200
        for method, name, body in (("PUT", "mine", mine), ("PUT", "theirs", mine), ("DELETE", "theirs", None)):
            status, message = await as_team(method, f"registrations/b/{name}", body)
            assert (status, "'b'" in message) == (403, True), message
        assert (await as_team("PUT", "agents/box", {"pools": {"b": {"launched": 1}}}))[0] == 403
        assert (await as_team("PUT", "agents/box", {"pools": {"a": {"launched": 1}}}))[0] == 200
        pools = (await gateway.admin("GET", "/admin/members")).json()["pools"]
        assert {each["pool"]: [one["name"] for one in each["members"]] for each in pools} == {
            "a": ["mine"],
            "b": ["theirs"],
        }
        assert (await as_team("DELETE", "registrations/a/mine"))[0] == 200


async def test_a_gateway_goes_by_its_own_networks_whatever_another_one_has_let_in(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with AsyncExitStack() as stack:
            both = []
            for name, networks in (("wide", ["127.0.0.0/8", "8.0.0.0/8"]), ("narrow", ["127.0.0.0/8"])):
                (tmp_path / name).mkdir()
                discovery = {"registration": {"networks": networks, "ttl_s": 60}}
                entered = side(tmp_path / name, store=redis.url, discovery=discovery)
                both.append(await stack.enter_async_context(entered))
            wide, narrow = both
            await wide.register("far", "http://8.8.8.8:1")
            await wide.register("near", "http://127.0.0.1:9")
            await narrow.until({"near"})
            shown = {each["name"]: each["refused"] for each in (await narrow.members())["members"]}
            assert shown["near"] is None
            assert "not in the networks" in shown["far"]


async def test_a_member_that_drains_leaves_an_operators_drain_alone(tmp_path: Path) -> None:
    async with FakeEngine() as engine, side(tmp_path, discovery={"registration": {"ttl_s": 60}}) as gateway:
        await gateway.register("r", engine.url)
        await gateway.register("other", "http://127.0.0.1:9")
        await gateway.until({"r", "other"})
        assert (await gateway.admin("POST", "/admin/replicas/pool/r/drain?force=true")).status_code == 200
        await gateway.register("r", engine.url, state="draining")
        await gateway.register("other", "http://127.0.0.1:9", state="draining")
        await gateway.gateway.logged("replica other is drained")
        await gateway.register("r", engine.url)
        await gateway.register("other", "http://127.0.0.1:9")
        await gateway.gateway.logged("replica other takes work again")
        assert await states(gateway) == {"r": True, "other": False}


async def test_a_drain_does_not_outlast_the_gateway_that_was_told_of_it(tmp_path: Path) -> None:
    with RedisServer() as redis:
        admin = {"port": free_port()}
        discovery = {"registration": {"ttl_s": 60}}
        async with side(tmp_path, admin=admin, store=redis.url, discovery=discovery) as gateway:
            await gateway.register("r", "http://127.0.0.1:9")
            await gateway.until({"r"})
            await gateway.register("r", "http://127.0.0.1:9", state="draining")
            await gateway.gateway.logged("replica r is drained")
            gateway.gateway.process.kill()
        async with side(tmp_path, admin=admin, store=redis.url, discovery=discovery) as gateway:
            await until(gateway, {"r": False}, lambda: gateway.register("r", "http://127.0.0.1:9"))


async def test_a_configured_replica_outlives_a_registration_at_its_address(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        pool = {
            "engine": "openai",
            "replicas": [{"name": "fixed", "url": engine.url}],
            "discovery": {"registration": {"ttl_s": 60}},
        }
        async with side(tmp_path, backends={"pool": pool}) as gateway:
            await gateway.register("again", engine.url, state="draining")
            await gateway.gateway.logged("replica fixed is drained")
            assert (await gateway.admin("DELETE", "/admin/registrations/pool/again")).json() == {"removed": True}
            await gateway.gateway.logged("replica fixed takes work again")
            assert (await gateway.client.post(f"{gateway.url}/v1/chat/completions", json=CHAT)).status_code == 200


async def test_what_is_kept_over_restarts_does_not_grow_old_while_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "tidegate.yaml"
    (tmp_path / "replicas.json").write_text('[{"url": "http://127.0.0.1:9"}]')
    pool = {"engine": "openai", "discovery": {"file": {"path": "replicas.json", "interval_s": 0.2}}}
    config.write_text(yaml.safe_dump({"models": {"m": {"backend": "pool"}}, "backends": {"pool": pool}}))
    monkeypatch.setattr(service, "SAVE_S", 0.1)
    monkeypatch.setattr(service, "SAVE_AGAIN_S", 0.5)
    monkeypatch.setattr(service, "LOOK_S", 0.1)
    reader = ConfigReader(config, {})
    reader()

    async def reload(read: Callable[[], Any]) -> Any:
        return read()

    settings = load(config, {})
    members = service.Members(lambda: settings, reader, reload, Drains([], lambda: settings), tmp_path)
    await members.start()
    try:
        told: set[float] = set()
        async with asyncio.timeout(WITHIN_S):
            while len(told) < 3:
                told |= {seen.told_unix_s for seen in kept.load(tmp_path)}
                await asyncio.sleep(0.1)
    finally:
        await members.aclose()
    (seen,) = kept.load(tmp_path)
    assert seen.members == [Member(url="http://127.0.0.1:9")]
    assert seen.told_unix_s >= max(told)


def test_an_override_of_a_replica_that_is_gone_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "tidegate.yaml"
    pool = {"engine": "openai", "discovery": {"registration": {}}}
    config.write_text(yaml.safe_dump({"models": {"m": {"backend": "pool"}}, "backends": {"pool": pool}}))
    file = OverrideFile(tmp_path / "state", config)
    override = Override(("backends", "pool", "replicas", "gone", "weight"), 2.0, "jo", 0.0)
    file.write(Book(overrides=(override,)))
    reader = ConfigReader(config, {}, file=file)
    for number in range(3):
        reader.found = lambda number=number: {"pool": [{"name": f"r{number}", "url": f"http://127.0.0.1:{9 + number}"}]}  # type: ignore[misc]
        reader()
    assert len([record for record in caplog.records if "changes nothing" in record.message]) == 1
