"""What the failed end of an attempt means for the client, the replica and another attempt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.dialects import DIALECTS
from backends.errors import (
    ConnectFailed,
    ConnectTimeout,
    ConsumerFailed,
    Disconnected,
    HeadTimeout,
    IdleTimeout,
    PoolClosed,
    PoolTimeout,
    ProtocolViolation,
    UpstreamError,
)
from backends.ticker import Ticker
from backends.upstream import Upstream
from gateway.errors import Draining, GatewayError, StreamInterrupted, UpstreamFailed, UpstreamTimeout
from gateway.leg import UpstreamReply
from gateway.upstream_errors import UpstreamStalled, from_stream_event
from gateway.verdict import Again, of_connection, of_relay, of_reply, refused_field
from routing.health import Evidence
from routing.types import Replica

AT = "127.0.0.1:1"


def upstream(engine: str = "openai", hosted: bool = False) -> Upstream:
    return Upstream(
        Replica("pool-0", "pool", "http://127.0.0.1:1", engine),
        DIALECTS[engine],
        origin="http://127.0.0.1:1",
        hosted=hosted,
        max_connections=1,
        idle_s=1.0,
        connect_timeout_s=1.0,
        ticker=Ticker(),
    )


@pytest.mark.parametrize(
    ("error", "evidence", "again", "billed"),
    [
        (ConnectFailed(AT, "connect", "refused"), Evidence.UNREACHABLE, Again.UNCOUNTED, False),
        (ConnectTimeout(AT, "connect", "slow"), Evidence.UNREACHABLE, Again.SAFELY, False),
        (PoolTimeout(AT, "pool", "busy"), None, Again.SAFELY, False),
        (PoolClosed(AT, "pool", "closing"), None, Again.SAFELY, False),
        (ConsumerFailed(AT, "body", "a defect", sent=True, got_bytes=True), None, Again.ONCE, True),
        (Disconnected(AT, "head", "reset", sent=True, reused=True), None, Again.ANYWHERE, False),
        (Disconnected(AT, "head", "reset", sent=True), Evidence.FAILED, Again.ONCE, True),
        (Disconnected(AT, "body", "eof", sent=True, got_bytes=True), Evidence.FAILED, Again.ONCE, True),
        (ProtocolViolation(AT, "head", "no http", sent=True), Evidence.FAILED, Again.ONCE, True),
        (HeadTimeout(AT, "head", "slow", sent=True), Evidence.STALLED, Again.ONCE, True),
        (IdleTimeout(AT, "body", "slow", sent=True), Evidence.STALLED, Again.ONCE, True),
    ],
)
def test_connections(error: UpstreamError, evidence: Evidence | None, again: Again, billed: bool) -> None:
    mine, rented = of_connection(error, False), of_connection(error, True)
    assert (mine.evidence, mine.again, mine.may_be_billed) == (evidence, again, False)
    assert (rented.evidence, rented.again, rented.may_be_billed) == (evidence, again, billed)
    assert mine.cause is error


@pytest.mark.parametrize(
    ("status", "message", "evidence", "again", "shown", "refused"),
    [
        (400, "no", Evidence.REJECTED, Again.NEVER, 400, 0),
        (404, "no", Evidence.REJECTED, Again.NEVER, 404, 0),
        (422, "no", Evidence.REJECTED, Again.NEVER, 422, 0),
        (429, "slow down", Evidence.OVERLOADED, Again.SAFELY, 429, 0),
        (503, "The request queue is full.", Evidence.OVERLOADED, Again.SAFELY, 503, 0),
        (529, "overloaded", Evidence.OVERLOADED, Again.SAFELY, 503, 0),
        (409, "locked", Evidence.OVERLOADED, Again.SAFELY, 503, 0),
        (425, "too early", Evidence.OVERLOADED, Again.SAFELY, 503, 0),
        (408, "slow", Evidence.FAILED, Again.ONCE, 504, 0),
        (413, "long", Evidence.REJECTED, Again.NEVER, 413, 0),
        (402, "pay", Evidence.REJECTED, Again.SAFELY, 502, 402),
        (503, "dead", Evidence.FAILED, Again.ONCE, 503, 0),
        (500, "broken", Evidence.FAILED, Again.ONCE, 502, 0),
        (302, "elsewhere", Evidence.FAILED, Again.ONCE, 502, 0),
        (401, "bad key sk-1", Evidence.REJECTED, Again.SAFELY, 502, 401),
        (403, "not yours", Evidence.REJECTED, Again.SAFELY, 502, 403),
    ],
)
async def test_statuses(status: int, message: str, evidence: Evidence, again: Again, shown: int, refused: int) -> None:
    body = json.dumps({"error": {"message": message}}).encode()
    verdict = of_reply(UpstreamReply(status, [], body), upstream())
    assert (verdict.evidence, verdict.again, verdict.error.status) == (evidence, again, shown)
    assert verdict.credential_refused == refused
    assert "sk-1" not in verdict.error.message


@pytest.mark.parametrize(
    ("error", "evidence", "again", "billed"),
    [
        (UpstreamStalled("no content", code="first_token_timeout"), Evidence.STALLED, Again.ONCE, True),
        (UpstreamStalled("silence within the answer"), Evidence.STALLED, Again.NEVER, False),
        (UpstreamTimeout("the request's own time"), None, Again.NEVER, False),
        (Draining("the gateway's own end"), None, Again.NEVER, False),
        (StreamInterrupted("cut"), Evidence.FAILED, Again.ONCE, True),
        (UpstreamFailed("too large"), Evidence.FAILED, Again.ONCE, True),
        (from_stream_event({"message": "full", "code": 429}), Evidence.OVERLOADED, Again.SAFELY, False),
        (from_stream_event({"message": "queue is full", "code": 503}), Evidence.OVERLOADED, Again.SAFELY, False),
        (from_stream_event({"message": "no", "code": 400}), Evidence.REJECTED, Again.NEVER, False),
        (from_stream_event({"message": "oops"}), Evidence.FAILED, Again.ONCE, False),
    ],
)
async def test_what_the_relay_found(error: GatewayError, evidence: Evidence | None, again: Again, billed: bool) -> None:
    mine, rented = of_relay(error, upstream()), of_relay(error, upstream(hosted=True))
    assert (mine.evidence, mine.again, mine.may_be_billed) == (evidence, again, False)
    assert (rented.evidence, rented.again, rented.may_be_billed) == (evidence, again, billed)


@pytest.mark.parametrize(
    ("status", "message", "pause_s", "limits_key"),
    [
        (429, "slow down", 7.0, True),
        (503, "The request queue is full.", 7.0, False),
        (503, "upgrading", 7.0, False),
        (529, "overloaded", 7.0, False),
        (500, "broken", None, False),
        (401, "bad key", None, False),
        (400, "no", None, False),
    ],
)
async def test_what_a_server_that_names_a_time_asks_for(
    status: int, message: str, pause_s: float | None, limits_key: bool
) -> None:
    body = json.dumps({"error": {"message": message}}).encode()
    verdict = of_reply(UpstreamReply(status, [(b"retry-after", b"7")], body), upstream())
    assert (verdict.pause_s, verdict.limits_key) == (pause_s, limits_key)
    assert of_reply(UpstreamReply(status, [], body), upstream()).pause_s is None


@pytest.mark.parametrize("engine", sorted(DIALECTS))
@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
async def test_every_dialect_lets_another_try_and_blames_no_key(engine: str, status: int) -> None:
    verdict = of_reply(UpstreamReply(status, [], b'{"error":{"message":"not now"}}'), upstream(engine))
    assert verdict.again in (Again.SAFELY, Again.ONCE)
    assert verdict.credential_refused == 0


@pytest.mark.parametrize("engine", sorted(DIALECTS))
@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_every_dialect_returns_what_is_the_clients(engine: str, status: int) -> None:
    verdict = of_reply(UpstreamReply(status, [], b'{"error":{"message":"no such thing"}}'), upstream(engine))
    assert (verdict.again, verdict.evidence, verdict.error.status) == (Again.NEVER, Evidence.REJECTED, status)


@pytest.mark.parametrize(
    ("status", "said", "asked", "field"),
    [
        (422, '{"detail":[{"loc":["body","rid"],"msg":"extra fields not permitted"}]}', {}, "rid"),
        (400, '{"error":{"message":"unknown field: rid"}}', {}, "rid"),
        (400, '{"error":{"message":"unknown field: rid"}}', {"rid": "mine"}, None),
        (400, '{"error":{"message":"model is missing"}}', {}, None),
        (500, '{"error":{"message":"rid"}}', {}, None),
        (200, "rid", {}, None),
    ],
)
def test_a_field_of_ours_that_is_refused(status: int, said: str, asked: dict[str, Any], field: str | None) -> None:
    reply = UpstreamReply(status, [], said.encode())
    assert refused_field(reply, {"rid": b'"1"', "model": b'"m"'}, asked) == field


def test_a_server_that_schedules_by_no_priorities_is_asked_without() -> None:
    # vLLM before its first version that ignores them: vllm/v1/engine/processor.py and its predecessors.
    reply = UpstreamReply(400, [], b'{"message":"Got priority -1 but Priority scheduling is not enabled."}')
    assert refused_field(reply, {"priority": b"-1"}, {}) == "priority"
    # SGLang, of a request that was put behind others: no reason to leave the field out.
    reply = UpstreamReply(503, [], b'{"message":"The request is aborted by a higher priority request."}')
    assert refused_field(reply, {"priority": b"1"}, {}) is None


def test_what_decides_who_answers_is_never_left_out() -> None:
    reply = UpstreamReply(400, [], b"unknown fields: stream, lora, lora_request, routed_dp_rank")
    ours = dict.fromkeys(("stream", "lora", "lora_request", "routed_dp_rank"), b"1")
    assert refused_field(reply, ours, {}) is None


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_what_bounds_the_output_is_never_left_out(field: str) -> None:
    # vLLM, of a prompt that leaves less room than a hard limit allows.
    said = f"'{field}' or 'max_completion_tokens' is too large: 4096. This model's maximum context length is 4096"
    assert refused_field(UpstreamReply(400, [], said.encode()), {field: b"4096"}, {}) is None


def test_an_engine_that_has_begun_anew_is_asked_at_once_whatever_it_said_before() -> None:
    found = upstream()
    replica = found.replica
    replica.paused_until = replica.limits.begin("m", 300.0, 1000.0)
    assert replica.limited_until("m", 1001.0) == 1300.0
    found.begin_anew()
    assert replica.limited_until("m", 1001.0) == 0.0
