"""What clients are told of a model server's refusals and failures."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialects import DIALECTS
from backends.dialects.protocol import Fault
from backends.errors import (
    ConnectFailed,
    ConnectTimeout,
    Disconnected,
    HeadTimeout,
    IdleTimeout,
    PoolTimeout,
    ProtocolViolation,
    UpstreamError,
)
from gateway.errors import GatewayError
from gateway.record import Outcome
from gateway.upstream_errors import (
    MAX_RETRY_AFTER_S,
    clean,
    error_of,
    from_connection,
    from_status,
    from_stream_event,
    parse_retry_after,
)

NOW = 1_700_000_000.0


def translated(status: int, body: Any = None, *headers: tuple[bytes, bytes]) -> GatewayError:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = error_of(text)
    fault = DIALECTS["openai"].judge_error(status, fields)
    return from_status(status, list(headers), fields, fault, NOW)


def shape(error: GatewayError) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(error.body())["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert found["message"]
    return found


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422, 499])
def test_a_refusal_keeps_its_status_and_is_the_requests_fault(status: int) -> None:
    error = translated(status, {"error": {"message": "no", "type": "x", "param": "n", "code": "bad_n"}})
    assert error.status == status
    assert error.outcome is Outcome.UPSTREAM_REJECTED
    assert shape(error) == {"message": "no", "type": "invalid_request_error", "param": "n", "code": "bad_n"}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_of_our_own_credential_is_never_the_clients(status: int) -> None:
    error = translated(status, {"error": {"message": "Incorrect API key provided: sk-abc", "code": "invalid_api_key"}})
    assert (error.status, error.code) == (502, "upstream_auth_failed")
    assert error.outcome is Outcome.UPSTREAM_ERROR
    assert "sk-abc" not in error.message


def test_a_rate_limit_is_passed_on_with_its_wait() -> None:
    error = translated(429, {"error": {"message": "slow", "code": "rate_limit_exceeded"}}, (b"retry-after", b"7"))
    assert error.status == 429
    assert shape(error)["type"] == "requests"
    assert dict(error.headers()) == {b"retry-after": b"7", b"retry-after-ms": b"7000"}


@pytest.mark.parametrize(
    ("status", "expected"),
    [(500, 502), (501, 502), (502, 502), (503, 503), (529, 503), (504, 504), (408, 504), (301, 502), (307, 502)],
)
def test_failures_have_a_status_of_the_gateway(status: int, expected: int) -> None:
    error = translated(status, b"<html>oops</html>")
    assert error.status == expected
    assert str(status) in shape(error)["message"]


def test_an_overloaded_engine_always_comes_with_a_wait() -> None:
    assert translated(503, {}).retry_after_s == 1.0
    assert translated(503, {}, (b"retry-after", b"0")).retry_after_s == 1.0
    assert translated(503, {}, (b"retry-after", b"12")).retry_after_s == 12.0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "nested"}}, "nested"),
        ({"object": "error", "message": "flat", "type": "BadRequestError", "code": 400}, "flat"),
        ({"error": "a string"}, "a string"),
        ({"detail": "FastAPI's"}, "FastAPI's"),
        ({"error": {"message": None}}, "The model server answered 400."),
        ({"error": {}}, "The model server answered 400."),
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "The model server answered 400."),
        ([1, 2], "The model server answered 400."),
        (b"plain text", "The model server answered 400."),
        (b"", "The model server answered 400."),
        (b'{"error":{"message":"\xff"}}', "The model server answered 400."),
    ],
)
def test_every_shape_of_error_body_is_read(body: Any, message: str) -> None:
    assert shape(translated(400, body))["message"] == message


def test_a_code_or_param_that_is_no_text_is_left_out() -> None:
    error = translated(400, {"object": "error", "message": "m", "param": 7, "code": 400})
    assert (shape(error)["code"], shape(error)["param"]) == (None, None)


@pytest.mark.parametrize(
    ("message", "cleaned"),
    [
        ('File "/usr/lib/python3/dist-packages/sglang/srt/x.py", line 3', 'File "<path>", line 3'),
        ("at /opt/venv/lib/python3.11/site-packages/vllm/engine.py:120", "at <path>"),
        ("/models/meta-llama/Llama-3/config.json is missing", "<path> is missing"),
        ("file:///srv/models/x/config.json", "file://<path>"),
        ("see https://platform.openai.com/docs/guides/error-codes for help", None),
        ("tokens/second and 1/2/3 are fine; so is and/or", None),
        ("n must be <= 128", None),
    ],
)
def test_paths_of_the_server_are_cleaned_and_links_are_kept(message: str, cleaned: str | None) -> None:
    assert clean(message) == (message if cleaned is None else cleaned)


def test_long_messages_are_cut() -> None:
    assert len(translated(400, {"error": {"message": "x" * 100_000}}).message) <= 2000


def test_a_quoted_prompt_of_megabytes_costs_nothing() -> None:
    body = json.dumps({"error": {"message": "x/" * 10_000_000}}).encode()
    started_at = time.process_time()
    from_status(400, [], error_of(body), Fault.REQUEST, 0.0)
    assert time.process_time() - started_at < 0.5


# Retry-After.


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1", 1.0),
        (b"1.5", 1.5),
        (b" 3 ", 3.0),
        (b"120", 120.0),
        (b"86400", MAX_RETRY_AFTER_S),
        (b"0", None),
        (b"-5", None),
        (b"nan", None),
        (b"inf", None),
        (b"soon", None),
        (b"", None),
        (b"\xff", None),
        (b"Wed, 99 Foo 2025 99:99:99 GMT", None),
        (b"Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        (b"Tue, 14 Nov 2023 22:13:20 GMT", None),
        (b"Mon, 01 Jan 2001 00:00:00 GMT", None),
        (b"Fri, 31 Dec 9999 23:59:59 -2359", MAX_RETRY_AFTER_S),
    ],
)
def test_forms_of_retry_after(value: bytes, seconds: float | None) -> None:
    assert parse_retry_after([(b"retry-after", value)], NOW) == seconds


def test_milliseconds_come_first() -> None:
    headers = [(b"retry-after", b"9"), (b"retry-after-ms", b"250")]
    assert parse_retry_after(headers, NOW) == 0.25
    assert parse_retry_after([(b"retry-after", b"9"), (b"retry-after-ms", b"x")], NOW) == 9.0


def test_no_header_no_wait() -> None:
    assert parse_retry_after([], NOW) is None


@given(st.floats(NOW - 1000, NOW + 1000))
def test_a_date_is_read_as_the_time_until_then(unix_s: float) -> None:
    whole = int(unix_s)
    found = parse_retry_after([(b"retry-after", email.utils.formatdate(whole, usegmt=True).encode())], NOW)
    assert found == (min(whole - NOW, MAX_RETRY_AFTER_S) if whole > NOW else None)


@given(st.binary(max_size=40) | st.text("0123456789 ,:+-eEGMTJanFriMon", max_size=40).map(str.encode))
def test_no_value_breaks_the_reading(value: bytes) -> None:
    found = parse_retry_after([(b"retry-after", value)], NOW)
    assert found is None or 0 < found <= MAX_RETRY_AFTER_S


# Errors inside a stream.


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ({"message": "The request queue is full.", "code": 503}, 503),
        ({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}, 400),
        ({"message": "m", "code": 429}, 429),
        ({"message": "m", "code": 401}, 502),
        ({"message": "m", "code": 500}, 502),
        ({"message": "m"}, 502),
        ({"message": "m", "code": "server_error"}, 502),
        ({"message": "m", "code": None}, 502),
        ({"message": "m", "code": 200}, 502),
        ({"message": "m", "code": True}, 502),
        ({"message": "m", "code": 1e30}, 502),
        ({}, 502),
    ],
)
def test_a_numeric_code_of_an_error_event_is_its_status(event: dict[str, Any], status: int) -> None:
    said = from_stream_event(event)
    fault = DIALECTS["openai"].judge_error(said.upstream_status, said.fields)
    error = from_status(said.upstream_status, [], said.fields, fault, NOW)
    assert error.status == status
    shape(error)


def test_an_error_event_of_any_depth_is_read() -> None:
    nested: Any = "bottom"
    for _ in range(1000):
        nested = [nested]
    assert shape(from_stream_event({"message": nested, "code": 400}))["message"] == "The model server answered 400."


# Connections.


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (ConnectFailed, 502, "upstream_unreachable"),
        (ConnectTimeout, 502, "upstream_unreachable"),
        (PoolTimeout, 503, "overloaded"),
        (HeadTimeout, 504, "upstream_timeout"),
        (IdleTimeout, 504, "upstream_timeout"),
        (Disconnected, 502, "upstream_disconnected"),
        (ProtocolViolation, 502, "upstream_disconnected"),
    ],
)
def test_a_broken_connection_is_told_without_its_address(kind: type[UpstreamError], status: int, code: str) -> None:
    error = from_connection(kind("10.1.2.3:30000", "head", "reset"))
    assert (error.status, error.code) == (status, code)
    assert "10.1.2.3" not in shape(error)["message"]
