"""Which limits one request meets: its key's, its tenant's, its user's, its model's, as the store wants them.

From a `LimitSet` to the numbers of a store:

    rate      per_minute = L, burst = L * burst_s / 60 (at least 1), with burst_s = 10 unless it is set.
              In every interval of T minutes at most burst + L * T are let through, so in any one minute at most
              L + L/6: 1.17 L. With `strict_window`, per_minute = L - burst: never more than L in any minute, and a
              sixth less than L in the long run. (A limit of 1 has no room for that: two are a minute apart at least.)
    tokens    soft mode (the default): a request whose estimate is larger than the burst passes when nothing is owed,
              up to a whole minute's worth, and what is above the burst is owed by those that come later.
              Hard mode: nothing above the burst passes, ever, since the bound B + L * T is only exact for costs up to
              B. What is reserved there is the most that a request can use (a byte counts as a token, the output counts
              as max_tokens), often four times what it does use, so that 10 seconds' worth would refuse ordinary
              requests for good: with 60,000 tokens a minute, those of more than 8 KB with 2,000 tokens of output.
              The default burst of token rates in hard mode is therefore 60 seconds' worth: what fits into a minute
              passes, at most 2 L in any minute after an idle one, L in the long run, exactly. With `strict_window` it
              is 30 seconds' worth, in both modes: never above L in any minute, requests up to L/2, L/2 in the long run.
    money     calendar days and months in UTC.

Names in the store: everything of one tenant begins with `{t:<tenant>}`, so that a Redis Cluster keeps it in one place,
and the limits of a model as a whole begin with `{m:<model>}`. Users are named by a digest only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import TypeVar
from urllib.parse import quote

import msgspec

from gateway.config import Settings
from gateway.keys.principal import Principal
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.sets import LimitSet, Raise, overlaid
from gateway.store.limits import Budget, Rate, Scope, Unit

BURST_S = 10.0
HARD_BURST_S = 60.0
STRICT_BURST_S = 30.0

MAX_PLANS = 8192
"""Plans kept; one takes about 2 KB. Another is made in some 20 µs."""
MAX_FLOORS = 262_144
"""Spends of record kept; one takes about 250 bytes."""

_K = TypeVar("_K")
_V = TypeVar("_V")

_NO_LIMITS = LimitSet()
_SAFE = "/:"


class SpendBook:
    """What is known here of the spend of record: millionths of a US dollar by scope and period. Bounded.

    It only ever grows within a period, so the larger of two readings is the newer.
    """

    def __init__(self, max_entries: int = MAX_FLOORS) -> None:
        self._spent: dict[tuple[str, str], int] = {}
        self._max_entries = max_entries
        self.version = 0
        """Changes with every note that changes anything."""

    def note(self, totals: Mapping[tuple[str, str], int]) -> None:
        """Take over totals by (`Scope.key`, `Budget.period`); what was noted longest ago makes room."""
        changed = False
        for place, micros in totals.items():
            before = self._spent.pop(place, -1)
            changed = changed or micros > before
            self._spent[place] = max(before, micros)
        while len(self._spent) > self._max_entries:
            del self._spent[next(iter(self._spent))]
        if changed:
            self.version += 1

    def get(self, scope: str, period: str) -> int:
        return self._spent.get((scope, period), 0)

    def unknown(self, scopes: Iterable[Scope]) -> list[tuple[str, str]]:
        """The budgets of these scopes of which nothing was ever noted: what to ask the database for."""
        return [
            (scope.key, budget.period)
            for scope in scopes
            for budget in scope.budgets
            if (scope.key, budget.period) not in self._spent
        ]


class Shown(msgspec.Struct, frozen=True):
    """A rate that clients are told of in headers."""

    index: int
    """Its position in `Admission.marks_us`."""
    limit: int
    """As configured, a minute."""
    per_minute: int
    burst: int
    rounding_us: int
    """What a store's rounding up, a microsecond for each charge, can come to: without it, nine requests of ten would
    be left after none."""


class Plan(msgspec.Struct, frozen=True, eq=False):
    """All limits of a request but its user's, which `Planner.with_user` adds."""

    scopes: tuple[Scope, ...]
    """Only those that limit something; empty: nothing to admit."""
    labels: tuple[str, ...]
    """What clients are told each scope is: `key`, `tenant acme`, `model chat`."""
    sets: tuple[LimitSet, ...]
    """What each scope was made from."""
    user: LimitSet | None
    """The limits of each end user; None: none."""
    hard: bool
    """Whether to reserve what the request can use at most (`Estimator.estimate`)."""
    valid_until_unix_s: float
    """When a raise, a day or a month ends: take a new plan from then on."""
    tag: str
    """`{t:<tenant>}`."""
    billed: tuple[str, ...] = ()
    """Whose spend is put on record, by the keys of their scopes: the key's and the tenant's, limited or not, so that a
    budget that is set later knows of it, and that of every scope with a budget."""
    has_budgets: bool = False
    requests: tuple[Shown, ...] = ()
    """The rates of requests that are enforced."""
    tokens: tuple[Shown, ...] = ()
    """The rates of tokens, of any kind, that are enforced."""


class Planner:
    """Makes plans and keeps them: one that was made before costs two look-ups.

    `secret` is what users' names are digested with, the same in all gateways; without one, whoever guesses a name can
    find it confirmed in the store.
    """

    def __init__(
        self, settings: Settings, book: SpendBook | None = None, max_plans: int = MAX_PLANS, *, secret: bytes = b""
    ) -> None:
        self._secret = secret[:64]
        self.book = SpendBook() if book is None else book
        self._max_plans = max_plans
        # By the principal itself: it hashes by identity, and an entry keeps it alive.
        self._plans: dict[tuple[Principal, str], tuple[Plan, int]] = {}
        self._with_users: dict[tuple[Plan, str], tuple[Plan, int]] = {}
        self.reload(settings)

    def reload(self, settings: Settings) -> None:
        """Go by these settings from now on."""
        self._key = settings.limits.key.limit_set()
        self._tenant = settings.limits.tenant.limit_set()
        self._user = settings.limits.user.limit_set()
        self._models = {
            name: (model.limits.limit_set(), model.tenant_limits.limit_set()) for name, model in settings.models.items()
        }
        self._plans.clear()
        self._with_users.clear()

    def plan(self, principal: Principal, route_name: str, now_unix_s: float) -> Plan:
        """The limits of a request of `principal` to the model, whose name may end in `:<adapter>`."""
        known = self._plans.get((principal, route_name))
        if known is not None:
            plan, version = known
            if plan.valid_until_unix_s > now_unix_s and (version < 0 or version == self.book.version):
                return plan
        maker = self._made(principal, route_name, now_unix_s)
        user = overlaid(self._user, principal.tenant.user_limits)
        plan = maker.plan(user if _limits_anything(user) else None)
        version = self.book.version if maker.has_money else -1
        _keep(self._plans, (principal, route_name), (plan, version), self._max_plans)
        return plan

    def with_user(self, plan: Plan, user: str, now_unix_s: float) -> Plan:
        """The plan with the limits of one end user, whose name goes no further than this; `plan` itself if none."""
        if plan.user is None or not user:
            return plan
        name = f"{plan.tag} {user}".encode(errors="surrogatepass")
        digest = blake2b(name, digest_size=8, key=self._secret).hexdigest()
        known = self._with_users.get((plan, digest))
        if known is not None:
            found, version = known
            if found.valid_until_unix_s > now_unix_s and (version < 0 or version == self.book.version):
                return found
        maker = _Maker(plan.tag, self.book, now_unix_s)
        maker.add(f"{plan.tag}:u:{digest}", "user", plan.user)
        version = self.book.version if maker.has_money else -1
        for scope, label, limits in zip(plan.scopes, plan.labels, plan.sets, strict=True):
            maker.take(scope, label, limits)
        maker.billed += [scope for scope in plan.billed if scope not in maker.billed]
        maker.valid_until_unix_s = min(maker.valid_until_unix_s, plan.valid_until_unix_s)
        found = maker.plan(plan.user)
        _keep(self._with_users, (plan, digest), (found, version), self._max_plans)
        return found

    # -- for operators: nothing is kept of what these make

    def recent(self) -> list[tuple[Principal, str, Plan]]:
        """Whose plans are kept, and for which model: those that began to send requests last come first."""
        return [(principal, route, plan) for (principal, route), (plan, _) in reversed(self._plans.items())]

    def recent_users(self) -> list[tuple[Plan, Plan]]:
        """Plans of requests with an end user, each with the same without the user's limits; the newest first."""
        return [(plan, with_user) for (plan, _), (with_user, _) in reversed(self._with_users.items())]

    def look(self, principal: Principal, route_name: str | None, now_unix_s: float) -> Plan:
        """The limits of a key and of its tenant, and for a model those of its use, without those of end users."""
        return self._made(principal, route_name, now_unix_s).plan(None)

    def limited_models(self, tenant: TenantRecord) -> list[str]:
        """The models with limits of their own for this tenant, or for all tenants together."""
        return [
            name
            for name, (of_model, of_each_tenant) in self._models.items()
            if _limits_anything(of_model) or _limits_anything(of_each_tenant) or name in tenant.model_limits
        ]

    def unraised(self, holder: KeyRecord | TenantRecord) -> LimitSet:
        """The limits of a key or of a tenant as they are without temporary changes."""
        return overlaid(self._key if isinstance(holder, KeyRecord) else self._tenant, holder.limits)

    def _made(self, principal: Principal, route_name: str | None, now_unix_s: float) -> _Maker:
        key, tenant = principal.key, principal.tenant
        tag = f"{{t:{_safe(tenant.name)}}}"
        maker = _Maker(tag, self.book, now_unix_s)
        if key is not None:
            limits = maker.raised(overlaid(self._key, key.limits), key.raises)
            maker.billed.append(f"{tag}:k:{_safe(key.id)}")
            maker.add(f"{tag}:k:{_safe(key.id)}", "key", limits)
        limits = maker.raised(overlaid(self._tenant, tenant.limits), tenant.raises)
        maker.billed.append(f"{tag}:t")
        maker.add(f"{tag}:t", f"tenant {tenant.name}", limits)
        if route_name is None:
            return maker
        model = route_name if route_name in self._models else route_name.rpartition(":")[0]
        of_model, of_each_tenant = self._models.get(model, (_NO_LIMITS, _NO_LIMITS))
        limits = overlaid(of_each_tenant, tenant.model_limits.get(model, _NO_LIMITS))
        maker.add(f"{tag}:m:{_safe(model)}", f"model {model} for tenant {tenant.name}", limits)
        maker.add(f"{{m:{_safe(model)}}}:m", f"model {model}", of_model)
        return maker


class _Maker:
    """Collects the scopes of one plan."""

    def __init__(self, tag: str, book: SpendBook, now_unix_s: float) -> None:
        self._tag = tag
        self._book = book
        self._now_unix_s = now_unix_s
        self._scopes: list[Scope] = []
        self._labels: list[str] = []
        self._sets: list[LimitSet] = []
        self.billed: list[str] = []
        self.valid_until_unix_s = math.inf
        self.has_money = False

    def raised(self, limits: LimitSet, raises: Iterable[Raise]) -> LimitSet:
        """The limits with the temporary changes that are in force, the later ones over the earlier."""
        for each in raises:
            if each.until_unix_s > self._now_unix_s:
                limits = overlaid(limits, each.limits)
                self.valid_until_unix_s = min(self.valid_until_unix_s, each.until_unix_s)
        return limits

    def add(self, key: str, label: str, limits: LimitSet) -> None:
        if _limits_anything(limits):
            shadow = bool(limits.shadow)
            scope = Scope(key, _rates(limits), limits.concurrent_requests, self._budgets(key, limits), shadow)
            self.take(scope, label, limits)

    def take(self, scope: Scope, label: str, limits: LimitSet) -> None:
        self._scopes.append(scope)
        self._labels.append(label)
        self._sets.append(limits)
        if scope.budgets and scope.key not in self.billed:
            self.billed.append(scope.key)

    def plan(self, user: LimitSet | None) -> Plan:
        requests: list[Shown] = []
        tokens: list[Shown] = []
        index = 0
        for scope, limits in zip(self._scopes, self._sets, strict=True):
            for rate in scope.rates:
                if not scope.shadow:
                    rounding_us = min(rate.burst, 1000) if rate.unit is Unit.REQUESTS else 1
                    limit = limit_of(limits, rate.unit) or 0
                    shown = Shown(index, limit, rate.per_minute, rate.burst, rounding_us)
                    (requests if rate.unit is Unit.REQUESTS else tokens).append(shown)
                index += 1
        pairs = zip(self._scopes, self._sets, strict=True)
        return Plan(
            scopes=tuple(self._scopes),
            labels=tuple(self._labels),
            sets=tuple(self._sets),
            user=user,
            hard=any(limits.hard_tokens and not scope.shadow and _counts_tokens(scope) for scope, limits in pairs),
            valid_until_unix_s=self.valid_until_unix_s,
            tag=self._tag,
            billed=tuple(self.billed),
            has_budgets=any(scope.budgets for scope in self._scopes),
            requests=tuple(requests),
            tokens=tuple(tokens),
        )

    def _budgets(self, key: str, limits: LimitSet) -> tuple[Budget, ...]:
        if limits.usd_per_day is None and limits.usd_per_month is None:
            return ()
        self.has_money = True
        today = datetime.fromtimestamp(self._now_unix_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        next_month = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
        found = []
        for usd, period, ends in (
            (limits.usd_per_day, f"d{today:%Y%m%d}", today + timedelta(days=1)),
            (limits.usd_per_month, f"m{today:%Y%m}", next_month),
        ):
            if usd is not None:
                ends_unix_s = int(ends.timestamp())
                self.valid_until_unix_s = min(self.valid_until_unix_s, ends_unix_s)
                floor = self._book.get(key, period)
                found.append(Budget(period, round(usd * 1_000_000), floor, ends_unix_s * 1_000_000))
        return tuple(found)


def limit_of(limits: LimitSet, unit: Unit) -> int | None:
    """The configured limit a minute of one kind."""
    if unit is Unit.REQUESTS:
        return limits.requests_per_minute
    if unit is Unit.INPUT:
        return limits.input_tokens_per_minute
    return limits.output_tokens_per_minute if unit is Unit.OUTPUT else limits.tokens_per_minute


def rate_of(unit: Unit, limit: int, limits: LimitSet) -> Rate:
    """One rate of a set: `limit` of `unit` a minute, with the burst and mode of `limits`."""
    tokens = unit is not Unit.REQUESTS
    hard, strict = bool(limits.hard_tokens), bool(limits.strict_window)
    burst_s = limits.burst_s
    if burst_s is None:
        burst_s = BURST_S if not tokens else STRICT_BURST_S if strict else HARD_BURST_S if hard else BURST_S
    burst = max(1, int(limit * burst_s / 60))
    per_minute = limit
    if strict:
        burst = max(1, min(burst, limit - 1))
        per_minute = max(1, limit - burst)
    exact = hard or strict or not tokens
    largest = burst if exact else max(burst, limit)
    return Rate(unit, per_minute, burst, largest)


def _rates(limits: LimitSet) -> tuple[Rate, ...]:
    pairs = ((unit, limit_of(limits, unit)) for unit in Unit)
    return tuple(rate_of(unit, limit, limits) for unit, limit in pairs if limit is not None)


def _limits_anything(limits: LimitSet) -> bool:
    return not (
        limits.requests_per_minute is None
        and limits.tokens_per_minute is None
        and limits.input_tokens_per_minute is None
        and limits.output_tokens_per_minute is None
        and limits.concurrent_requests is None
        and limits.usd_per_day is None
        and limits.usd_per_month is None
    )


def _counts_tokens(scope: Scope) -> bool:
    return any(rate.unit is not Unit.REQUESTS for rate in scope.rates)


def _safe(name: str) -> str:
    """A name that cannot end a hash tag, nor hold what a line of a protocol or a pattern could take for its own."""
    return quote(name, safe=_SAFE, errors="surrogatepass")


def _keep(table: dict[_K, _V], key: _K, value: _V, most: int) -> None:
    """Put an entry into a bounded table; the oldest makes room."""
    table.pop(key, None)
    if len(table) >= most:
        del table[next(iter(table))]
    table[key] = value
