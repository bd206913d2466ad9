"""Plans: which limits a request meets, in which numbers, and for how long that holds."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Settings
from gateway.keys.principal import Principal
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.plan import Planner, SpendBook, rate_of
from gateway.limits.sets import LimitSet, Raise
from gateway.store.limits import US_PER_MINUTE, Budget, Rate, Scope, Unit

NOW_S = datetime(2026, 11, 22, 7, 0, tzinfo=UTC).timestamp()
MIDNIGHT_S = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
NEXT_MONTH_S = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
FIVE = LimitSet(requests_per_minute=5)


def planner(**sections: Any) -> Planner:
    return Planner(settings(**sections))


def settings(**sections: Any) -> Settings:
    replicas = {"engine": "vllm", "replicas": [{"url": "http://a"}]}
    return Settings.model_validate({"backends": {"pool": replicas}, **sections})


def principal(tenant: TenantRecord | None = None, **key: Any) -> Principal:
    return Principal(KeyRecord("key_1", b"", "acme", **key), tenant or TenantRecord("acme"))


def test_without_limits_there_is_nothing_to_admit() -> None:
    plan = planner().plan(principal(limits=LimitSet(burst_s=5.0, shadow=True)), "chat", NOW_S)
    assert (plan.scopes, plan.user, plan.hard, plan.valid_until_unix_s) == ((), None, False, math.inf)


def test_every_holder_has_a_scope_of_its_own() -> None:
    chat = {"backend": "pool", "limits": {"requests_per_minute": 4}, "tenant_limits": {"requests_per_minute": 3}}
    made = planner(models={"chat": chat}, limits={"user": {"requests_per_minute": 5}})
    plan = made.plan(principal(TenantRecord("acme", limits=LimitSet(requests_per_minute=2)), limits=FIVE), "chat", 0)
    assert [scope.key for scope in plan.scopes] == ["{t:acme}:k:key_1", "{t:acme}:t", "{t:acme}:m:chat", "{m:chat}:m"]
    assert plan.labels == ("key", "tenant acme", "model chat for tenant acme", "model chat")
    assert [scope.rates[0].per_minute for scope in plan.scopes] == [5, 2, 3, 4]
    with_user = made.with_user(plan, "bob@example.com", 0)
    assert with_user.labels == ("user", *plan.labels)
    assert with_user.scopes[1:] == plan.scopes
    assert with_user.scopes[0].key.startswith("{t:acme}:u:")
    assert len(with_user.scopes[0].key) == len("{t:acme}:u:") + 16
    assert [shown.index for shown in with_user.requests] == [0, 1, 2, 3, 4]


def test_users_are_told_apart_by_tenant_and_never_named() -> None:
    made = planner(limits={"user": {"requests_per_minute": 5}})
    plans = [made.plan(principal(TenantRecord(name)), "chat", 0) for name in ("a", "b")]
    keys = {made.with_user(plan, user, 0).scopes[0].key for plan in plans for user in ("bob", "eve", "\ud800" * 9999)}
    assert len({key.rpartition(":")[2] for key in keys}) == 6
    assert not any("bob" in key for key in keys)
    assert made.with_user(plans[0], "", 0) is plans[0]
    assert made.with_user(plans[0], "bob", 0) is made.with_user(plans[0], "bob", 1)


def test_own_values_stand_over_the_general_ones_field_by_field() -> None:
    made = planner(
        models={"chat": {"backend": "pool", "tenant_limits": {"requests_per_minute": 3, "concurrent_requests": 9}}},
        limits={"key": {"requests_per_minute": 7, "concurrent_requests": 2}, "tenant": {"concurrent_requests": 8}},
    )
    tenant = TenantRecord("acme", model_limits={"chat": LimitSet(requests_per_minute=30)})
    plan = made.plan(principal(tenant, limits=FIVE), "chat", 0)
    key, of_tenant, of_model = plan.scopes
    assert (key.rates[0].per_minute, key.concurrent) == (5, 2)
    assert (of_tenant.rates, of_tenant.concurrent) == ((), 8)
    assert (of_model.rates[0].per_minute, of_model.concurrent) == (30, 9)


def test_an_adapter_counts_as_its_model() -> None:
    models = {
        name: {"backend": "pool", "limits": {"requests_per_minute": n}} for n, name in enumerate(("q:7b", "q"), 1)
    }
    made = planner(models=models)
    for route, key in (("q:7b", "{m:q:7b}:m"), ("q:7b:law", "{m:q:7b}:m"), ("q", "{m:q}:m"), ("q:law", "{m:q}:m")):
        assert [scope.key for scope in made.plan(principal(), route, 0).scopes] == [key]


def test_without_keys_the_tenants_limits_still_hold() -> None:
    plan = planner(limits={"key": {"requests_per_minute": 1}}).plan(
        Principal(None, TenantRecord("default", limits=FIVE)), "chat", 0
    )
    assert plan.labels == ("tenant default",)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=200))
def test_no_name_breaks_out_of_its_tag(name: str) -> None:
    made = planner(models={name: {"backend": "pool", "limits": {"requests_per_minute": 1}}})
    (scope,) = made.plan(principal(), name, 0).scopes
    assert scope.key.startswith("{m:")
    assert scope.key.endswith("}:m")
    assert scope.key.count("{") == scope.key.count("}") == 1
    assert not set(scope.key) & set(" *?[]\\\"'\n,;=@")


def test_known_plans_are_given_again_and_few_are_kept() -> None:
    made = Planner(settings(limits={"key": {"requests_per_minute": 1}}), max_plans=3)
    first = principal()
    plan = made.plan(first, "chat", NOW_S)
    assert made.plan(first, "chat", NOW_S + 1e9) is plan
    assert made.plan(principal(), "chat", NOW_S) is not plan
    for number in range(50):
        made.plan(principal(), f"m{number}", NOW_S)
    assert len(made._plans) == 3


def test_a_reload_makes_new_plans() -> None:
    made, who = planner(limits={"key": {"requests_per_minute": 1}}), principal()
    assert made.plan(who, "chat", 0).scopes[0].rates[0].per_minute == 1
    made.reload(settings(limits={"key": {"requests_per_minute": 2}}))
    assert made.plan(who, "chat", 0).scopes[0].rates[0].per_minute == 2


def test_a_raise_ends_when_it_says() -> None:
    raises = (Raise(LimitSet(requests_per_minute=50), NOW_S + 10), Raise(LimitSet(concurrent_requests=9), NOW_S + 20))
    who, made = principal(limits=FIVE, raises=raises), planner()
    seen = []
    for after_s in (0, 9.999, 10, 19, 20, 1e6):
        scope = made.plan(who, "chat", NOW_S + after_s).scopes[0]
        seen.append((scope.rates[0].per_minute, scope.concurrent))
    assert seen == [(50, 9), (50, 9), (5, 9), (5, 9), (5, None), (5, None)]


def test_budgets_follow_the_calendar() -> None:
    who, made = principal(limits=LimitSet(usd_per_day=1.5, usd_per_month=20)), planner()
    plan = made.plan(who, "chat", NOW_S)
    assert plan.scopes[0].budgets == (
        Budget("d20261122", 1_500_000, 0, int(MIDNIGHT_S) * 1_000_000),
        Budget("m202611", 20_000_000, 0, int(NEXT_MONTH_S) * 1_000_000),
    )
    assert plan.valid_until_unix_s == MIDNIGHT_S
    assert made.plan(who, "chat", MIDNIGHT_S - 0.001) is plan
    assert [each.period for each in made.plan(who, "chat", MIDNIGHT_S).scopes[0].budgets] == ["d20261123", "m202611"]
    december = made.plan(who, "chat", NEXT_MONTH_S).scopes[0].budgets
    assert [each.period for each in december] == ["d20261201", "m202612"]


def test_a_users_day_ends_too() -> None:
    made = planner(limits={"user": {"usd_per_day": 1}})
    plan = made.plan(principal(), "chat", NOW_S)
    assert plan.valid_until_unix_s == math.inf
    first = made.with_user(plan, "bob", NOW_S)
    assert made.with_user(plan, "bob", MIDNIGHT_S - 1) is first
    assert made.with_user(plan, "bob", MIDNIGHT_S).scopes[0].budgets[0].period == "d20261123"


def test_spend_of_record_becomes_the_floor_at_once() -> None:
    book = SpendBook()
    made = Planner(settings(limits={"user": {"usd_per_day": 1}}), book)
    who, idle = principal(limits=LimitSet(usd_per_day=1)), principal(limits=FIVE)
    place = ("{t:acme}:k:key_1", "d20261122")
    plan, unmoved = made.plan(who, "chat", NOW_S), made.plan(idle, "chat", NOW_S)
    user = made.with_user(unmoved, "bob", NOW_S).scopes[0].key
    assert book.unknown(plan.scopes) == [place]
    book.note({place: 700, (user, "d20261122"): 3})
    book.note({place: 600})
    plan = made.plan(who, "chat", NOW_S)
    assert plan.scopes[0].budgets[0].floor_micros == 700
    assert made.with_user(unmoved, "bob", NOW_S).scopes[0].budgets[0].floor_micros == 3
    assert book.unknown(plan.scopes) == []
    assert made.plan(who, "chat", NOW_S) is plan
    assert made.plan(idle, "chat", NOW_S) is unmoved


def test_the_book_is_bounded_and_forgets_what_was_noted_longest_ago() -> None:
    book = SpendBook(max_entries=2)
    book.note({("a", "d"): 1, ("b", "d"): 2})
    book.note({("a", "d"): 1, ("c", "d"): 3})
    assert [book.get(scope, "d") for scope in "abc"] == [1, 0, 3]


@pytest.mark.parametrize(
    ("limits", "unit", "rate"),
    [
        (LimitSet(), Unit.REQUESTS, Rate(Unit.REQUESTS, 60, 10, 10)),
        (LimitSet(), Unit.TOTAL, Rate(Unit.TOTAL, 60, 10, 60)),
        (LimitSet(burst_s=30.0), Unit.REQUESTS, Rate(Unit.REQUESTS, 60, 30, 30)),
        (LimitSet(burst_s=0.1), Unit.REQUESTS, Rate(Unit.REQUESTS, 60, 1, 1)),
        (LimitSet(strict_window=True), Unit.REQUESTS, Rate(Unit.REQUESTS, 50, 10, 10)),
        (LimitSet(strict_window=True, burst_s=60.0), Unit.REQUESTS, Rate(Unit.REQUESTS, 1, 59, 59)),
        (LimitSet(strict_window=True), Unit.INPUT, Rate(Unit.INPUT, 30, 30, 30)),
        (LimitSet(hard_tokens=True), Unit.OUTPUT, Rate(Unit.OUTPUT, 60, 60, 60)),
        (LimitSet(hard_tokens=True), Unit.REQUESTS, Rate(Unit.REQUESTS, 60, 10, 10)),
        (LimitSet(hard_tokens=True, burst_s=10.0), Unit.TOTAL, Rate(Unit.TOTAL, 60, 10, 10)),
        (LimitSet(hard_tokens=True, strict_window=True), Unit.TOTAL, Rate(Unit.TOTAL, 30, 30, 30)),
    ],
)
def test_rates_are_as_documented(limits: LimitSet, unit: Unit, rate: Rate) -> None:
    assert rate_of(unit, 60, limits) == rate


def test_hard_mode_is_on_for_enforced_limits_of_tokens_only() -> None:
    made = planner()

    def hard(**fields: Any) -> bool:
        return made.plan(principal(limits=LimitSet(hard_tokens=True, **fields)), "chat", 0).hard

    assert hard(tokens_per_minute=5)
    assert not hard(requests_per_minute=5)
    assert not hard(tokens_per_minute=5, shadow=True)


def test_shadow_is_of_a_scope_alone() -> None:
    tenant = TenantRecord("acme", limits=FIVE)
    plan = planner().plan(principal(tenant, limits=LimitSet(requests_per_minute=1, shadow=True)), "chat", 0)
    assert [scope.shadow for scope in plan.scopes] == [True, False]
    assert [(shown.index, shown.limit) for shown in plan.requests] == [(1, 5)]


def let_through(rate: Rate, arrivals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What the generic cell rate algorithm admits of (microseconds, cost)."""
    mark, found = 0, []
    burst_us = rate.burst * US_PER_MINUTE // rate.per_minute
    for now, cost in arrivals:
        after = max(mark, now) + math.ceil(cost * US_PER_MINUTE / rate.per_minute)
        if cost <= rate.burst and after - burst_us <= now:
            mark = after
            found.append((now, cost))
    return found


@given(
    limit=st.integers(1, 300),
    burst_s=st.none() | st.floats(0.1, 60),
    arrivals=st.lists(st.tuples(st.integers(0, 5_000_000), st.integers(1, 40)), max_size=200),
    unit=st.sampled_from([Unit.REQUESTS, Unit.TOTAL]),
)
def test_a_strict_window_never_sees_more_than_the_limit(
    limit: int, burst_s: float | None, arrivals: list[tuple[int, int]], unit: Unit
) -> None:
    rate = rate_of(unit, limit, LimitSet(strict_window=True, burst_s=burst_s))
    now, coming = 10**9, []
    for gap, cost in arrivals:
        now += gap
        coming.append((now, cost))
    admitted = let_through(rate, coming)
    for start, _ in admitted:
        assert sum(cost for at, cost in admitted if start <= at < start + US_PER_MINUTE) <= limit


def test_scopes_are_what_a_store_takes() -> None:
    plan = planner(limits={"key": {"requests_per_minute": 6, "concurrent_requests": 2}}).plan(principal(), "chat", 0)
    assert plan.scopes == (Scope("{t:acme}:k:key_1", (Rate(Unit.REQUESTS, 6, 1, 1),), 2),)
