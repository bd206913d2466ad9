"""One line for each request: what it says, what it never says, and that nobody waits for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.usage import Usage
from gateway.logs import LogStyle
from gateway.record import Attempt, Exchange, Outcome
from gateway.request_log import BATCH, RequestLog, RequestLogMode
from gateway.telemetry.context import TraceContext
from loadtests.engine import FakeEngine
from tests.support.http import ask
from tests.support.serving import serving, settings_for

JSON = LogStyle(json=True, worker=3)
CANARY = "canary-8f1d"


def settled(outcome: Outcome = Outcome.COMPLETED, **fields: Any) -> Exchange:
    exchange = Exchange("req_1", "/v1/chat/completions", 10.0, 1_700_000_000.25, model="m", tenant="t")
    exchange.outcome, exchange.finished_at, exchange.status = outcome, 12.0, 200
    for name, value in fields.items():
        setattr(exchange, name, value)
    return exchange


def lines_of(*exchanges: Exchange, mode: RequestLogMode = "all", style: LogStyle = JSON) -> list[str]:
    log = RequestLog(mode, style)
    for exchange in exchanges:
        log.record(exchange)
    return [line.decode() for line in log.lines()]


def test_a_line_is_one_object_with_its_fields_at_the_top() -> None:
    tries = (
        Attempt("pool", "pool-0", "warm", 10.0, ended_at=10.1, code="upstream_disconnected"),
        Attempt("pool", "pool-1", "cold", 10.1, ended_at=12.0),
    )
    (line,) = lines_of(
        settled(
            key_id="key_1",
            pool="pool",
            replica="pool-1",
            attempts=2,
            tries=tries,
            usage=Usage(120, 56, 100),
            first_content_at=10.3,
            cost_usd=0.01,
            traced=TraceContext(trace_id=0xABC, span_id=1, parent_id=0, sampled=True),
        )
    )
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    said = json.loads(line)
    assert said.pop("pid") > 0
    assert said == {
        "time": "2023-11-14T22:13:22.250Z",
        "level": "info",
        "logger": "tidegate.requests",
        "worker": 3,
        "message": "completed 200",
        "request_id": "req_1",
        "tenant": "t",
        "key_id": "key_1",
        "route": "/v1/chat/completions",
        "model": "m",
        "stream": False,
        "pool": "pool",
        "replica": "pool-1",
        "status": 200,
        "outcome": "completed",
        "attempts": 2,
        "failed_attempts": "pool-0 upstream_disconnected",
        "prompt_tokens": 120,
        "cached_tokens": 100,
        "completion_tokens": 56,
        "request_bytes": 0,
        "response_bytes": 0,
        "ttft_ms": 300.0,
        "duration_ms": 2000.0,
        "cost_usd": 0.01,
        "trace_id": f"{0xABC:032x}",
    }


def test_the_level_says_whose_doing_it_was() -> None:
    expected = {
        Outcome.COMPLETED: "info",
        Outcome.CLIENT_LEFT: "info",
        Outcome.REJECTED: "info",
        Outcome.UPSTREAM_ERROR: "warning",
        Outcome.TIMEOUT: "warning",
        Outcome.INTERNAL: "error",
    }
    lines = lines_of(*map(settled, expected))
    assert [json.loads(line)["level"] for line in lines] == list(expected.values())


def test_only_errors_are_logged_where_only_they_are_asked_for() -> None:
    lines = lines_of(*map(settled, Outcome), mode="errors")
    outcomes = {json.loads(line)["outcome"] for line in lines}
    assert outcomes == set(Outcome) - {Outcome.COMPLETED, Outcome.CLIENT_LEFT}


def test_a_line_of_text_is_for_people_and_still_one_line() -> None:
    exchange = settled(Outcome.UPSTREAM_ERROR, status=502, replica="pool-0", attempts=1, cost_usd=0.0000012)
    exchange.route_reason = "of my own\npolicy"
    (line,) = lines_of(exchange, style=LogStyle(worker=1))
    assert line.startswith(
        "2023-11-14T22:13:22.250Z WARNING tidegate.requests[1]: req_1 upstream_error 502 tenant=t route="
    )
    assert ' route_reason="of my own\\npolicy" ' in line
    assert " duration_ms=2000 cost_usd=1.2e-06" in line
    assert line.count("\n") == 1
    assert "\x1b" not in line
    (coloured,) = lines_of(exchange, style=LogStyle(colour=True))
    assert coloured.startswith("\x1b[33m2023-")


def test_beyond_its_bound_lines_are_lost_and_counted() -> None:
    log = RequestLog("all", JSON, max_waiting=2 * BATCH)
    for _ in range(3 * BATCH):
        log.record(settled())
    assert log.lost == BATCH
    assert [len(log.lines()) for _ in range(3)] == [BATCH, BATCH, 0]
    log.record(settled())
    assert len(log.lines()) == 1


@pytest.mark.parametrize("style", [JSON, LogStyle()], ids=["json", "text"])
@pytest.mark.parametrize("edge", ["protocol", "asgi"])
async def test_nothing_that_a_client_or_an_engine_says_is_in_a_line(
    edge: str, style: LogStyle, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"sk-{CANARY}-0123456789abcdef"
    monkeypatch.setenv("ENGINE_KEY", key)
    body: dict[str, Any] = {
        "model": "m",
        "user": CANARY,
        "messages": [{"role": "user", "content": f"{CANARY} " * 50, "name": CANARY}],
        "metadata": {CANARY: CANARY},
    }
    error = json.dumps({"error": {"message": CANARY, "type": CANARY, "param": CANARY, "code": f"{CANARY} {key}"}})
    async with FakeEngine(chunks=2) as engine, FakeEngine(status=400, error_body=error) as refusing:
        for url, count in ((engine.url, 2), (refusing.url, 3)):
            async with serving(settings_for([url], edge=edge)) as gateway:
                log = gateway.runtime.request_log = RequestLog("all", style)
                await ask(
                    gateway, body, "/v1/chat/completions", f"authorization: Bearer {key}", f"x-{CANARY}: {CANARY}"
                )
                await ask(gateway, {**body, "stream": True})
                if url == refusing.url:
                    await ask(gateway, {**body, "model": f"m:{CANARY}"})
                await gateway.settled(count)
                lines = [line.decode() for line in log.lines()]
            assert len(lines) == count
            assert all("req_" in line for line in lines)
            assert CANARY not in "".join(lines)


async def test_a_request_is_logged_only_where_a_log_was_given() -> None:
    async with FakeEngine() as engine, serving(settings_for([engine.url])) as gateway:
        assert gateway.runtime.request_log is None
        await ask(gateway, {"model": "m", "messages": []})
        await gateway.settled()
