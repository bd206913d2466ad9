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
from gateway.relay import UpstreamReply
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
    ("error", "evidence", "own", "hosted"),
    [
        (ConnectFailed(AT, "connect", "refused"), Evidence.UNREACHABLE, Again.UNCOUNTED, Again.UNCOUNTED),
        (ConnectTimeout(AT, "connect", "slow"), Evidence.UNREACHABLE, Again.SAFELY, Again.SAFELY),
        (PoolTimeout(AT, "pool", "busy"), None, Again.SAFELY, Again.SAFELY),
        (PoolClosed(AT, "pool", "closing"), None, Again.SAFELY, Again.SAFELY),
        (ConsumerFailed(AT, "body", "a defect", sent=True, got_bytes=True), None, Again.ONCE, Again.NEVER),
        (Disconnected(AT, "head", "reset", sent=True, reused=True), None, Again.ANYWHERE, Again.ANYWHERE),
        (Disconnected(AT, "head", "reset", sent=True), Evidence.FAILED, Again.ONCE, Again.NEVER),
        (Disconnected(AT, "body", "eof", sent=True, got_bytes=True), Evidence.FAILED, Again.ONCE, Again.NEVER),
        (ProtocolViolation(AT, "head", "no http", sent=True), Evidence.FAILED, Again.ONCE, Again.NEVER),
        (HeadTimeout(AT, "head", "slow", sent=True), Evidence.STALLED, Again.NEVER, Again.NEVER),
        (IdleTimeout(AT, "body", "slow", sent=True), Evidence.STALLED, Again.NEVER, Again.NEVER),
    ],
)
def test_connections(error: UpstreamError, evidence: Evidence | None, own: Again, hosted: Again) -> None:
    mine, rented = of_connection(error, False), of_connection(error, True)
    assert (mine.evidence, mine.again) == (evidence, own)
    assert (rented.evidence, rented.again) == (evidence, hosted)
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
    ("error", "evidence", "own", "hosted"),
    [
        (UpstreamStalled("silence"), Evidence.STALLED, Again.NEVER, Again.NEVER),
        (UpstreamTimeout("the request's own time"), None, Again.NEVER, Again.NEVER),
        (Draining("the gateway's own end"), None, Again.NEVER, Again.NEVER),
        (StreamInterrupted("cut"), Evidence.FAILED, Again.ONCE, Again.NEVER),
        (UpstreamFailed("too large"), Evidence.FAILED, Again.ONCE, Again.NEVER),
        (from_stream_event({"message": "full", "code": 429}), Evidence.OVERLOADED, Again.SAFELY, Again.SAFELY),
        (from_stream_event({"message": "queue is full", "code": 503}), Evidence.OVERLOADED, Again.SAFELY, Again.SAFELY),
        (from_stream_event({"message": "no", "code": 400}), Evidence.REJECTED, Again.NEVER, Again.NEVER),
        (from_stream_event({"message": "oops"}), Evidence.FAILED, Again.ONCE, Again.ONCE),
    ],
)
async def test_what_the_relay_found(error: GatewayError, evidence: Evidence | None, own: Again, hosted: Again) -> None:
    mine, rented = of_relay(error, upstream()), of_relay(error, upstream(hosted=True))
    assert (mine.evidence, mine.again) == (evidence, own)
    assert (rented.evidence, rented.again) == (evidence, hosted)


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
