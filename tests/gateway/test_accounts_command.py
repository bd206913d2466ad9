"""`tidegate accounts` on a running gateway, as an operator types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.commands.accounts import fields_of
from gateway.operate import Problem
from tests.support.command import run_tidegate, serve_process

NOWHERE = ["http://127.0.0.1:9"]


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        (["name=ci"], {"name": "ci"}),
        (["limits.usd_per_day=5", "limits.shadow=true"], {"limits": {"usd_per_day": 5, "shadow": True}}),
        (['models=["chat"]', "expires=30d", "class=batch"], {"models": ["chat"], "expires": "30d", "class": "batch"}),
        (["limits=null", "name=a=b"], {"limits": None, "name": "a=b"}),
        (["model_limits.org/a.b=null"], {"model_limits": {"org/a.b": None}}),
    ],
)
def test_fields_are_json_or_plain_text(settings: list[str], fields: dict[str, Any]) -> None:
    assert fields_of(settings) == fields


@pytest.mark.parametrize("settings", [["name"], ["=5"], ["limits=null", "limits.usd_per_day=5"]])
def test_what_sets_nothing_is_refused(settings: list[str]) -> None:
    with pytest.raises(Problem):
        fields_of(settings)


async def test_keys_and_tenants_from_their_making_to_their_end(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"auth": "keys", "database": f"sqlite:///{tmp_path}/tidegate.db"}
    async with serve_process(tmp_path, NOWHERE, **sections) as gateway:
        url = await gateway.admin_url()
        where = ("--url", url, "--token-file", str(gateway.state / "admin-token"))

        async def told(*arguments: str, code: int = 0) -> Any:
            got, out, err = await run_tidegate("accounts", *arguments, *where, "--json")
            assert got == code, err
            return json.loads(out)

        made = await told("keys", "create", "acme", "--set", "name=ci", "--set", "limits.requests_per_minute=9")
        assert made["key"].startswith("tgk_")
        id = made["id"]
        assert [each["id"] for each in (await told("keys", "list", "--q", "CI"))["data"]] == [id]
        changed = await told("keys", "update", id, "--set", "limits.requests_per_minute=null")
        assert changed["limits"] == {}
        late = await told("keys", "disable", id, "--if-version", str(made["version"]), code=1)
        assert "was changed in the meantime" in late["error"]
        assert (await told("undo", str(changed["audit_id"])))["limits"] == {"requests_per_minute": 9}
        assert (await told("tenants", "put", "acme", "--set", "weight=3"))["weight"] == 3.0
        second = await told("keys", "rotate", id, "--overlap", "1h")
        assert (await told("keys", "show", id))["replaced_by"] == second["id"]
        for each in (id, second["id"]):
            await told("keys", "revoke", each)
        assert (await told("tenants", "remove", "acme"))["removed"] is True
        await told("tenants", "show", "acme", code=2)
        code, out, _ = await run_tidegate("accounts", "keys", "list", *where)
        assert (code, out.split()[:3]) == (0, ["ID", "TENANT", "NAME"])
