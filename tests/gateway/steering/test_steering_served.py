"""Overrides, reloads and shadows of a running gateway: real processes, one worker and two, under load."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from gateway.steering.files import OverrideFile
from gateway.steering.overrides import Change, changed
from loadtests.engine import FakeEngine
from tests.support.command import ServeProcess, serve_process

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello " * 400}]}
WEIGHT = "/admin/replicas/pool/pool-0/weight"
PRICED = {"price": {"input": 1.0, "output": 2.0}}


class Operator:
    """Somebody with the owner's token."""

    def __init__(self, gateway: ServeProcess, client: httpx2.AsyncClient, url: str) -> None:
        self.gateway = gateway
        self.client = client
        self.url = url

    async def ask(self, method: str, path: str, body: Any = None, version: int | None = None) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.gateway.token}"}
        if version is not None:
            headers["if-match"] = f'"{version}"'
        return await self.client.request(method, self.url + path, json=body, headers=headers, timeout=30)

    async def change(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """A write with the version that is now."""
        version = (await self.ask("GET", "/admin/overrides")).json()["version"]
        answer = await self.ask(method, path, body, version)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    async def weights(self) -> list[list[float]]:
        """Of each replica, as each worker has them."""
        workers = await self.gateway.fleet(self.client)
        return [[replica["weight"] for replica in worker["pools"][0]["replicas"]] for worker in workers]


@asynccontextmanager
async def steered(
    folder: Path, workers: int, engines: int = 2, environ: Mapping[str, str] | None = None, **sections: Any
) -> AsyncIterator[tuple[Operator, list[FakeEngine]]]:
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(FakeEngine()) for _ in range(engines)]
        urls = [each.url for each in fakes]
        gateway = await stack.enter_async_context(
            serve_process(folder, urls, "--workers", str(workers), environ=environ, **sections)
        )
        await gateway.url()
        client = await stack.enter_async_context(httpx2.AsyncClient(trust_env=False))
        yield Operator(gateway, client, await gateway.admin_url()), fakes


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_weight_reaches_all_workers_and_no_request_is_lost(tmp_path: Path, workers: int) -> None:
    async with steered(tmp_path, workers, models={"m": {"backend": "pool", "policy": "least_outstanding"}}) as (
        operator,
        _,
    ):
        url = await operator.gateway.url()
        stop = asyncio.Event()
        statuses: list[int] = []

        async def load() -> None:
            async with httpx2.AsyncClient(trust_env=False, timeout=30) as client:
                while not stop.is_set():
                    statuses.append((await client.post(f"{url}/v1/chat/completions", json=CHAT)).status_code)

        crowd = [asyncio.create_task(load()) for _ in range(4)]
        for weight in (3.0, 5.0, 0.5):
            told = await operator.change("PUT", WEIGHT, {"weight": weight})
            assert told["silent_workers"] == []
            assert await operator.weights() == [[weight, 1.0]] * workers
            policy = "round_robin" if weight == 5.0 else "cost"
            told = await operator.change("PUT", "/admin/models/m/policy", {"policy": policy})
            assert told["changed"][0]["after"] == policy
        told = await operator.change("DELETE", WEIGHT)
        assert await operator.weights() == [[1.0, 1.0]] * workers
        stop.set()
        await asyncio.gather(*crowd)
        assert set(statuses) == {200}
        assert len(statuses) > 20


async def test_overrides_survive_a_restart_and_are_restored(tmp_path: Path) -> None:
    async with steered(tmp_path, 2) as (operator, _):
        undo = (await operator.change("PUT", WEIGHT, {"weight": 4}))["undo"]
        file = next(operator.gateway.state.glob("overrides-*.json"))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    async with steered(tmp_path, 2) as (operator, _):
        assert await operator.weights() == [[4.0, 1.0]] * 2
        shown = (await operator.ask("GET", "/admin/overrides")).json()
        (one,) = shown["overrides"]
        assert (one["name"], one["value"], one["base"]) == ("backends.pool.replicas.pool-0.weight", 4.0, 1.0)
        assert (one["by"], one["in_force"]) == ("admin", True)
        await operator.change("PATCH", "/admin/overrides", undo)
        assert await operator.weights() == [[1.0, 1.0]] * 2
        restored = await operator.change("POST", "/admin/overrides/restore", {"version": shown["version"]})
        assert restored["version"] > shown["version"]
        assert await operator.weights() == [[4.0, 1.0]] * 2


async def test_neither_a_gone_replica_nor_a_broken_file_keeps_a_gateway_from_starting(tmp_path: Path) -> None:
    async with steered(tmp_path, 1) as (operator, _):
        await operator.change("PUT", "/admin/replicas/pool/pool-1/weight", {"weight": 4})
        await operator.change("PUT", WEIGHT, {"weight": 2})
    async with steered(tmp_path, 1, engines=1) as (operator, _):
        assert await operator.weights() == [[2.0]]
        shown = (await operator.ask("GET", "/admin/overrides")).json()["overrides"]
        assert [(each["in_force"], each["problem"]) for each in shown] == [
            (False, "the configuration has no such thing"),
            (True, None),
        ]
        await operator.change("DELETE", "/admin/replicas/pool/pool-1/weight")
        assert len((await operator.ask("GET", "/admin/overrides")).json()["overrides"]) == 1
        file = next(operator.gateway.state.glob("overrides-*.json"))
    file.write_text(file.read_text()[:-20])
    async with steered(tmp_path, 1, engines=1) as (operator, _):
        await operator.gateway.logged("the overrides in .* cannot be used")
        assert await operator.weights() == [[1.0]]
        assert len(list(operator.gateway.state.glob("overrides-*.broken-*"))) == 1
        await operator.change("PUT", WEIGHT, {"weight": 3})
        assert await operator.weights() == [[3.0]]


REFUSED: tuple[tuple[str, Any, int, str | None, str | None], ...] = (
    (WEIGHT, {"weight": -1}, 400, "invalid_override", "backends.pool.replicas[0].weight"),
    (WEIGHT, {"weight": "much"}, 400, None, None),
    (WEIGHT, {"wait": 1}, 400, None, None),
    ("/admin/replicas/pool/x/weight", {"weight": 2}, 404, "unknown_setting", "backends.pool.replicas.x.weight"),
    ("/admin/models/x/price", {"input": 2}, 404, "unknown_setting", "models.x.price"),
    ("/admin/models/m/price", {"input": -2}, 400, "invalid_override", "models.m.price.input"),
    ("/admin/models/m/policy", {"policy": "roud_robin"}, 400, "invalid_override", "models.m.policy"),
    ("/admin/models/m/policy", {"policy": "os:system"}, 400, "not_changeable", "models.m.policy"),
    ("/admin/models/m/shadow", {"policy": "os:system"}, 400, "not_changeable", "models.m.shadow"),
)
FORBIDDEN = (["server", "port"], ["admin", "token"], ["auth"], ["backends", "pool", "api_key"], ["models", "m"])


async def test_what_is_refused_changes_nothing_and_says_why(tmp_path: Path) -> None:
    async with steered(tmp_path, 1, engines=1) as (operator, _):
        first = await operator.ask("GET", "/admin/overrides")
        version = first.json()["version"]
        assert first.headers["etag"] == f'"{version}"'
        for path, body, status, code, param in REFUSED:
            error = await operator.ask("PUT", path, body, version)
            said = error.json()["error"]
            assert (error.status_code, said["code"], said["param"]) == (status, code, param), said
        for setting in FORBIDDEN:
            patch = {"set": [{"path": setting, "value": 1}]}
            answer = await operator.ask("PATCH", "/admin/overrides", patch, version)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_changeable")
        without = await operator.ask("PUT", WEIGHT, {"weight": 2})
        assert (without.status_code, without.json()["error"]["code"]) == (428, "version_required")
        assert (await operator.ask("GET", "/admin/overrides")).json() == first.json()
        done = await operator.ask("PUT", WEIGHT, {"weight": 2}, version)
        assert done.status_code == 200
        late = await operator.ask("PUT", WEIGHT, {"weight": 9}, version)
        assert (late.status_code, late.json()["error"]["code"]) == (412, "version_conflict")
        assert late.json()["error"]["version"] == done.json()["version"]
        assert await operator.weights() == [[2.0]]
        # Another gateway of this user serves the same file, and has been quicker.
        other = OverrideFile(operator.gateway.state, operator.gateway.config)
        weight = ("backends", "pool", "replicas", "pool-0", "weight")
        other.write(changed(other.read(), Change({weight: 7.0}), "jo", 1.0, "elsewhere"))
        behind = await operator.ask("PUT", WEIGHT, {"weight": 9}, done.json()["version"])
        assert behind.status_code == 412
        assert await operator.weights() == [[7.0]]
        shown = (await operator.ask("GET", "/admin/overrides")).json()
        assert (shown["version"], shown["overrides"][0]["by"]) == (behind.json()["error"]["version"], "jo")


async def test_the_audit_says_so_when_a_change_could_not_be_kept(tmp_path: Path) -> None:
    async with steered(tmp_path, 1) as (operator, _):
        await operator.change("PUT", WEIGHT, {"weight": 2})
        (kept,) = (tmp_path / "state").glob("overrides-*.json")
        lock = kept.with_suffix(".lock")
        lock.unlink()
        lock.mkdir()
        refused = await operator.ask("PUT", WEIGHT, {"weight": 3}, 1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_state_directory")
        last, before, *_ = (await operator.ask("GET", "/admin/audit")).json()["data"]
        assert (before["action"], before["diff"]["version"]) == ("config.override", 2)
        assert (last["action"], last["object"], last["diff"]) == (
            "config.override_failed",
            before["object"],
            {"version": 2},
        )
        assert await operator.weights() == [[2, 1]]


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_reload_tells_what_has_changed(tmp_path: Path, workers: int) -> None:
    async with steered(tmp_path, workers, engines=1) as (operator, _):
        await operator.change("PUT", WEIGHT, {"weight": 4})
        config = operator.gateway.config
        content = yaml.safe_load(config.read_text())
        content["models"]["m"]["policy"] = "round_robin"
        content["server"]["max_header_s"] = 7
        content["server"]["max_body_bytes"] = 4096
        del content["server"]["max_header_s"]
        config.write_text(yaml.safe_dump(content))
        # A change of a weight does not take in what is being edited.
        told = await operator.change("PUT", WEIGHT, {"weight": 6})
        assert [each["name"] for each in told["changed"]] == ["backends.pool.replicas.pool-0.weight"]
        assert (await operator.ask("GET", "/admin/policies")).json()["models"][0]["policy"] == "cost"
        answer = (await operator.ask("POST", "/admin/reload")).json()
        (changed,) = answer["changed"]
        line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "policy" in text)
        assert changed == {
            "path": "models.m.policy",
            "before": "cost",
            "after": "round_robin",
            "origin": "file",
            "where": f"{config}:{line}",
        }
        assert answer["needs_restart"] == ["server.max_body_bytes"]
        assert await operator.weights() == [[6.0]] * workers
        rows = {row["path"]: row for row in (await operator.ask("GET", "/admin/settings")).json()["settings"]}
        assert rows["backends.pool.replicas[0].weight"]["origin"] == "override"
        assert rows["server.max_body_bytes"]["waits_for_restart"] is True
        assert rows["admin.token"]["value"] in (None, "not set")
        config.write_text(config.read_text() + "\nmodls: {}\n")
        refused = await operator.ask("POST", "/admin/reload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "configuration_unusable")
        (problem,) = refused.json()["error"]["problems"]
        assert (problem["path"], problem["line"]) == ("modls", len(config.read_text().splitlines()))
        assert (await operator.ask("GET", "/admin/policies")).json()["models"][0]["policy"] == "round_robin"


async def test_a_shadow_decides_too_at_all_workers_and_sends_nothing(tmp_path: Path) -> None:
    async with steered(tmp_path, 2) as (operator, engines):
        await operator.change("PUT", "/admin/models/m/shadow", {"policy": "round_robin", "per_s": 1000})
        url = await operator.gateway.url()
        for _ in range(20):
            assert (await operator.client.post(f"{url}/v1/chat/completions", json=CHAT)).status_code == 200
        policies = (await operator.ask("GET", "/admin/policies")).json()
        shadow = policies["models"][0]["shadow"]
        numbers = shadow["numbers"]
        assert numbers["compared"] == 20
        assert numbers["same"] + numbers["other"] == 20
        assert sum(numbers["would_go"].values()) == 20
        assert 8 <= numbers["would_go"]["pool-0"] <= 12
        assert sum(len(engine.requests) for engine in engines) == 20
        assert shadow["cached_share"]["real"] > 0.5 > 0 < shadow["ttft_ms"]["real"]
        metrics = (await operator.ask("GET", "/metrics")).text
        assert 'tidegate_shadow_decisions_total{model="m",policy="round_robin",result="same"' in metrics
        assert policies["models"][0]["recent_requests"] == 20
        told = await operator.change("DELETE", "/admin/models/m/shadow")
        assert told["changed"][0]["after"] is None
        assert (await operator.ask("GET", "/admin/policies")).json()["models"][0]["shadow"] is None


async def test_policies_are_compared_on_recent_requests_of_all_workers(tmp_path: Path) -> None:
    async with steered(tmp_path, 2) as (operator, _):
        assert (await operator.ask("GET", "/admin/policies/compare")).status_code == 404
        unknown = await operator.ask("POST", "/admin/policies/compare", {"model": "m", "policies": ["os:system"]})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "policies")
        few = await operator.ask("POST", "/admin/policies/compare", {"model": "m"})
        assert few.status_code == 202
        assert (await compared(operator))["error"].startswith("only 0 answered requests")
        url = await operator.gateway.url()
        for number in range(60):
            chat = {**CHAT, "messages": [{"role": "user", "content": f"{number % 6} " + "words " * 600}]}
            assert (await operator.client.post(f"{url}/v1/chat/completions", json=chat)).status_code == 200
        order = {"model": "m", "policies": ["cost", "round_robin"], "requests": 60}
        job = (await operator.ask("POST", "/admin/policies/compare", order)).json()
        assert (job["state"], job["of"]) == ("running", 6)
        again = await operator.ask("POST", "/admin/policies/compare", order)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "comparison_running")
        done = await compared(operator)
        assert (done["state"], done["error"], done["requests"]) == ("done", None, 60)
        rates = {policy: figures["hit_rate"]["mean"] for policy, figures in done["result"].items()}
        assert rates["cost"] > 0.5
        assert rates["cost"] >= rates["round_robin"]
        assert done["result"]["cost"]["ttft_p99_ms"]["least"] > 0
        assert any("60 requests are few" in each for each in done["caveats"])
        assert "words" not in json.dumps(done)
        await operator.ask("POST", "/admin/policies/compare", order)
        assert (await operator.ask("DELETE", "/admin/policies/compare")).json()["state"] == "cancelled"


async def compared(operator: Operator) -> dict[str, Any]:
    """The comparison that was begun, once it has ended."""
    async with asyncio.timeout(60):
        while True:
            job: dict[str, Any] = (await operator.ask("GET", "/admin/policies/compare")).json()
            if job["state"] != "running":
                return job
            await asyncio.sleep(0.05)


async def test_roles_decide_who_may_change_what_and_the_audit_knows_of_it(tmp_path: Path) -> None:
    tokens = {role: f"a-token-for-the-{role}-of-this-test" for role in ("reader", "operator")}
    admin = {"port": 0, "tokens": {f"the-{role}": {"role": role, "token": {"env": role.upper()}} for role in tokens}}
    environ = {role.upper(): token for role, token in tokens.items()}
    async with steered(tmp_path, 1, engines=1, environ=environ, admin=admin) as (owner, _):

        async def ask(role: str, method: str, path: str, body: Any = None) -> tuple[int, str | None]:
            headers = {"authorization": f"Bearer {tokens[role]}"}
            version = (await owner.client.get(f"{owner.url}/admin/overrides", headers=headers)).json()["version"]
            headers["if-match"] = f'"{version}"'
            answer = await owner.client.request(method, owner.url + path, json=body, headers=headers)
            return answer.status_code, answer.json().get("error", {}).get("code")

        refused, done = (403, "role_required"), (200, None)
        assert await ask("reader", "GET", "/admin/settings") == done
        assert await ask("reader", "PUT", WEIGHT, {"weight": 2}) == refused
        assert await ask("reader", "POST", "/admin/reload") == refused
        assert await ask("operator", "PUT", WEIGHT, {"weight": 2}) == done
        assert await ask("operator", "PUT", "/admin/models/m/price", {"input": 1}) == refused
        price = {"set": [{"path": ["models", "m", "price"], "value": {"input": 1}}]}
        assert await ask("operator", "PATCH", "/admin/overrides", price) == refused
        await owner.change("PATCH", "/admin/overrides", price)
        assert await ask("operator", "DELETE", "/admin/overrides") == refused  # a price is among them
        assert await ask("operator", "POST", "/admin/overrides/restore", {"version": 1}) == refused
        assert await ask("operator", "POST", "/admin/reload") == done
        shown = (await owner.ask("GET", "/admin/overrides")).json()["overrides"]
        assert [each["by"] for each in shown] == ["token:the-operator", "admin"]
        entries = (await owner.ask("GET", "/admin/audit")).json()["data"]
        noted = next(each for each in entries if "weight" in each["object"])
        assert (noted["actor"], noted["action"]) == ("token:the-operator", "config.override")
        change = noted["diff"]["backends.pool.replicas.pool-0.weight"]
        assert (change["before"], change["after"]) == (1.0, 2)
