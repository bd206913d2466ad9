"""Which requests are traced: the ratio, a caller's decision, what is kept at the end, and the bound on all of it."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config.telemetry import Telemetry
from gateway.record import Attempt, Exchange, Outcome
from gateway.telemetry.tracing import SpanBudget, Tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Kept:
    """A sink that notes what it gets."""

    def __init__(self, error: Exception | None = None) -> None:
        self.found: list[tuple[str, str]] = []
        self._error = error

    def put(self, exchange: Exchange, kept: str) -> None:
        self.found.append((exchange.request_id, kept))
        if self._error is not None:
            raise self._error


def tracing(sink: Kept | None = None, **fields: Any) -> Tracing:
    return Tracing(Telemetry(endpoint="http://127.0.0.1:4318", **fields), sink or Kept())


def parent(sampled: bool, trace: str = TRACE) -> list[tuple[bytes, bytes]]:
    return [(b"traceparent", f"00-{trace}-{SPAN}-0{int(sampled)}".encode())]


def ended(decided: Tracing, headers: list[tuple[bytes, bytes]] | None = None, **fields: Any) -> Exchange:
    """An exchange that took a second, completed at its first attempt, unless told otherwise; settled."""
    exchange = Exchange("req_1", "/v1/chat/completions", 100.0, 0.0, model="m", attempts=1)
    exchange.outcome, exchange.finished_at = Outcome.COMPLETED, 101.0
    exchange.tries = (Attempt("pool", "pool-0", "", 100.0),)
    exchange.traced = decided.begin(headers or [])
    for name, value in fields.items():
        setattr(exchange, name, value)
    decided.settled(exchange, exchange.traced)
    return exchange


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_the_ratio_holds_by_trace_id(ratio: float) -> None:
    decided = tracing(ratio=ratio)
    found = [decided.begin([]) for _ in range(4000)]
    assert sum(each.sampled for each in found) / 4000 == pytest.approx(ratio, abs=0.05)
    assert all(each.sampled == ((each.trace_id & (2**64 - 1)) < ratio * 2**64) for each in found)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_trusted_parent_decides(sampled: bool) -> None:
    for ratio in (0.0, 1.0):
        found = tracing(ratio=ratio, trust_parent=True).begin(parent(sampled))
        assert (found.sampled, found.trace_id, found.parent_id) == (sampled, int(TRACE, 16), int(SPAN, 16))


def test_no_client_can_have_more_of_its_requests_traced_than_others() -> None:
    decided = tracing(ratio=0.2)
    lowest = "0" * 31 + "1"  # by its trace id alone it would always be sampled
    for headers in (parent(True), parent(False), parent(True, lowest)):
        found = [decided.begin(headers) for _ in range(2000)]
        assert sum(each.sampled for each in found) / 2000 == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, ""),
        ({"outcome": Outcome.REJECTED}, ""),
        ({"outcome": Outcome.UPSTREAM_REJECTED}, ""),
        ({"outcome": Outcome.CLIENT_LEFT}, ""),
        ({"outcome": Outcome.UPSTREAM_ERROR}, "error"),
        ({"outcome": Outcome.UPSTREAM_INTERRUPTED}, "error"),
        ({"outcome": Outcome.UNAVAILABLE}, "error"),
        ({"outcome": Outcome.TIMEOUT}, "error"),
        ({"outcome": Outcome.DRAINED}, "error"),
        ({"outcome": Outcome.INTERNAL}, "error"),
        ({"attempts": 2}, "retried"),
        ({"attempts": 2, "hedged": True}, "hedged"),
        ({"attempts": 2, "continuations": 1}, "continued"),
        ({"finished_at": 105.5}, "slow"),
    ],
)
def test_what_was_left_out_is_kept_if_it_was_unusual(fields: dict[str, Any], why: str) -> None:
    sink = Kept()
    ended(tracing(sink, ratio=0.0, keep_slower_than_s=5.0), **fields)
    assert sink.found == ([("req_1", why)] if why else [])
    sink.found.clear()
    ended(tracing(sink, ratio=0.0, keep_slower_than_s=None, keep_unusual=False), **fields)
    assert sink.found == []


def test_what_is_sampled_is_kept_for_that() -> None:
    sink = Kept()
    ended(tracing(sink, ratio=1.0), outcome=Outcome.TIMEOUT)
    assert sink.found == [("req_1", "sampled")]


def test_spans_in_a_second_are_bounded_and_the_rest_is_counted() -> None:
    sink = Kept()
    decided = tracing(sink, ratio=1.0, max_spans_per_s=10)
    for _ in range(15):  # of two spans each
        ended(decided)
    assert len(sink.found) == 10
    assert decided.over_budget == 10
    ended(decided, finished_at=101.5)
    assert len(sink.found) == 11


def test_the_budget_grows_with_time_up_to_two_seconds_worth_and_never_back() -> None:
    budget = SpanBudget(10.0)
    assert [budget.take(20, 50.0), budget.take(1, 50.0)] == [True, False]
    assert [budget.take(5, 50.5), budget.take(1, 50.5)] == [True, False]
    assert not budget.take(1, 40.0)
    assert [budget.take(20, 1e6), budget.take(1, 1e6)] == [True, False]


def test_a_defect_in_making_spans_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    decided = tracing(Kept(ValueError("x")), ratio=1.0)
    for _ in range(3):
        ended(decided)
    assert decided.defects == 3
    assert len(caplog.records) == 1
