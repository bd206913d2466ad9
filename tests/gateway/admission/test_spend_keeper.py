"""What becomes of spend that the database will not have, and of budgets whose time is over."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.admission.records import Records
from gateway.admission.spend import SpendKeeper
from gateway.database.spend import MAX_MICROS
from gateway.limits.plan import Plan, SpendBook
from gateway.store.limits import Budget, Scope
from tests.support.client import until
from tests.support.serving import settings_for

PERIODS = [time.strftime(form, time.gmtime()) for form in ("d%Y%m%d", "m%Y%m")]


def keeper_of(folder: Path) -> tuple[SpendKeeper, Records]:
    records = Records(settings_for(["http://127.0.0.1:9"], database=f"sqlite:///{folder / 'tidegate.db'}"))
    return SpendKeeper(records, SpendBook(), "g1"), records


def plan_of(*billed: str) -> Plan:
    return Plan((), (), (), None, False, 1e12, "{t:a}", billed)


async def test_what_the_database_refuses_for_good_is_dropped_alone_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper, records = keeper_of(tmp_path)
    holders = [f"{{t:a}}:k:{number}" for number in range(9)]
    keeper.spent(plan_of(*holders), 1_000, time.time())
    keeper.spent(plan_of(holders[4]), MAX_MICROS + 1, time.time())
    keeper.spent(plan_of("not\nprintable"), 7, time.time())
    with caplog.at_level(logging.WARNING):
        keeper.start()
        await until(lambda: keeper.waiting_micros == 0, 20.0)
        keeper.spent(plan_of("not\nprintable"), 7, time.time())
        keeper.spent(plan_of(holders[0]), 500, time.time())
        await keeper.aclose()
    assert keeper.waiting_micros == 0
    assert keeper.lost_micros == 2 * (MAX_MICROS + 1 + 1_000) + 4 * 7  # of the day and of the month
    totals = records.database().spend.totals([(holder, period) for holder in holders for period in PERIODS])
    records.close()
    assert {totals[holders[4], period] for period in PERIODS} == {0}
    assert {totals[holders[0], period] for period in PERIODS} == {1_500}
    assert all(totals[holder, period] == 1_000 for holder in holders[1:] if holder != holders[4] for period in PERIODS)
    assert len([record for record in caplog.records if "refuses" in record.message]) == 1
    assert not keeper.failing


async def test_a_batch_that_was_refused_in_part_counts_once_however_often_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, records = keeper_of(tmp_path)
    database = records.database()
    spend = database.spend
    read: Any = spend.totals
    left = 2

    def totals(keys: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError("the answer was lost")
        return read(keys)

    monkeypatch.setattr(spend, "totals", totals)
    keeper.spent(plan_of("{t:a}:k:1", "{t:a}:k:2", "not\nprintable"), 1_000, time.time())
    keeper.start()
    await until(lambda: keeper.waiting_micros == 0, 20.0)
    assert keeper.lost_micros == 2_000
    found = read([(f"{{t:a}}:k:{number}", period) for number in (1, 2) for period in PERIODS])
    assert set(found.values()) == {1_000}
    await keeper.aclose()
    records.close()


async def test_budgets_of_days_that_are_over_are_read_no_more(tmp_path: Path) -> None:
    keeper, records = keeper_of(tmp_path)
    today = time.strftime("d%Y%m%d", time.gmtime())
    month = time.strftime("m%Y%m", time.gmtime())
    budgets = tuple(Budget(period, 1_000_000, 0, 2**52) for period in ("d20200101", "m202001", today, month))
    await keeper.learn([Scope("{t:a}:t", budgets=budgets)])
    assert len(keeper._watched) == 4
    keeper.start()
    await until(lambda: len(keeper._watched) <= 2, 20.0)
    now = {time.strftime("d%Y%m%d", time.gmtime()), time.strftime("m%Y%m", time.gmtime())}
    assert {period for _, period in keeper._watched} <= {today, month} | now
    await keeper.aclose()
    records.close()
