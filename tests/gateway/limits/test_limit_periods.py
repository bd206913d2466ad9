"""A day or a month that ends while a request runs: from the plan to the count of a limiter, and to the record."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gateway.admission.records import Records
from gateway.admission.spend import SpendKeeper
from gateway.config import Settings
from gateway.keys.principal import Principal
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.plan import Plan, Planner, SpendBook
from gateway.limits.sets import LimitSet
from gateway.store.limits import Cost
from gateway.store.memory_limits import Limiter
from tests.support.client import until
from tests.support.serving import settings_for

MIDNIGHT_S = int(datetime(2026, 12, 1, tzinfo=UTC).timestamp())
"""The end of a day and of a month."""
LEASE_US = 60_000_000
KEY = "{t:acme}:k:key_1"
DOLLAR = 1_000_000


class Desk:
    """A planner and a limiter on one clock, whose 0 is midnight."""

    def __init__(self, **limits: Any) -> None:
        backends = {"pool": {"engine": "vllm", "replicas": [{"url": "http://a"}]}}
        self.planner = Planner(Settings.model_validate({"backends": backends}))
        self.limiter = Limiter()
        key = KeyRecord("key_1", b"", "acme", limits=LimitSet(**limits))
        self.principal = Principal(key, TenantRecord("acme"))
        self.plans: dict[str, Plan] = {}

    def plan(self, at_s: float) -> Plan:
        return self.planner.plan(self.principal, "chat", MIDNIGHT_S + at_s)

    def admits(self, id: str, dollars: float, at_s: float) -> bool:
        self.plans[id] = plan = self.plan(at_s)
        cost = Cost(micros=round(dollars * DOLLAR))
        return self.limiter.admit(id, plan.scopes, cost, LEASE_US, _us(at_s)).admitted

    def settle(self, id: str, reserved: float, used: float, at_s: float) -> bool:
        before, after = Cost(micros=round(reserved * DOLLAR)), Cost(micros=round(used * DOLLAR))
        return self.limiter.settle(id, self.plans[id].scopes, before, after, _us(at_s))


def _us(at_s: float) -> int:
    return MIDNIGHT_S * 1_000_000 + round(at_s * 1_000_000)


def test_a_new_day_begins_with_all_its_money_and_pays_for_what_ends_in_it() -> None:
    desk = Desk(usd_per_day=1.0)
    assert desk.admits("spent", 0.4, -20)
    assert desk.settle("spent", 0.4, 0.4, -15)
    assert desk.admits("over midnight", 0.6, -10)
    assert not desk.admits("too much", 0.01, -1)
    assert not desk.admits("beside it", 0.41, 1)  # what runs is still reserved
    assert desk.admits("new day", 0.3, 1)  # and what the day before has spent is not
    assert desk.settle("over midnight", 0.6, 0.5, 5)
    assert not desk.admits("more than is left", 0.21, 6)
    assert desk.admits("what is left", 0.2, 6)
    assert desk.settle("new day", 0.3, 0.3, 7)
    assert desk.settle("what is left", 0.2, 0.2, 7)
    assert not desk.admits("nothing is left", 0.000001, 8)
    assert desk.admits("the day after", 1.0, 86_400)


def test_what_ends_after_midnight_before_anybody_comes_reaches_the_new_day_by_the_record() -> None:
    desk = Desk(usd_per_day=1.0, usd_per_month=1.0)
    assert desk.admits("over midnight", 0.6, -10)
    assert desk.settle("over midnight", 0.6, 0.6, 5)
    desk.planner.book.note({(KEY, "d20261201"): 600_000, (KEY, "m202612"): 600_000})
    assert not desk.admits("a", 0.41, 6)
    assert desk.admits("b", 0.4, 6)


def test_a_plan_from_before_midnight_does_not_bring_the_old_day_back() -> None:
    desk = Desk(usd_per_day=1.0)
    assert desk.admits("a", 1.0, -10)
    assert desk.settle("a", 1.0, 1.0, -5)
    old = desk.plan(-1)
    assert desk.admits("b", 0.7, 1)
    assert desk.settle("b", 0.7, 0.7, 2)
    cost = Cost(micros=300_000)  # by a gateway whose clock is behind
    assert desk.limiter.admit("late", old.scopes, cost, LEASE_US, _us(3)).admitted
    assert desk.limiter.settle("late", old.scopes, cost, cost, _us(4))
    assert not desk.admits("c", 0.01, 5)


async def test_the_record_books_it_where_it_ended(tmp_path: Path) -> None:
    desk = Desk(usd_per_day=1.0)
    records = Records(settings_for(["http://127.0.0.1:9"], database=f"sqlite:///{tmp_path / 'tidegate.db'}"))
    keeper = SpendKeeper(records, SpendBook(), "g1")
    begun_with = desk.plan(-10)
    keeper.spent(begun_with, 200_000, MIDNIGHT_S - 1)
    keeper.spent(begun_with, 300_000, MIDNIGHT_S + 5)
    keeper.start()
    await until(lambda: keeper.waiting_micros == 0, 20.0)
    await keeper.aclose()
    places = [(KEY, period) for period in ("d20261130", "m202611", "d20261201", "m202612")]
    found = records.database().spend.totals(places)
    records.close()
    assert [found[place] for place in places] == [200_000, 200_000, 300_000, 300_000]
