"""`tidegate replicas`, `drain`, `undrain` and `adapters`: what they ask, what they say, and their exit codes."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.cli import main
from gateway.operate import print_table, state_of
from gateway.owner import stored_token
from loadtests.engine import FakeEngine
from tests.gateway.test_operations import configured, engines, watched
from tests.gateway.test_workers import ask, client, streams_under_way
from tests.support.command import serve_process

__all__ = ["client"]  # the fixture


class Operator:
    """Somebody at a terminal, who has the token and knows where the gateway is."""

    def __init__(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.url = url
        self._capsys = capsys
        self.out = ""
        self.err = ""

    async def run(self, *arguments: str) -> int:
        code = await asyncio.to_thread(main, [*arguments, "--url", self.url])
        self.out, self.err = self._capsys.readouterr()
        return code


@asynccontextmanager
async def operating(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, urls: list[str], **backend: Any
) -> AsyncIterator[tuple[str, Operator]]:
    """The URL of a gateway, and an operator of it."""
    async with watched(configured(urls, **backend)) as (gateway, admin):
        monkeypatch.setenv("TIDEGATE_ADMIN__TOKEN", admin.headers["authorization"].removeprefix("Bearer "))
        yield gateway.url, Operator(str(admin.base_url).rstrip("/"), capsys)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory without a token."""
    monkeypatch.delenv("TIDEGATE_ADMIN__TOKEN", raising=False)
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


# -- the commands


async def test_replicas_are_shown_in_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engines(2) as (first, second), operating(capsys, monkeypatch, [first.url, second.url]) as (_, operator):
        assert await operator.run("drain", "pool/pool-1") == 0
        assert operator.out == "pool/pool-1 gets no new work, and is empty\n"
        assert await operator.run("replicas") == 0
        head, *rows = [line.split("  ") for line in operator.out.splitlines()]
        assert head[0] == "REPLICA"
        assert [[cell.strip() for cell in row if cell][:2] for row in rows] == [
            ["pool/pool-0", "healthy"],
            ["pool/pool-1", "drained, empty"],
        ]
        assert await operator.run("replicas", "--json") == 0
        assert [each["replica"] for each in json.loads(operator.out)["replicas"]] == ["pool-0", "pool-1"]
        assert await operator.run("undrain", "pool/pool-1") == 0
        assert operator.out == "pool/pool-1 gets work again\n"


async def test_drain_waits_until_the_replica_is_empty(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, client: Any
) -> None:
    async with (
        engines(2, chunks=10, interval_s=0.1) as (first, second),
        operating(capsys, monkeypatch, [first.url, second.url]) as (url, operator),
    ):
        tasks = await streams_under_way(client, url, 2)
        assert first.running == 1
        assert await operator.run("drain", "pool/pool-0", "--wait", "0.05") == 1
        assert operator.err == (
            "pool/pool-0 is not empty after 0.05 s; it gets no new work; requests under way there: 1\n"
        )
        assert await operator.run("drain", "pool/pool-0", "--wait", "--json") == 0
        state = json.loads(operator.out)
        assert (state["draining"], state["in_flight"], state["empty"]) == (True, 0, True)
        assert first.running == 0
        assert all(answer.endswith("data: [DONE]\n\n") for answer in await asyncio.gather(*tasks))
        await ask(client, url, 4)
        assert len(first.requests) == 1
        assert await operator.run("undrain", "pool/pool-0", "--json") == 0
        assert json.loads(operator.out)["draining"] is False


async def test_waiting_ends_when_somebody_gives_the_replica_work_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, client: Any
) -> None:
    async with (
        engines(2, hang_mid=1) as (first, second),
        operating(capsys, monkeypatch, [first.url, second.url]) as (url, operator),
    ):
        tasks = await streams_under_way(client, url, 2)
        waiting = asyncio.create_task(operator.run("drain", "pool/pool-0", "--wait", "30"))
        other = Operator(operator.url, capsys)
        await other.run("replicas", "--json")
        async with asyncio.timeout(10):
            while not json.loads(other.out)["replicas"][0]["draining"]:
                await other.run("replicas", "--json")
        await other.run("undrain", "pool/pool-0")
        async with asyncio.timeout(15):  # long before its own time is over
            assert await waiting == 1
        for engine in (first, second):
            engine.drop_connections()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_last_replica_needs_force(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeEngine() as engine, operating(capsys, monkeypatch, [engine.url]) as (_, operator):
        assert await operator.run("drain", "pool/pool-0") == 1
        assert "pool/pool-0 is the last replica" in operator.err
        assert "with --force" in operator.err
        assert await operator.run("drain", "pool/pool-0", "--force") == 0


async def test_an_unknown_replica_is_answered_with_the_closest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeEngine() as engine, operating(capsys, monkeypatch, [engine.url]) as (_, operator):
        assert await operator.run("drain", "pool/pool-9", "--json") == 2
        assert "did you mean pool-0?" in operator.err
        assert "did you mean pool-0?" in json.loads(operator.out)["error"]


async def test_adapters_are_listed_loaded_and_unloaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        engines(2) as (first, second),
        operating(capsys, monkeypatch, [first.url, second.url], engine="sglang") as (_, operator),
    ):
        first.adapters, second.adapters = {}, {}
        assert await operator.run("adapters", "load", "pool", "team/a", "/adapters/a") == 0
        assert operator.out == "pool/pool-0  loaded\npool/pool-1  loaded\n"
        assert await operator.run("adapters", "load", "pool", "team/a", "/adapters/a", "--replica", "pool-1") == 0
        assert operator.out == "pool/pool-1  ok: it holds it already\n"
        assert await operator.run("adapters", "list") == 0
        assert operator.out.splitlines()[1].split() == ["pool", "team/a", "pool-0,pool-1", "no", "/adapters/a"]
        assert await operator.run("adapters", "list", "--pool", "pool", "--json") == 0
        assert json.loads(operator.out)["adapters"][0]["name"] == "team/a"
        assert await operator.run("adapters", "unload", "pool", "team/a", "--json") == 0
        assert json.loads(operator.out)["ok"]
        assert await operator.run("adapters", "unload", "pool", "team/a") == 2
        assert "no replica of 'pool' holds an adapter 'team/a'" in operator.err.lower()
        second.adapters = None
        assert await operator.run("adapters", "load", "pool", "b", "/adapters/b") == 1
        assert operator.out == "pool/pool-0  loaded\n"
        assert operator.err.startswith("pool/pool-1  not loaded: this SGLang has no /load_lora_adapter")
        assert await operator.run("adapters", "load", "pool", "c", "/missing", "--replica", "pool-1") == 1


def test_what_an_engine_or_a_client_has_named_does_not_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([("NAME", "PATH"), ("\x1b[2Jcleared", "a\nb"), ("abc\u202e", "ü")])
    assert capsys.readouterr().out.splitlines() == [
        "NAME            PATH",
        "\\x1b[2Jcleared  a\\nb",
        "abc\\u202e       ü",
    ]


# -- finding the gateway


async def test_a_gateway_is_found_by_its_configuration_and_the_kept_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with engines(2) as (first, second), serve_process(tmp_path, [first.url, second.url]) as gateway:
        await gateway.url()
        url = await gateway.admin_url()
        monkeypatch.setenv("TIDEGATE_STATE_DIR", str(gateway.state))
        config = tmp_path / "other.yaml"
        config.write_text(yaml.safe_dump({"admin": {"port": int(url.rpartition(":")[2])}, "models": "not yet right"}))
        assert await asyncio.to_thread(main, ["replicas", "--config", str(config)]) == 0
        assert "pool/pool-0" in capsys.readouterr().out
        monkeypatch.setenv("TIDEGATE_ADMIN__PORT", url.rpartition(":")[2])
        assert await asyncio.to_thread(main, ["drain", "pool/pool-0"]) == 0
        with tempfile.NamedTemporaryFile("w", suffix="-token") as file:
            file.write(gateway.token + "\n")
            file.flush()
            monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path / "nothing"))
            assert await asyncio.to_thread(main, ["replicas", "--token-file", file.name]) == 0
            assert await asyncio.to_thread(main, ["replicas"]) == 2
        assert not (tmp_path / "nothing").exists()  # a token is for the gateway to make
        assert gateway.token not in "".join(capsys.readouterr())


async def test_a_wrong_token_is_named_by_where_it_is_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    async with FakeEngine() as engine, operating(capsys, monkeypatch, [engine.url]) as (_, operator):
        monkeypatch.setenv("TIDEGATE_ADMIN__TOKEN", "x" * 40)
        assert await operator.run("replicas") == 2
        assert "refuses the owner token from admin.token" in operator.err
        monkeypatch.delenv("TIDEGATE_ADMIN__TOKEN")
        assert await operator.run("replicas") == 2
        assert f"there is no owner token in {state}" in operator.err
        assert "a gateway makes it when it first starts" in operator.err  # `tidegate fleet up` is often tried before
        token, path = stored_token({"TIDEGATE_STATE_DIR": str(state)})
        assert await operator.run("replicas") == 2
        assert f"refuses the owner token from {path}" in operator.err
        assert token.get_secret_value() not in operator.err


async def test_what_is_not_an_admin_listener_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeEngine() as engine, operating(capsys, monkeypatch, [engine.url]) as (url, _):
        clients = Operator(url, capsys)
        assert await clients.run("replicas") == 2
        assert "is not an admin listener of this version; its port is 7401" in clients.err
        other = Operator(engine.url, capsys)
        assert await other.run("replicas") == 2


def test_a_gateway_that_does_not_run_is_named(capsys: pytest.CaptureFixture[str], state: Path) -> None:
    stored_token({"TIDEGATE_STATE_DIR": str(state)})
    assert main(["replicas", "--url", "http://127.0.0.1:9", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("tidegate replicas: no gateway answers at http://127.0.0.1:9: ")
    assert "no gateway answers" in json.loads(out)["error"]


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:7401", "http://x:port", "http://x/path", "http://u:p@x"])
def test_a_url_that_cannot_be_asked(url: str) -> None:
    assert main(["replicas", "--url", url]) == 2


@pytest.mark.parametrize(
    ("admin", "said"),
    [
        ("{port: 0}", "the port is not known"),
        ("{port: many}", "1 problems"),
        ("{enabled: false}", "admin.enabled is false"),
        ("{token: {env: NOT_THERE}}", "the environment variable NOT_THERE is not set"),
        ("{token: written-into-the-file}", "a literal secret does not belong in this file"),
    ],
)
def test_an_admin_section_that_does_not_lead_there(
    tmp_path: Path, admin: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tidegate.yaml"
    path.write_text(f"admin: {admin}")
    assert main(["replicas", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "written-into" not in err
    assert main(["replicas", "--config", str(tmp_path / "missing.yaml")]) == 2


@pytest.mark.parametrize("content", ["", "two\nlines", "caf\u00e9", None])
def test_a_token_file_that_holds_none(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    assert main(["replicas", "--token-file", str(path)]) == 2
    assert f"--token-file {path}: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["drain", "pool-0"], ["drain", "a/b/c"], ["undrain", "/x"], ["adapters"]])
def test_a_command_line_that_cannot_be_meant(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_states_in_a_word_or_two() -> None:
    well: dict[str, Any] = {
        "draining": False,
        "empty": False,
        "unavailable_reason": None,
        "health": "warming",
        "workers": [],
    }
    assert state_of(well) == "warming"
    assert state_of({**well, "draining": True}) == "draining"
    assert state_of({**well, "draining": True, "empty": True}) == "drained, empty"
    assert state_of({**well, "unavailable_reason": "full"}) == "full"
    workers = [{"available": True}, {"available": False}]
    assert state_of({**well, "unavailable_reason": "full", "workers": workers}) == "full at some workers"
