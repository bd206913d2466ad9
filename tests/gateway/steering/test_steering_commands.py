"""`tidegate weight`, `price`, `policy`, `reload` and `config`, against a running gateway."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from gateway.cli import main
from loadtests.engine import FakeEngine
from tests.support.command import run_tidegate, serve_process, write_config

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello " * 400}]}


async def test_a_gateway_is_steered_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url]) as gateway:
        url = await gateway.url()
        where = ["--url", await gateway.admin_url(), "--token-file", str(gateway.state / "admin-token")]

        async def told(*command: str, code: int = 0) -> tuple[str, str]:
            found = await asyncio.to_thread(main, [*command, *where])
            said = capsys.readouterr()
            assert found == code, (command, said)
            return said.out, said.err

        async def parsed(*command: str) -> dict[str, Any]:
            answer: dict[str, Any] = json.loads((await told(*command, "--json"))[0])
            return answer

        assert "backends.pool.replicas.pool-0.weight: 1.0 -> 2.5" in (await told("weight", "pool/pool-0", "2.5"))[0]
        out, _ = await told("price", "m", "--input", "0.5", "--output", "2")
        assert 'models.m.price: null -> {"input": 0.5,' in out
        _, err = await told("price", "m", "--reset", "--input", "1", code=2)
        assert "or --reset" in err
        _, err = await told("policy", "switch", "m", "roundrobin", code=2)
        assert "did you mean round_robin?" in err
        _, err = await told("weight", "pool/pool-0", "3", "--if-version", "0", code=1)
        assert "have been changed meanwhile: they are at version 2" in err
        await told("policy", "shadow", "m", "round_robin", "--per-s", "1000")
        async with httpx2.AsyncClient(trust_env=False) as client:
            for _ in range(60):
                assert (await client.post(f"{url}/v1/chat/completions", json=CHAT)).status_code == 200
        out, _ = await told("policy", "list")
        assert out.splitlines()[1].split()[:6] == ["m", "cost", "no", "round_robin", "60", "100.0%"]
        out, _ = await told("policy", "compare", "m", "cost", "--requests", "60")
        assert out.splitlines()[2].startswith("cost (in force)")
        assert "note: The caches begin empty" in out
        out, _ = await told("config", "show", "--origins")
        assert any(line.split()[::2] == ["backends.pool.replicas[0].weight", "override"] for line in out.splitlines())
        assert (await parsed("config", "overrides"))["version"] == 3
        assert "models.m.policy: cost -> random" in (await told("config", "set", "models.m.policy", "random"))[0]
        out, _ = await told("config", "restore", "1")
        assert "models.m.policy: random -> cost" in out
        (left,) = (await parsed("config", "overrides"))["overrides"]
        assert left["name"] == "backends.pool.replicas.pool-0.weight"
        await told("config", "unset", "backends.pool.replicas.pool-0.weight")
        assert (await parsed("weight", "pool/pool-0", "reset"))["changed"] == []
        content = yaml.safe_load(gateway.config.read_text())
        content["models"]["m"]["policy"] = "random"
        gateway.config.write_text(yaml.safe_dump(content))
        out, _ = await told("reload")
        assert f"models.m.policy: cost -> random  ({gateway.config}:" in out
        gateway.config.write_text("models: 7\n")
        _, err = await told("reload", code=1)
        assert f"{gateway.config}:1: models:" in err


async def test_a_check_says_where_values_come_from(tmp_path: Path) -> None:
    path = tmp_path / "tidegate.yaml"
    write_config(path, ["http://127.0.0.1:1"])
    environ = {"TIDEGATE_MODELS__M__POLICY": "random"}
    code, out, _ = await run_tidegate("check", str(path), "--origins", "--json", environ=environ)
    rows = {row["path"]: row for row in json.loads(out)["settings"]}
    assert (code, rows["models.m.policy"]["origin"]) == (0, "environment")
    assert rows["server.port"]["where"].startswith(f"{path}:")
