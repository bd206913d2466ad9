"""The OpenAPI document says what the code does: its routes, its error codes, the fields it looks at."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from gateway.api import RequestId, build_app
from gateway.cli import main
from gateway.inspection.door import PATH
from gateway.openapi import UNKNOWN_ROUTE, document
from loadtests.engine import FakeEngine
from tests.support.client import connect
from tests.support.serving import serving, settings_for

ROOT = Path(__file__).parents[2]
REQUEST_PATH = ROOT / "docs" / "request-path.md"
OF_OPERATORS = {"x-tidegate-actor", "x-tidegate-csrf"}
"""The admin listener's."""


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    """Every operation of the document by path and method, its references followed."""
    whole = document()
    found = {}
    for path, methods in whole["paths"].items():
        for method, operation in methods.items():
            responses = {
                status: whole["components"]["responses"][answer["$ref"].rpartition("/")[2]]
                if "$ref" in answer
                else answer
                for status, answer in operation["responses"].items()
            }
            found[path, method.upper()] = {**operation, "responses": responses}
    return found


async def test_it_has_every_route_of_the_listener_and_no_other() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        app = build_app(gateway.runtime)
        assert isinstance(app, RequestId)
        inner = app._app
        assert isinstance(inner, Starlette)
        routes = set()
        for route in inner.routes:
            assert isinstance(route, Route)
            if not route.path_format.startswith(PATH):  # the playground's own way in, which clients cannot use
                routes |= {(route.path_format, method) for method in route.methods or () if method != "HEAD"}
        assert set(operations()) == routes


def coded() -> set[tuple[str, str]]:
    """All (status, code) that the document names."""
    return {
        (status, code)
        for operation in operations().values()
        for status, answer in operation["responses"].items()
        for code in answer.get("x-tidegate-codes", ())
    }


def tabled() -> set[tuple[str, str]]:
    """All (status, code) of the table of errors, which a test compares with the code, but the admin listener's."""
    section = REQUEST_PATH.read_text().split("\n## Errors\n")[1].split("\n## ")[0]
    found = set()
    for line in section.splitlines():
        if re.match(r"\| \d{3}", line):
            _, statuses, _, codes, when, *_ = (cell.strip() for cell in line.split("|"))
            if not when.startswith("admin listener:"):
                found |= {(status, code) for status in statuses.split(", ") for code in re.findall(r"`(\w+)`", codes)}
    return found


def test_its_error_codes_are_those_of_the_table_of_errors() -> None:
    listed, known = coded(), tabled() - {("404", UNKNOWN_ROUTE)}
    assert len(known) > 40
    assert known - listed == set(), "add these to gateway/openapi.py"
    assert listed - known == set(), "docs/request-path.md does not know these"


def test_no_answer_of_an_error_is_without_the_error_object_and_the_request_id() -> None:
    for operation in operations().values():
        for status, answer in operation["responses"].items():
            assert "x-request-id" in answer["headers"], (operation["operationId"], status)
            if status != "200" and operation["operationId"] != "ready":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}


def test_it_names_every_header_of_ours_that_the_code_reads_or_writes() -> None:
    sources = [path.read_text() for path in (ROOT / "gateway").rglob("*.py") if path.name != "openapi.py"]
    known = {name for source in sources for name in re.findall(r'b"(x-(?:tidegate|ratelimit)-[a-z-]+)"', source)}
    assert len(known) > 15
    whole = document()
    asked = {each["name"] for each in whole["paths"]["/v1/chat/completions"]["post"]["parameters"]}
    assert known - asked - set(whole["components"]["headers"]) - OF_OPERATORS == set()


def test_every_reference_leads_somewhere() -> None:
    whole = document()
    for target in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(whole)):
        place: Any = whole
        for step in target.split("/"):
            place = place[step]


async def test_the_listener_serves_it_to_anybody() -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url])) as gateway,
        connect(gateway.host, gateway.port) as client,
    ):
        await client.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer nonsense\r\n\r\n")
        reply = await client.reply()
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json == document()


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["openapi"]) == 0
    assert json.loads(capsys.readouterr().out) == document()
