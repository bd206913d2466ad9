"""What happened when, from the times of a record."""

from __future__ import annotations

from typing import Any

from gateway.inspection.timeline import timeline
from gateway.record import Attempt, Exchange


def exchange(*tries: Attempt, **fields: Any) -> Exchange:
    return Exchange("req_1", "/v1/chat/completions", 10.0, 1000.0, read_at=10.1, tries=tries, **fields)


def attempt(begun: float, sent: float | None, came: float | None, ended: float | None, code: str = "") -> Attempt:
    return Attempt("pool", "r", "cold", begun, 0, sent, sent, came, ended, code)


def phases(told: dict[str, Any]) -> list[tuple[str, float, float | None, int | None]]:
    return [(each["name"], each["start_ms"], each["end_ms"], each["attempt"]) for each in told["phases"]]


def test_a_stream_that_waited_in_line() -> None:
    record = exchange(
        attempt(12.0, 12.1, 12.5, 14.0),
        stream=True,
        queued_at=10.2,
        queue_s=1.5,
        finished_at=14.1,
        first_content_at=12.5,
    )
    assert phases(timeline(record, 99.0)) == [
        ("read", 0.0, 100.0, None),
        ("decide", 100.0, 200.0, None),
        ("queue", 200.0, 1700.0, None),
        ("decide", 1700.0, 2000.0, None),
        ("connect", 2000.0, 2100.0, 0),
        ("first_token", 2100.0, 2500.0, 0),
        ("stream", 2500.0, 4000.0, 0),
        ("end", 4000.0, 4100.0, None),
    ]


def test_a_second_attempt_after_a_pause() -> None:
    record = exchange(
        attempt(10.2, None, None, 10.5, "upstream_unreachable"), attempt(11.0, 11.1, None, 12.0), finished_at=12.0
    )
    told = timeline(record, 99.0)
    assert [phase[0] for phase in phases(told)] == ["read", "decide", "connect", "pause", "connect", "answer", "end"]
    assert phases(told)[3] == ("pause", 500.0, 1000.0, None)
    assert [each["code"] for each in told["attempts"]] == ["upstream_unreachable", None]


def test_one_that_was_refused_asked_nobody() -> None:
    assert phases(timeline(exchange(finished_at=10.3), 99.0)) == [
        ("read", 0.0, 100.0, None),
        ("decide", 100.0, 300.0, None),
    ]


def test_one_under_way_has_no_end() -> None:
    told = timeline(exchange(attempt(10.2, 10.3, 10.4, None), stream=True), 11.0)
    assert phases(told)[-1] == ("stream", 400.0, None, 0)
    assert told["duration_ms"] == 1000.0


def test_one_that_stands_in_line_now() -> None:
    told = timeline(exchange(), 11.0, queued_since=10.5)
    assert phases(told) == [("read", 0.0, 100.0, None), ("decide", 100.0, 500.0, None), ("queue", 500.0, None, None)]


def test_one_between_two_attempts() -> None:
    told = timeline(exchange(attempt(10.2, 10.3, None, 10.4, "upstream_failed")), 11.0)
    assert phases(told)[-1] == ("pause", 400.0, None, None)
