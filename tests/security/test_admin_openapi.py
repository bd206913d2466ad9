"""The description of the admin API says what there is: every route, with its role and its errors, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from gateway.admin.guard import Guard
from gateway.cli import main
from gateway.key_routes import key_routes
from gateway.policy import GuardedRoute
from tests.security.test_routes import OPERATORS
from tests.support.admin_desk import READER, AdminSide, admin_side, bearer

ROLES = ("registrar", "reader", "operator", "owner")


async def described(folder: Path) -> tuple[dict[str, Any], list[GuardedRoute]]:
    async def changed() -> None: ...

    async with admin_side(folder, routes=key_routes(lambda: None, None, changed)) as side:
        return (await side.client.get("/admin/openapi.json", headers=bearer(READER))).json(), routes_of(side)


def routes_of(side: AdminSide) -> list[GuardedRoute]:
    assert isinstance(side.app, Guard)
    assert isinstance(side.app.app, Starlette)
    return [route for route in side.app.app.routes if isinstance(route, GuardedRoute)]


async def test_it_has_every_route_with_its_role_and_no_other(tmp_path: Path) -> None:
    document, _ = await described(tmp_path)
    found = {
        path: {method.upper(): operation["x-tidegate-role"] for method, operation in operations.items()}
        for path, operations in document["paths"].items()
    }
    assert found == {
        path.replace(":path}", "}"): {method: who.value for method, who in methods.items()}
        for path, methods in OPERATORS.items()
    }


async def test_each_operation_says_what_it_is_and_what_it_takes(tmp_path: Path) -> None:
    document, routes = await described(tmp_path)
    ids = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            case = (method, path)
            ids.append(operation["operationId"])
            assert re.fullmatch(r"[A-Z`].{8,}[.:]", operation["summary"]), (case, operation["summary"])
            names = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"]
            assert names == re.findall(r"\{(\w+)\}", path), case
            assert ("requestBody" in operation) <= (method != "get"), case
            codes = {code for answer in operation["responses"].values() for code in answer.get("x-tidegate-codes", ())}
            needed = operation["x-tidegate-role"] in ROLES
            assert ({"invalid_token", "role_required", "cross_site_request"} <= codes) >= needed, case
            assert (operation.get("security") == []) == (not needed), case
    assert len(ids) == len(set(ids))
    written = {route.about.body for route in routes} - {None}
    assert len(written) >= 5


async def test_its_references_lead_somewhere(tmp_path: Path) -> None:
    document, _ = await described(tmp_path)
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert {"KeySpec", "TenantSpec", "Login", "Signed", "AdapterChange", "Error"} <= names
    assert names <= set(document["components"]["schemas"])


async def test_a_body_is_what_the_route_decodes(tmp_path: Path) -> None:
    document, _ = await described(tmp_path)
    schema = document["components"]["schemas"]["Login"]
    assert schema["required"] == ["token"]
    assert schema["additionalProperties"] is False
    body = document["paths"]["/admin/session"]["post"]["requestBody"]
    assert body == {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Login"}}},
    }


async def test_the_command_prints_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, _ = await described(tmp_path)
    assert main(["openapi", "--admin"]) == 0
    assert json.loads(capsys.readouterr().out) == document
