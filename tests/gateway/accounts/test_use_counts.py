"""What tenants have used: counted in workers, collected without loss, kept in bounded steps of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backends.usage import Usage
from gateway.accounts.cost_store import DAY_S, HOUR_S, MAX_ROWS_A_STEP, MINUTE_S, CostStore, span
from gateway.accounts.cost_table import csv_of
from gateway.accounts.costs import Costs, both
from gateway.accounts.counts import FIELDS, MAX_TENANTS, OTHER, Counted, UseCounts, as_amounts
from gateway.record import Exchange
from gateway.sources import Silent

T = 1_795_000_000.0


def exchange(tenant: str = "acme", usage: Usage | None = None, **fields: Any) -> Exchange:
    used = Usage(100, 20, 40) if usage is None else usage
    found = Exchange("req_1", "/v1/chat/completions", 0.0, T, tenant=tenant, model="chat", pool="own", usage=used)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def amounts(**fields: int) -> list[int]:
    return [fields.get(name, 0) for name in FIELDS]


class Worker:
    """A source that answers with counts."""

    index = 0

    def __init__(self) -> None:
        self.counts = UseCounts()
        self.silent = False
        self.lose_the_answer = False

    async def costs(self, life: str, turn: int) -> Counted:
        if self.silent:
            raise Silent("it does not answer")
        answer = self.counts.since(life, turn)
        if self.lose_the_answer:
            raise Silent("the answer is lost")
        return answer


def costs_of(worker: Worker, folder: Path | None, clock: float = T) -> Costs:
    return Costs([worker], folder, lambda: clock)  # type: ignore[list-item]


def test_tokens_of_each_kind_and_rounded_money_are_counted() -> None:
    counts = UseCounts()
    counts.observe(exchange(cost_usd=0.0000014), rented=False)
    counts.observe(exchange(cost_usd=0.0000016, usage_estimated=True), rented=False)
    counts.observe(exchange(usage=Usage(7, 3, None)), rented=False)
    counts.observe(exchange(cost_usd=0.5, spill="late"), rented=True)
    refused = exchange()
    refused.usage = None
    counts.observe(refused, rented=False)
    own, rented = counts.since("", 0).rows
    assert as_amounts(own.amounts) == {
        "requests": 3,
        "prompt": 207,
        "cached": 80,
        "cache_write": 0,
        "completion": 43,
        "estimated": 1,
        "unpriced": 10,
        "micros": 3,
        "spilled": 0,
        "spilled_micros": 0,
    }
    assert (rented.rented, rented.amounts[7], rented.amounts[8], rented.amounts[9]) == (True, 500_000, 1, 500_000)


def test_only_so_many_tenants_are_told_apart_and_the_sum_stays_right() -> None:
    counts = UseCounts()
    for number in range(MAX_TENANTS + 50):
        counts.observe(exchange(f"t{number}", cost_usd=0.000001), rented=False)
    rows = counts.since("", 0).rows
    assert len(rows) == MAX_TENANTS + 1
    assert next(row for row in rows if row.tenant == OTHER).amounts[0] == 50
    assert sum(row.amounts[7] for row in rows) == MAX_TENANTS + 50


def test_only_what_has_grown_is_told_again() -> None:
    counts = UseCounts()
    counts.observe(exchange("a"), rented=False)
    counts.observe(exchange("b"), rented=False)
    first = counts.since("", 0)
    assert [row.tenant for row in first.rows] == ["a", "b"]
    counts.observe(exchange("b"), rented=False)
    assert [row.tenant for row in counts.since(first.life, first.turn).rows] == ["b"]
    assert [row.tenant for row in counts.since(first.life, first.turn).rows] == ["b"]  # the answer before was lost
    assert len(counts.since("another life", first.turn).rows) == 2


async def test_a_lost_answer_a_silent_worker_and_a_new_one_cost_nothing(tmp_path: Path) -> None:
    worker = Worker()
    costs = costs_of(worker, tmp_path)

    async def total() -> int:
        await costs.collect(0.0)
        answer, _ = await costs.report("tenant", "hour", {}, 10)
        return int(answer["totals"]["requests"])

    worker.counts.observe(exchange(), rented=False)
    assert await total() == 1
    worker.counts.observe(exchange(), rented=False)
    worker.lose_the_answer = True
    assert await total() == 1
    worker.lose_the_answer = False
    assert await total() == 2
    worker.silent = True
    assert await total() == 2
    worker.silent, worker.counts = False, UseCounts()  # it was replaced
    worker.counts.observe(exchange(), rented=False)
    assert await total() == 3
    await costs.aclose()
    kept = costs_of(Worker(), tmp_path)
    answer, rows = await kept.report("tenant", "month", {"tenant": "acme"}, 10)
    assert (answer["totals"]["requests"], rows[0]["requests"]) == (3, 3)
    await kept.aclose()


async def test_own_and_rented_spill_and_names_add_up(tmp_path: Path) -> None:
    worker = Worker()
    for tenant, usd in (("a", 0.25), ("b", 0.5), ("c", 0.125)):
        worker.counts.observe(exchange(tenant, cost_usd=usd), rented=False)
        worker.counts.observe(exchange(tenant, cost_usd=1.0, spill="late", pool="far"), rented=True)
    costs = costs_of(worker, tmp_path)
    answer, rows = await costs.report("tenant", "hour", {}, 2)
    assert ([row["name"] for row in rows], answer["names"]) == (["b", "a"], 3)
    totals = answer["totals"]
    assert (totals["own"]["usd"], totals["rented"]["usd"], totals["usd"]) == (0.875, 3.0, 3.875)
    assert (totals["spilled_usd"], totals["spilled_requests"]) == (3.0, 3)
    assert totals["tokens_per_usd"] == round(720 / 3.875, 1)
    series = answer["series"]
    assert (sum(series["own_usd"]), sum(series["rented_usd"])) == (0.875, 3.0)
    assert sum(series["rest_usd"]) == 1.125  # of c, which is not among the names
    assert {name: sum(values) for name, values in series["tokens"].items()} == {
        "prompt_uncached": 360,
        "cached": 240,
        "completion": 120,
    }
    _, rows = await costs.report("backend", "day", {"tenant": "a"}, 10)
    assert [(row["name"], row["usd"]) for row in rows] == [("far", 1.0), ("own", 0.25)]
    await costs.aclose()


def test_a_step_of_time_is_bounded_and_old_ones_go() -> None:
    store = CostStore(None)
    store.add({(f"t{number}", "m", "p", False): amounts(requests=1, micros=1) for number in range(3000)}, T)
    store.add({(f"t{number}", "m", "p", False): amounts(requests=1, micros=1) for number in range(3000)}, T)
    rows, names = store.totals("tenant", span("hour", T), {}, 5000)
    assert names <= MAX_ROWS_A_STEP
    assert sum(found[0] for _, _, found in rows) == 6000
    assert next(found[0] for name, _, found in rows if name == OTHER) == 2 * (3000 - MAX_ROWS_A_STEP + 2)
    later = T + 10 * DAY_S
    store.add({("t", "m", "p", True): amounts(requests=1)}, later)
    with store._lock:
        kept = dict(store._db.execute("SELECT step, count(*) FROM use_1 GROUP BY step").fetchall())
    assert kept == {MINUTE_S: 1, HOUR_S: 1, DAY_S: MAX_ROWS_A_STEP}
    store.close()


@pytest.mark.parametrize("content", [b"no database" * 1000, b""])
def test_a_damaged_file_is_put_aside(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "costs.sqlite3"
    file.write_bytes(content)
    store = CostStore(file)
    store.add({("t", "m", "p", False): amounts(requests=1)}, T)
    assert store.begins_unix_s() == T // DAY_S * DAY_S
    assert (tmp_path / "costs.damaged").exists() is bool(content)
    store.close()


def test_a_folder_that_cannot_be_written_costs_the_memory_of_costs_only(tmp_path: Path) -> None:
    store = CostStore(tmp_path / "none" / "costs.sqlite3")
    store.add({("t", "m", "p", False): amounts(requests=1)}, T)
    assert store.begins_unix_s() is not None
    store.close()


def test_a_spreadsheet_takes_no_name_for_a_formula() -> None:
    row = {"name": "=1+1", **both({False: amounts(requests=2, prompt=5, micros=1_500_000)})}
    text = csv_of({"by": "model", "rows": [row]})
    assert text.splitlines()[1] == "'=1+1,2,5,0,0,0,0,1.500000,1.500000,0.000000,0,0.000000,3.300000"
