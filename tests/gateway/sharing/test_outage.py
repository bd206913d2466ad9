"""What is said of a store that is away."""

from __future__ import annotations

import pytest

from gateway.sharing.outage import WORTH_S, Outage
from gateway.store import StoreError

AWAY = StoreError("the store is away")


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    for step in range(20):
        outage.failed(AWAY, 100.0 + step * WORTH_S / 4)
    assert [record.getMessage() for record in caplog.records] == [
        "the store is away; other workers are not heard, replicas are chosen by this worker's own counts"
    ]
    outage.ended(112.0)
    outage.ended(113.0)
    assert caplog.records[1:][0].getMessage() == "other workers are heard again after 12.0 s"
    assert len(caplog.records) == 2


def test_a_moment_is_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    outage = Outage()
    for step in range(10):
        outage.failed(AWAY, 100.0 + 10 * step)
        outage.failed(AWAY, 100.0 + 10 * step + WORTH_S / 2)
        outage.ended(101.0 + 10 * step)
    assert not caplog.records
