"""Requests made up by schemathesis from our own OpenAPI document, against a real gateway process.

The short form sends some hundred; TESTS_LONG=1 (`make fuzz`) some thousand. What must hold of every answer: no 5xx, a
status that the document names, the content type, headers and body that it promises. A process that crashes or hangs
fails the test by not answering.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway.openapi import document
from loadtests.ports import free_port
from loadtests.processes import LOAD_CORE, python, running
from tests.support.command import write_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LONG = os.environ.get("TESTS_LONG", "") not in ("", "0")
EXAMPLES = 1500 if LONG else 50
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
INFERENCE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway process in front of a fake engine that answers everything."""
    folder = tmp_path_factory.mktemp("fuzzed")
    engine, port = free_port(), free_port()
    write_config(
        folder / "tidegate.yaml", [f"http://127.0.0.1:{engine}"], server={"port": port}, admin={"enabled": False}
    )
    command = python("-m", "gateway", "serve", "--log-format=text", "--config", str(folder / "tidegate.yaml"))
    with (
        running(
            python("-m", "loadtests.engine", "--port", str(engine), "--chunks", "2"),
            log=folder / "engine.log", core=LOAD_CORE, port=engine, ready="/v1/models",
        ),
        running(command, log=folder / "gateway.log", core=LOAD_CORE, port=port, ready="/readyz"),
    ):  # fmt: skip
        yield f"http://127.0.0.1:{port}"
        # One that was restarted, or had a defect, would have said so.
        assert "Traceback" not in (folder / "gateway.log").read_text()


def described() -> schemathesis.BaseSchema:
    """The document with the one model that there is, so that requests get past the look-up of its name, and with time
    enough to answer: a deadline of 5 ms is a 504 as it should be."""
    whole = json.loads(json.dumps(document()))
    for path in INFERENCE:
        body = whole["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body["properties"]["model"] = {"enum": ["m"]}
        for header in whole["paths"][path]["post"]["parameters"]:
            if header["name"] == "x-tidegate-deadline-ms":
                header["schema"]["minimum"] = 60_000
    return schemathesis.openapi.from_dict(whole)


def operation(path: str, method: str) -> schemathesis.APIOperation[Any, Any, Any, Any]:
    return described()[path][method]


OPERATIONS = [
    pytest.param(path, method, wrong, id=f"{path}, {'wrong' if wrong else 'right'}")
    for path, methods in document()["paths"].items()
    for method in methods
    for wrong in (False, True)
    if path in INFERENCE or not wrong  # nothing about the other requests can be wrong
]


@pytest.mark.parametrize(("path", "method", "wrong"), OPERATIONS)
def test_answers_are_as_the_document_says(gateway: str, path: str, method: str, wrong: bool) -> None:
    asked = operation(path, method)
    mode = schemathesis.GenerationMode.NEGATIVE if wrong else schemathesis.GenerationMode.POSITIVE
    named = document()["paths"][path][method]["responses"]
    statuses: dict[int, int] = {}
    few = EXAMPLES if path in INFERENCE else max(5, EXAMPLES // 10)

    @seed(6)
    @settings(
        max_examples=few,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=asked.as_strategy(generation_mode=mode), stream=st.booleans())
    def ask(case: schemathesis.Case[Any], stream: bool) -> None:
        if not wrong and stream and isinstance(case.body, dict):
            case.body["stream"] = True
        response = case.call(base_url=gateway, session=session, timeout=20)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        case.validate_response(response, checks=CHECKS)
        # "4XX" of the document is for what engines refuse; this one refuses nothing.
        assert str(response.status_code) in named

    with requests.Session() as session:
        ask()
    print(path, method, mode, statuses)
    if path in INFERENCE:
        assert statuses.get(400 if wrong else 200, 0) >= few // 10  # the others are refused for what no schema can say
