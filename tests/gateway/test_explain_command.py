"""`tidegate explain`: what it asks, what it prints, its exit codes, and replay without a gateway."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.admin.app import admin_app
from gateway.cli import main
from gateway.config import Settings
from gateway.state import LocalSource
from tests.gateway.admission.keyed import keyed, static
from tests.gateway.test_admin import TOKEN, served
from tests.gateway.test_operate import Operator
from tests.support.serving import Serving, serving, settings_for

LOOPS = ("uvloop",)
CANARY = "canary-77b0"
NOBODY = "http://127.0.0.1:9"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": f"\u00e4rger {CANARY} " * 100}]}
REPLICAS = [{"url": NOBODY, "region": "eu"}, {"url": NOBODY + "9", "region": "us"}, {"url": NOBODY + "8"}]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner token is in the environment, and nowhere else."""
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("TIDEGATE_ADMIN__TOKEN", TOKEN)


@pytest.fixture
def request_file(tmp_path: Path) -> str:
    file = tmp_path / "request.json"
    file.write_text(json.dumps(CHAT, ensure_ascii=False))
    return str(file)


@asynccontextmanager
async def explaining(
    capsys: pytest.CaptureFixture[str], settings: Settings | None = None
) -> AsyncIterator[tuple[Serving, Operator]]:
    settings = settings or settings_for([], backend={"replicas": REPLICAS})
    async with serving(settings, own_policies=True) as gateway:
        app = admin_app([LocalSource(gateway.runtime)], host="127.0.0.1", token=SecretStr(TOKEN))
        async with served(app) as admin:
            yield gateway, Operator(str(admin.base_url).rstrip("/"), capsys)


async def told(operator: Operator, *arguments: str) -> dict[str, Any]:
    assert await operator.run("explain", "--json", *arguments) == 0, operator.err
    assert CANARY not in operator.out
    found: dict[str, Any] = json.loads(operator.out)
    return found


async def test_a_table_says_who_was_considered_who_was_not_and_who_it_is(
    capsys: pytest.CaptureFixture[str], request_file: str
) -> None:
    async with explaining(capsys) as (gateway, operator):
        first, _, third = gateway.runtime.fleet.pools["pool"].replicas
        first.work.queue(5000, time.monotonic())
        third.draining = True
        assert await operator.run("explain", request_file) == 0
    head, *rows, excluded, decision = operator.out.splitlines()
    assert head.split()[:5] == ["REPLICA", "REGION", "CACHED", "COST", "TTFT"]
    assert {"WAIT", "PREFILL", "DECODE"} <= set(head.split())
    assert "SESSION" not in head
    assert [row.split()[:3] for row in rows] == [["pool-1", "us", "0"], ["pool-0", "eu", "0"]]
    assert len({len(row.split()) for row in rows}) == 1
    assert excluded == "pool-2  excluded: draining"
    assert decision.startswith("pool-1 (cost, cold): 0 of ")
    assert " ms" in decision
    assert CANARY not in operator.out


async def test_about_equal_replicas_are_said_to_be_drawn(capsys: pytest.CaptureFixture[str], request_file: str) -> None:
    async with explaining(capsys) as (_, operator):
        assert await operator.run("explain", request_file) == 0
    assert "drawn from 3 that are about equal" in operator.out.splitlines()[-1]


async def test_the_options_say_how_it_would_be_sent(
    capsys: pytest.CaptureFixture[str], request_file: str, tmp_path: Path
) -> None:
    size = len(json.dumps(CHAT, ensure_ascii=False).encode())
    async with explaining(capsys) as (_, operator):
        shown = await told(operator, request_file, "--header", "X-Tidegate-Region: us")
        assert (shown["replica"], shown["request"]["regions"]) == ("pool-1", ["us"])
        plain = await told(operator, request_file)
        # Not written anew, which would make it longer: the umlaut alone three times.
        assert plain["request"]["prompt_bytes"] == shown["request"]["prompt_bytes"] == size
        completion = tmp_path / "completion.json"
        completion.write_text(json.dumps({"model": "m", "prompt": CANARY}))
        assert (await told(operator, str(completion), "--path", "/v1/completions"))["path"] == "/v1/completions"
        wrapped = tmp_path / "wrapped.json"
        wrapped.write_text(json.dumps({"body": CHAT, "headers": {"x-tidegate-region": "eu"}}))
        assert (await told(operator, str(wrapped)))["replica"] == "pool-0"
        assert (await told(operator, str(wrapped), "--header", "x-tidegate-region: us"))["replica"] == "pool-1"


async def test_a_request_can_come_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with explaining(capsys) as (_, operator):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(CHAT).encode())))
        assert (await told(operator, "-"))["pool"] == "pool"


async def test_a_key_is_named_by_its_id(capsys: pytest.CaptureFixture[str], request_file: str, tmp_path: Path) -> None:
    settings = keyed(tmp_path, [], static("ci", regions=["us"], tenant="acme"), backend={"replicas": REPLICAS})
    async with explaining(capsys, settings) as (gateway, operator):
        await gateway.runtime.admission.start()
        shown = await told(operator, request_file, "--key", "static:ci")
        assert (shown["replica"], shown["tenant"]) == ("pool-1", "acme")
        assert (await told(operator, request_file, "--tenant", "acme"))["excluded"] == []
        assert await operator.run("explain", request_file, "--key", "static:gone") == 2
        assert "no valid API key of this id" in operator.err


async def test_nobody_to_take_it_is_an_explanation_too(capsys: pytest.CaptureFixture[str], request_file: str) -> None:
    async with explaining(capsys) as (_, operator):
        assert await operator.run("explain", request_file, "--header", "x-tidegate-region: asia") == 0
    assert operator.out.splitlines() == [
        *(f"pool-{number}  excluded: region" for number in range(3)),
        "nobody (none_available): 403 data_residency_mismatch",
    ]


async def test_what_leaves_for_rented_replicas_is_shown_with_them(
    capsys: pytest.CaptureFixture[str], request_file: str
) -> None:
    spill = {"backend": "rented", "price": {"output": 1.0}, "usd_per_hour": 5.0, "usd_per_day": 5.0}
    settings = settings_for(
        [],
        models={"m": {"backend": "pool", "spill": spill}},
        backends={
            "pool": {"engine": "openai", "replicas": [{"url": NOBODY}]},
            "rented": {"engine": "openai", "hosted": True, "replicas": [{"url": NOBODY + "9"}]},
        },
    )
    async with explaining(capsys, settings) as (gateway, operator):
        assert await operator.run("explain", request_file) == 0
        assert operator.out.splitlines()[-1].endswith("; no spill: on_target")
        gateway.runtime.fleet.pools["pool"].replicas[0].work.queue(10**9, time.monotonic())
        assert await operator.run("explain", request_file) == 0
    assert "rented, pool rented:" in operator.out.splitlines()
    assert operator.out.splitlines()[-1].startswith("rented-0 (spill, predicted_wait): ")


async def test_what_was_kept_is_replayed_without_a_gateway(
    capsys: pytest.CaptureFixture[str], request_file: str, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.json"
    async with explaining(capsys) as (gateway, operator):
        gateway.runtime.fleet.pools["pool"].replicas[2].draining = True
        shown = await told(operator, request_file)
        kept.write_text(operator.out)
    assert await asyncio.to_thread(main, ["explain", "--replay", str(kept), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["replica"] == shown["replica"]
    assert again["candidates"] == shown["candidates"]
    assert await asyncio.to_thread(main, ["explain", "--replay", str(kept), "--policy", "lmetric"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "pool-2  excluded: draining" in lines
    assert f"it was {shown['replica']} by cost" in lines[-1]
    assert "(lmetric, lmetric)" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a FILE with the request is needed"),
        (["/nowhere/request.json"], "No such file"),
        (["{broken}"], "not JSON"),
        (["{list}"], "not a JSON object"),
        (["{good}", "--policy", "cost"], "--policy goes with --replay"),
        (["{good}", "--replay", "{good}"], "--replay takes all from its own FILE"),
        (["--replay", "{good}"], "no explanation"),
        (["--replay", "{kept}", "--policy", "made_up"], "policy made_up: no such policy"),
    ],
)
def test_what_cannot_be_used_is_said_with_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {
        "broken": f'{{"{CANARY}',
        "list": "[]",
        "good": json.dumps(CHAT),
        "kept": json.dumps({"version": 1, "policy": "cost", "seed": 1}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    filled = [each.format(**{name: str(tmp_path / name) for name in files}) for each in arguments]
    assert main(["explain", *filled, "--json"]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert said in json.loads(out)["error"]
    assert CANARY not in out + err


@pytest.mark.parametrize(
    "arguments", [["x", "--header", "no-colon"], ["x", "--key", "a", "--tenant", "b"], ["x", "--header", ": v"]]
)
def test_a_command_line_that_cannot_be_read_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", *arguments])
    assert ended.value.code == 2
    assert "tidegate explain" in capsys.readouterr().err


async def test_refusals_and_silence_have_their_exit_codes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, request_file: str
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**CHAT, "model": "gpt-9"}))
    async with explaining(capsys) as (_, operator):
        assert await operator.run("explain", str(other)) == 2
        assert "does not exist here" in operator.err
    operator.url = "http://127.0.0.1:9"
    assert await operator.run("explain", request_file) == 1
    assert "no gateway answers" in operator.err
