"""Headers of what is left, and what a refused request is told."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway.config import Settings
from gateway.errors import GatewayError, Overloaded
from gateway.keys.principal import Principal
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.errors import MAX_GUESS_S, InsufficientQuota, RateLimited, refusal_error
from gateway.limits.headers import go_duration, ratelimit_headers
from gateway.limits.plan import Plan, Planner
from gateway.limits.sets import LimitSet
from gateway.store.limits import Admission, Cost, Refusal
from gateway.store.memory_limits import Limiter

NOW_US = 1_795_000_000_000_000
NOW_S = NOW_US / 1e6
SECOND = 1_000_000


def plan_of(key: LimitSet, tenant: LimitSet | None = None) -> Plan:
    principal = Principal(
        KeyRecord("key_1", b"", "acme", limits=key), TenantRecord("acme", limits=tenant or LimitSet())
    )
    return Planner(Settings()).plan(principal, "chat", NOW_S)


def admission(*marks_in_us: int, refusals: tuple[Refusal, ...] = ()) -> Admission:
    return Admission(not refusals, NOW_US, tuple(NOW_US + mark for mark in marks_in_us), (), (), refusals)


def headers_of(error: GatewayError) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in error.headers()}


def shown(plan: Plan, answer: Admission) -> dict[str, str]:
    return {
        name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in ratelimit_headers(plan, answer)
    }


def parsed_by_go(text: str) -> float:
    """Seconds, by the grammar of Go's time.ParseDuration."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    assert re.fullmatch(r"(\d+(\.\d*)?(h|ms|m|s))+", text), text
    return sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d*)?)(h|ms|m|s)", text))


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (-5, b"0s"),
        (0, b"0s"),
        (1, b"1ms"),
        (12_000, b"12ms"),
        (999_001, b"1s"),
        (SECOND, b"1s"),
        (1_500_000, b"1.5s"),
        (59_999_999, b"1m0s"),
        (360 * SECOND, b"6m0s"),
        (3605 * SECOND + 250_000, b"1h0m5.25s"),
    ],
)
def test_durations_are_written_as_go_writes_them(us: int, text: bytes) -> None:
    assert go_duration(us) == text


@given(us=st.integers(min_value=-(10**6), max_value=10**14))
def test_a_duration_reads_back_rounded_up_to_a_millisecond(us: int) -> None:
    read = parsed_by_go(go_duration(us).decode())
    assert max(us, 0) / 1e6 - 1e-6 <= read < max(us, 0) / 1e6 + 0.001 + 1e-6


def test_a_full_limit_shows_its_burst_and_no_time() -> None:
    plan = plan_of(LimitSet(requests_per_minute=60))
    assert shown(plan, admission(-5)) == {"limit-requests": "60", "remaining-requests": "10", "reset-requests": "0s"}


def test_what_was_taken_is_taken_off() -> None:
    plan = plan_of(LimitSet(requests_per_minute=60, tokens_per_minute=6000))
    assert shown(plan, admission(3 * SECOND, 2 * SECOND)) == {
        "limit-requests": "60",
        "remaining-requests": "7",
        "reset-requests": "3s",
        "limit-tokens": "6000",
        "remaining-tokens": "800",
        "reset-tokens": "2s",
    }


def test_the_rounding_of_a_store_takes_no_request_away() -> None:
    plan = plan_of(LimitSet(requests_per_minute=42))  # burst 7, charged 1,428,572 us each: a little too much
    assert shown(plan, admission(3 * 1_428_572))["remaining-requests"] == "4"


def test_the_tightest_limit_is_shown_and_debt_is_not_negative() -> None:
    plan = plan_of(LimitSet(requests_per_minute=60, tokens_per_minute=6000), LimitSet(requests_per_minute=600))
    answer = shown(plan, admission(0, 100 * SECOND, 95 * SECOND))
    assert (answer["limit-requests"], answer["remaining-requests"], answer["reset-requests"]) == ("600", "0", "1m35s")
    assert (answer["limit-tokens"], answer["remaining-tokens"], answer["reset-tokens"]) == ("6000", "0", "1m40s")


def test_shadow_limits_and_other_kinds_are_not_shown() -> None:
    plan = plan_of(LimitSet(requests_per_minute=6, shadow=True), LimitSet(concurrent_requests=3, usd_per_day=1))
    assert shown(plan, admission(0)) == {}
    plan = plan_of(LimitSet(requests_per_minute=6, shadow=True), LimitSet(requests_per_minute=60))
    assert shown(plan, admission(0, 4 * SECOND))["remaining-requests"] == "6"


@given(mark=st.integers(-(10**9), 10**9), limit=st.integers(1, 10**6))
def test_remaining_lies_between_nothing_and_the_burst(mark: int, limit: int) -> None:
    plan = plan_of(LimitSet(requests_per_minute=limit))
    assert 0 <= int(shown(plan, admission(mark))["remaining-requests"]) <= plan.scopes[0].rates[0].burst


def test_a_refusal_names_limit_scope_figure_request_and_time() -> None:
    plan = plan_of(LimitSet(), LimitSet(requests_per_minute=60, tokens_per_minute=6000))
    refusals = (Refusal(0, "requests", SECOND), Refusal(0, "total", 61_234_567))
    error = refusal_error(plan, admission(0, 0, refusals=refusals), Cost(1, 20, 30, 50))
    assert isinstance(error, RateLimited)
    assert (error.status, error.type, error.code) == (429, "tokens", "rate_limit_exceeded")
    assert error.message == (
        "Rate limit reached for tenant acme on tokens per minute: limit 6000, requested 50. "
        "Please try again in 1m1.235s."
    )
    assert headers_of(error) == {"retry-after": "62", "retry-after-ms": "61235"}


def test_a_refusal_of_requests_has_their_type_and_a_second_at_least() -> None:
    plan = plan_of(LimitSet(requests_per_minute=6000))
    error = refusal_error(plan, admission(0, refusals=(Refusal(0, "requests", 1),)), Cost())
    assert (error.type, headers_of(error)) == ("requests", {"retry-after": "1", "retry-after-ms": "1"})


def test_shadow_refusals_are_not_told() -> None:
    plan = plan_of(LimitSet(requests_per_minute=1, shadow=True), LimitSet(requests_per_minute=60))
    refusals = (Refusal(0, "requests", 60 * SECOND, shadow=True), Refusal(1, "requests", 2 * SECOND))
    error = refusal_error(plan, admission(0, 0, refusals=refusals), Cost())
    assert "tenant acme" in error.message
    assert headers_of(error)["retry-after"] == "2"


def test_a_request_that_never_fits_is_told_by_how_much_and_not_to_come_back() -> None:
    plan = plan_of(LimitSet(tokens_per_minute=6000))
    refusals = (Refusal(0, "total", -1), Refusal(0, "requests", SECOND))
    error = refusal_error(plan, admission(0, refusals=refusals), Cost(1, 7000, 500, 7500))
    assert (error.type, error.code) == ("tokens", "rate_limit_exceeded")
    assert "limit 6000, at most 6000 in one request, requested 7500, which is 1500 too many" in error.message
    assert headers_of(error) == {"x-should-retry": "false"}


def test_spent_money_is_insufficient_quota() -> None:
    plan = plan_of(LimitSet(usd_per_day=0.5))
    period = plan.scopes[0].budgets[0].period
    error = refusal_error(plan, admission(refusals=(Refusal(0, period, -1),)), Cost(micros=12))
    assert isinstance(error, InsufficientQuota)
    body = msgspec.json.decode(error.body())["error"]
    assert (body["type"], body["code"], body["param"]) == ("insufficient_quota", "insufficient_quota", None)
    assert "quota of key: $0.50 per day (UTC)" in body["message"]
    assert headers_of(error) == {"x-should-retry": "false"}


@pytest.mark.parametrize("limits", [LimitSet(usd_per_month=2), LimitSet(concurrent_requests=2)])
def test_what_others_hold_is_asked_for_again_soon(limits: LimitSet) -> None:
    plan = plan_of(limits)
    limit = plan.scopes[0].budgets[0].period if plan.scopes[0].budgets else "concurrent"
    error = refusal_error(plan, admission(refusals=(Refusal(0, limit, 60 * SECOND),)), Cost(micros=12))
    assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
    assert error.retry_after_s == MAX_GUESS_S
    assert ("$2.00 per month" if limit != "concurrent" else "limit 2") in error.message


def test_an_echo_gets_an_answer_too() -> None:
    error = refusal_error(plan_of(LimitSet(requests_per_minute=1)), Admission(False, NOW_US, (), (), ()), Cost())
    assert error.status == 429


def test_a_time_to_come_back_is_never_rounded_down() -> None:
    assert headers_of(Overloaded("Full.", retry_after_s=1.2)) == {"retry-after": "2", "retry-after-ms": "1200"}
    assert headers_of(Overloaded("Full.", retry_after_s=0.0001)) == {"retry-after": "1", "retry-after-ms": "1"}


@given(limit=st.integers(1, 1000), taken=st.integers(1, 30))
def test_what_remains_is_what_passes_at_once(limit: int, taken: int) -> None:
    plan, limiter = plan_of(LimitSet(requests_per_minute=limit)), Limiter()
    answers = [limiter.admit(f"r{n}", plan.scopes, Cost(), SECOND, NOW_US) for n in range(taken)]
    assume(answers[-1].admitted)
    remaining = int(shown(plan, answers[-1])["remaining-requests"])
    # A store rounds each charge up by less than a microsecond, so that the last one may be that much early.
    soon = NOW_US + plan.scopes[0].rates[0].burst
    more = [limiter.admit(f"s{n}", plan.scopes, Cost(), SECOND, soon).admitted for n in range(remaining + 1)]
    assert more == [True] * remaining + [False]


@given(limit=st.integers(1, 100_000), taken=st.integers(1, 100), size=st.integers(1, 100_000))
def test_whoever_comes_back_when_told_is_let_in_and_not_a_millisecond_sooner(limit: int, taken: int, size: int) -> None:
    plan, limiter = plan_of(LimitSet(tokens_per_minute=limit)), Limiter()
    cost = Cost(1, size, 0, size)
    answer = [limiter.admit(f"r{number}", plan.scopes, cost, SECOND, NOW_US) for number in range(taken)][-1]
    assume(not answer.admitted and size <= limit)
    told = headers_of(refusal_error(plan, answer, cost))
    told_us = int(told["retry-after-ms"]) * 1000
    assert int(told["retry-after"]) * SECOND >= told_us
    assert not limiter.admit("early", plan.scopes, cost, SECOND, NOW_US + told_us - 1001).admitted
    assert limiter.admit("in time", plan.scopes, cost, SECOND, NOW_US + told_us).admitted
