"""Each trouble, its severity, and how long it has been there."""

from __future__ import annotations

from math import log

import pytest

from gateway.config.slo import Slo
from gateway.rollups.findings import CRITICAL, NOTICE, WARNING, Finding, Since, View, findings
from gateway.rollups.objective import budget_left, burning
from gateway.rollups.pulse import PoolPulse, Pulse, RentedCeiling, ReplicaPulse, SpentBudget
from gateway.rollups.series import Series
from gateway.rollups.speeds import Slow, Speeds
from gateway.rollups.tally import Tally
from gateway.rollups.view import verdict

NOW = 1_700_000_000.0


def replica(name: str, reason: str = "", state: str = "healthy", **fields: float) -> ReplicaPulse:
    found = ReplicaPulse(name, None, state, reason, 0, 0)
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def pulse(*replicas: ReplicaPulse, **fields: object) -> Pulse:
    found = Pulse(0, 1, 1.0, pools=[PoolPulse("p", list(replicas), 0, 0, 0)])
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def seen(*pulses: Pulse | None, minute: Tally | None = None, **fields: object) -> list[Finding]:
    view = View(list(enumerate(pulses)), Tally() if minute is None else minute)
    for field, value in fields.items():
        setattr(view, field, value)
    return findings(view, NOW)


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


def test_a_gateway_that_works_has_no_findings() -> None:
    assert seen(pulse(replica("a"), replica("b", state="warming"), replica("c", "full"))) == []
    assert verdict([], [pulse(replica("a"))]) == {
        "state": "healthy",
        "text": "Everything works: 1 replica in use or ready.",
    }


@pytest.mark.parametrize(
    ("reason", "severity"),
    [
        ("cooling_down", WARNING),
        ("ejected", WARNING),
        ("not_ready", WARNING),
        ("unresponsive", WARNING),
        ("stalled", WARNING),
        ("credential_refused", WARNING),
        ("draining", NOTICE),
    ],
)
def test_a_replica_that_gets_no_work_is_named_with_its_reason(reason: str, severity: str) -> None:
    found = only(seen(pulse(replica("a", reason), replica("b"))))
    assert (found.severity, found.link) == (severity, "fleet/p/a")
    assert "a" in found.what
    assert found.where == "pool p"
    assert found.advice


def test_many_replicas_with_one_trouble_are_one_finding() -> None:
    found = only(seen(pulse(*(replica(f"r{number}", "ejected") for number in range(9)), replica("b"))))
    assert found.what.startswith("9 of 10 replicas")
    assert "r0, r1, r2, r3, r4, 4 more" in found.where


def test_a_pool_without_a_replica_that_works_is_critical() -> None:
    found = {each.id: each for each in seen(pulse(replica("a", "ejected"), replica("b", "cooling_down")))}
    assert found["pool p"].severity == CRITICAL
    assert set(found) == {"pool p", "replica p/a ejected", "replica p/b cooling_down"}
    assert {each.id for each in seen(pulse(replica("a", "ejected")), pulse(replica("a")))} == {"replica p/a ejected"}


def test_a_pool_that_is_configured_without_replicas_is_said() -> None:
    assert only(seen(pulse(), pools_configured=[("empty", 0), ("p", 2)])).id == "pool empty empty"


def test_workers_that_do_not_answer() -> None:
    found = only(seen(pulse(replica("a")), None))
    assert (found.severity, found.where) == (WARNING, "worker 1")
    assert only(seen(None, None)).severity == CRITICAL


def test_a_redis_that_is_away_since_when() -> None:
    alone = pulse(replica("a"), store_mode="local", store_mode_s=12.0)
    found = only(seen(alone, redis=True))
    assert (found.id, found.severity, found.since_unix_s) == ("store", CRITICAL, NOW - 12.0)
    assert seen(pulse(replica("a"), store_mode="redis"), redis=True) == []
    assert seen(pulse(replica("a"), store_mode="memory"), redis=False) == []


def test_a_queue_is_a_notice_and_a_growing_one_a_warning() -> None:
    steady = [(0.0, {"p": 8}), (8.0, {"p": 8})]
    assert only(seen(pulse(replica("a")), lines=steady)).severity == NOTICE
    growing = [(0.0, {"p": 2}), (4.0, {"p": 8}), (8.0, {"p": 14})]
    found = only(seen(pulse(replica("a")), lines=growing))
    assert (found.severity, found.link) == (WARNING, "fleet/p")
    assert "14 requests" in found.what
    assert seen(pulse(replica("a")), lines=[(0.0, {"p": 9}), (8.0, {"p": 0})]) == []


def test_a_spent_budget_names_its_holder() -> None:
    spent = [SpentBudget("{t:acme}:k:key_1", "key", "usd_per_day", NOW, 3)]
    found = only(seen(pulse(replica("a"), spent=spent), pulse(replica("a"), spent=spent)))
    assert "tenant acme, key key_1" in found.what
    assert (found.severity, found.link) == (NOTICE, "tenants/acme")
    assert "6 requests" in found.where
    tenant = only(seen(pulse(replica("a"), spent=[SpentBudget("{t:acme}:t", "tenant acme", "usd_per_month", NOW, 1)])))
    assert tenant.what == "The budget of the month is spent: tenant acme"


def test_money_for_rented_replicas_that_is_spent() -> None:
    ceilings = [RentedCeiling("m", "hour", 9.9, 10.0), RentedCeiling("m", "day", 9.9, 100.0)]
    assert only(seen(pulse(replica("a"), ceilings=ceilings))).id == "ceiling m hour"
    assert seen(pulse(replica("a"), ceilings=[RentedCeiling("m", "hour", 0.0, 0.0)])) == []


def test_what_is_shed_and_what_is_lost() -> None:
    shed = only(seen(pulse(replica("a"), overload_level=3, overload_cause="memory"), minute=Tally(sheds={"memory": 7})))
    assert shed.severity == CRITICAL
    assert "7 requests" in shed.what
    late = only(seen(pulse(replica("a"), loop_lag_s=0.4)))
    assert "400 ms" in late.what
    lost = only(seen(pulse(replica("a")), minute=Tally(lost={"usage records": 2})))
    assert lost.what == "2 usage records were lost in the last minute"
    assert only(seen(pulse(replica("a")), minute=Tally(retries_refused=4))).id == "retries"
    assert only(seen(pulse(replica("a")), minute=Tally(turned_away={"queue_full": 4}))).id == "turned away queue_full"


def test_a_database_of_keys_that_is_away() -> None:
    away = only(seen(pulse(replica("a"), keys_wanted=True, keys_age_s=9.0)))
    assert (away.severity, away.since_unix_s) == (CRITICAL, NOW - 9.0)
    assert only(seen(pulse(replica("a"), keys_wanted=True))).what == "The database of keys was never read"
    assert seen(pulse(replica("a"), keys_wanted=True, keys_age_s=0.6)) == []
    assert only(seen(pulse(replica("a"), spend_failing=True))).id == "spend"


def test_the_worst_comes_first_and_each_keeps_its_beginning() -> None:
    since = Since()

    def find(id: str, severity: str) -> Finding:
        return Finding(id, severity, "what", "where", "advice")

    since.note([find("b", WARNING)], 100.0)
    found = since.note([find("n", NOTICE), find("b", WARNING), find("c", CRITICAL), find("a", WARNING)], 110.0)
    assert [(each.id, each.since_unix_s) for each in found] == [("c", 110.0), ("b", 100.0), ("a", 110.0), ("n", 110.0)]
    assert since.note([], 120.0) == []
    assert since.note([find("b", WARNING)], 130.0)[0].since_unix_s == 130.0


# -- slow replicas


def paced(times_s: dict[str, float], count: int) -> Pulse:
    """Each has answered `count` streams, all in its own time."""
    replicas = [replica(name, streams=count, streams_log_s=count * log(time_s)) for name, time_s in times_s.items()]
    return pulse(*replicas)


def test_a_replica_that_is_slower_than_its_peers_is_found_after_few_answers() -> None:
    speeds, usual = Speeds(), {"a": 0.2, "b": 0.2, "c": 0.22}
    before = paced(usual, 50)
    speeds.take(None, before, 0.0)
    assert speeds.slow(before.pools, 0.0) == []
    slow = paced(usual, 54)
    slow.pools[0].replicas[2].streams_log_s = 50 * log(0.22) + 4 * log(2.0)
    speeds.take(before, slow, 1.0)
    (found,) = speeds.slow(slow.pools, 1.0)
    assert (found.replica, found.streams, found.waiting) == ("c", True, False)
    assert found.usual_s > 3 * found.peers_s == pytest.approx(0.6)
    assert speeds.slow(slow.pools, 400.0) == []  # nobody has used it for long: it may be well again


def test_a_stream_that_waits_shows_a_slow_replica_before_it_answers() -> None:
    speeds = Speeds()
    state = paced({"a": 0.1, "b": 0.1}, 20)
    speeds.take(None, state, 0.0)
    state.pools[0].replicas[0].waiting, state.pools[0].replicas[0].oldest_s = 1, 0.55
    assert speeds.slow(state.pools, 0.0) == []
    state.pools[0].replicas[0].oldest_s = 2.0
    (found,) = speeds.slow(state.pools, 0.0)
    assert found == Slow("p", "a", 2.0, found.peers_s, streams=True, waiting=True)
    assert found.peers_s == pytest.approx(0.1)


def test_many_replicas_are_compared_with_the_median_of_the_others() -> None:
    speeds, usual = Speeds(), {f"r{number}": 0.1 + number / 1000 for number in range(40)}
    state = paced({**usual, "slow": 0.5}, 20)
    speeds.take(None, state, 0.0)
    (found,) = speeds.slow(state.pools, 0.0)
    assert found.replica == "slow"
    assert found.peers_s == pytest.approx(0.1195, rel=1e-3)


def test_one_replica_alone_or_with_few_answers_is_not_judged() -> None:
    speeds = Speeds()
    alone = paced({"a": 9.0}, 100)
    speeds.take(None, alone, 0.0)
    assert speeds.slow(alone.pools, 0.0) == []
    few = Speeds()
    state = paced({"a": 9.0, "b": 0.1}, 4)
    few.take(None, state, 0.0)
    assert few.slow(state.pools, 0.0) == []


def test_small_differences_are_no_findings() -> None:
    speeds = Speeds()
    state = paced({"a": 0.001, "b": 0.02, "c": 0.001}, 100)  # twenty times, and only 19 ms
    speeds.take(None, state, 0.0)
    assert speeds.slow(state.pools, 0.0) == []


# -- the objective


def counted(good: int, bad: int, seconds_ago: float, series: Series | None = None) -> Series:
    series = Series() if series is None else series
    series.add(Tally(10.0, requests={"completed": good, "upstream_error": bad, "rejected": 1000}), NOW - seconds_ago)
    return series


def test_the_error_budget_that_is_left() -> None:
    slo = Slo(availability=0.99)
    assert budget_left(slo, Series(), NOW) is None
    assert budget_left(slo, counted(1000, 0, 60), NOW) == 1.0
    assert budget_left(slo, counted(995, 5, 60), NOW) == pytest.approx(0.5)
    assert budget_left(slo, counted(980, 20, 60), NOW) == pytest.approx(-1.0)
    assert budget_left(Slo(availability=0.99, window="hour"), counted(980, 20, 7200), NOW) is None


def test_a_fast_burn_needs_both_windows_and_more_than_a_few_failures() -> None:
    slo = Slo()
    assert only(burning(slo, counted(900, 100, 30), NOW)).severity == CRITICAL
    assert burning(slo, counted(900, 100, 1900), NOW) == []  # it was, and is over
    assert burning(slo, counted(3, 4, 30), NOW) == []
    mostly_good = counted(1_000_000, 0, 3000, counted(900, 100, 30))
    assert burning(slo, mostly_good, NOW) == []
    assert only(burning(slo, counted(99_000, 1000, 1000), NOW)).severity == WARNING


def test_answers_that_begin_later_than_promised() -> None:
    series = Series()
    series.add(Tally(10.0, ttft={90: 100}), NOW - 30)
    assert burning(Slo(), series, NOW) == []
    assert only(burning(Slo(ttft_p95_ms=500), series, NOW)).id == "ttft"
    assert burning(Slo(ttft_p95_ms=60_000), series, NOW) == []
