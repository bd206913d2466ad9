"""The benchmark of tracing measures what it says."""

from __future__ import annotations

from loadtests.telemetry_cost import path_us


def test_each_case_costs_more_than_the_one_before() -> None:
    found = path_us(3)
    assert list(found) == ["off", "left out", "left out, in a caller's trace", "sent: spans made"]
    assert found["off"] < found["left out"] < found["sent: spans made"]
