"""What limits are in force in a worker, and what is left of each: read from the store, changing nothing.

Bounded, however many keys there are: whoever sent a request lately is in the planner's memory, and comes first; the
others, whose limits are untouched as far as this process knows, follow as long as there is room. Everything is read in
one round trip.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from urllib.parse import unquote

import msgspec

from gateway.accounts.limit_rows import Gauge, HolderLimits, LimitsAnswer, LimitsQuestion, money_gauge, rank
from gateway.admission.gate import Gate
from gateway.admission.refused import limit_name
from gateway.errors import GatewayError
from gateway.keys.principal import Principal
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.plan import Plan, limit_of
from gateway.limits.sets import LimitSet, overlaid
from gateway.store.limits import US_PER_MINUTE, Reading, Scope
from gateway.store.protocol import StoreError

AT_ONCE = 64
"""Holders that are looked up before others have a turn: some 2 ms."""
_RATES = ("requests", "input", "output", "total")


class LimitsUnread(GatewayError):
    """The store of limits does not answer."""

    status = 503
    code = "store_unavailable"


class _Holder(msgspec.Struct):
    scope: Scope
    limits: LimitSet
    kind: str
    principal: Principal | None
    model: str = ""
    tenant: str = ""


class Headroom:
    """One worker's view."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def answer(self, question: LimitsQuestion) -> LimitsAnswer:
        """The limits asked about, those nearest to their end first. Raises `LimitsUnread`."""
        found = _Found(question)
        now_unix_s = time.time()
        complete = await self._collect(found, question, now_unix_s)
        holders = list(found.holders.values())
        try:
            readings = await self._gate.home.read([holder.scope for holder in holders])
        except StoreError as error:
            raise LimitsUnread(f"The limits cannot be read: {error}.", retry_after_s=1.0) from error
        pairs = [
            (holder, _of_record(holder.scope, reading, question.spent))
            for holder, reading in zip(holders, readings, strict=True)
        ]
        pairs.sort(key=lambda pair: (-_share(pair[0].scope, pair[1]), pair[0].scope.key))
        in_line = Counter(visit.principal.tenant.name for visit in self._gate.in_line())
        rows = [self._row(holder, reading, in_line, now_unix_s) for holder, reading in pairs[: question.most]]
        return LimitsAnswer(sorted(rows, key=rank), len(holders), complete, self._gate.home.mode.value)

    # -- whose limits

    async def _collect(self, found: _Found, question: LimitsQuestion, now_unix_s: float) -> bool:
        """Who is looked at; whether that is everybody that the question means."""
        gate = self._gate
        planner, directory = gate.planner, gate.directory
        if question.key is None:
            for number, (principal, route, plan) in enumerate(planner.recent()):
                if found.full:
                    return False
                if number % AT_ONCE == AT_ONCE - 1:
                    await asyncio.sleep(0)
                self._take_recent(found, principal, route, plan, now_unix_s)
            for plan, with_user in planner.recent_users():
                found.take_user(plan, with_user)
        everybody = [gate.identify([])] if directory is None else directory.principals(question.tenant)
        if question.key is not None:
            everybody = [each for each in everybody if each.key_id == question.key]
        elif question.spent:
            spenders = _spenders(everybody, question.spent)
            everybody = [*spenders, *everybody] if question.idle else spenders
        elif not question.idle:
            return False
        tenants: set[str] = set()
        for number, principal in enumerate(everybody):
            if found.full:
                return False
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            found.take(planner.look(principal, None, now_unix_s), principal)
            if principal.tenant.name not in tenants:
                tenants.add(principal.tenant.name)
                for model in planner.limited_models(principal.tenant):
                    if not found.full:
                        found.take(planner.look(principal, model, now_unix_s), principal, model)
        return question.idle and not found.full

    def _take_recent(self, found: _Found, principal: Principal, route: str, plan: Plan, now_unix_s: float) -> None:
        directory, planner = self._gate.directory, self._gate.planner
        now = principal if directory is None else directory.as_now(principal)
        if now is None:  # revoked
            return
        if now is not principal or plan.valid_until_unix_s <= now_unix_s:
            plan = planner.look(now, route, now_unix_s)
        found.take(plan, now, route)

    # -- how they stand

    def _row(self, holder: _Holder, reading: Reading, in_line: Counter[str], now_unix_s: float) -> HolderLimits:
        scope = holder.scope
        gauges = list(gauges_of(scope, holder.limits, reading))
        for gauge in gauges:
            gauge.refused, gauge.would_refuse = self._gate.metrics.by_holder.of(scope.key, gauge.limit)
        nearest = max(gauges, key=lambda gauge: gauge.share)
        row = HolderLimits(
            scope.key,
            holder.kind,
            nearest.share,
            nearest.limit,
            tenant=holder.tenant,
            model=holder.model if holder.kind in ("model", "tenant_model") else "",
            user=scope.key.rpartition(":u:")[2] if holder.kind == "user" else "",
            shadow=scope.shadow,
            in_flight=reading.in_use,
            in_line=in_line.get(holder.tenant, 0),
            limits=gauges,
        )
        principal = holder.principal
        if holder.kind == "key" and principal is not None and principal.key is not None:
            row.key, row.name = principal.key.id, principal.key.name
            self._raised(row, principal.key, now_unix_s)
        elif holder.kind == "tenant" and principal is not None:
            self._raised(row, principal.tenant, now_unix_s)
        return row

    def _raised(self, row: HolderLimits, record: KeyRecord | TenantRecord, now_unix_s: float) -> None:
        """What temporary changes have made of its limits."""
        current = [each for each in record.raises if each.until_unix_s > now_unix_s]
        if not current:
            return
        before = after = self._gate.planner.unraised(record)
        for each in current:
            after = overlaid(after, each.limits)
        row.raised_until_unix_s = min(each.until_unix_s for each in current)
        row.raised = {
            name: [getattr(before, name), getattr(after, name)]
            for name in LimitSet.__struct_fields__
            if getattr(before, name) != getattr(after, name)
        }


class _Found:
    """Holders by their scope, each once, as many as the question wants."""

    def __init__(self, question: LimitsQuestion) -> None:
        self.holders: dict[str, _Holder] = {}
        self._question = question

    @property
    def full(self) -> bool:
        return len(self.holders) >= self._question.scopes

    def take(self, plan: Plan, principal: Principal, route: str = "") -> None:
        """Add the holders of a plan that the question means."""
        for scope, label, limits in zip(plan.scopes, plan.labels, plan.sets, strict=True):
            if scope.key in self.holders or self.full:
                continue
            kind, _, rest = label.partition(" ")
            model = ""
            if kind == "model":
                model, _, of_tenant = rest.partition(" for tenant ")
                kind = "tenant_model" if of_tenant else "model"
            tenant = "" if kind == "model" else principal.tenant.name
            if self._means(kind, tenant, model):
                self.holders[scope.key] = _Holder(scope, limits, kind, principal, model, tenant)

    def take_user(self, plan: Plan, with_user: Plan) -> None:
        tenant = unquote(plan.tag[3:-1])
        if not self.full and with_user.labels[0] == "user" and self._means("user", tenant, ""):
            scope = with_user.scopes[0]
            self.holders.setdefault(scope.key, _Holder(scope, with_user.sets[0], "user", None, tenant=tenant))

    def _means(self, kind: str, tenant: str, model: str) -> bool:
        question = self._question
        if question.model is not None and (model or question.model) != question.model:
            return False
        if question.model is not None and question.key is None and question.tenant is None and not model:
            return False
        return question.tenant is None or question.key is not None or tenant == question.tenant


def gauges_of(scope: Scope, limits: LimitSet, reading: Reading) -> Iterable[Gauge]:
    """Each limit of a scope as it stands.

    A mark 2 s ahead at 600 a minute says that 20 of the burst are taken.
    """
    for rate, mark_us in zip(scope.rates, reading.marks_us, strict=True):
        owed_us = max(0, mark_us - reading.now_us)
        used = owed_us * rate.per_minute / US_PER_MINUTE
        yield Gauge(
            limit_name(_RATES[rate.unit]),
            float(limit_of(limits, rate.unit) or 0),
            round(used, 3),
            float(max(0, int(rate.burst - used + 1e-3))),
            round(used / rate.burst, 4),
            capacity=float(rate.burst),
            resets_s=round(owed_us / 1e6, 3),
        )
    if scope.concurrent is not None:
        most = float(scope.concurrent)
        left = max(0.0, most - reading.in_use)
        share = reading.in_use / most if most else 1.0
        yield Gauge("concurrent_requests", most, float(reading.in_use), left, round(share, 4), capacity=most)
    for budget, spent_micros in zip(scope.budgets, reading.spent_micros, strict=True):
        yield money_gauge(
            budget.period,
            budget.limit_micros,
            spent_micros,
            reading.reserved_micros,
            (budget.ends_at_us - reading.now_us) / 1e6,
        )


def _spenders(everybody: list[Principal], spent: dict[str, dict[str, int]]) -> list[Principal]:
    """Who has spent most, by the record: keys, and one key of each tenant."""
    keys = {unquote(scope.partition(":k:")[2]) for scope in spent if ":k:" in scope}
    tenants = {unquote(scope[3:-3]) for scope in spent if scope.endswith("}:t")}
    found: list[Principal] = []
    for each in everybody:
        if each.key_id in keys or each.tenant.name in tenants:
            tenants.discard(each.tenant.name)
            found.append(each)
    return found


def _of_record(scope: Scope, reading: Reading, spent: dict[str, dict[str, int]]) -> Reading:
    """The reading with what is on record, where that is more than what the store knows of."""
    recorded = spent.get(scope.key)
    if not recorded or not scope.budgets:
        return reading
    pairs = zip(scope.budgets, reading.spent_micros, strict=True)
    more = tuple([max(micros, recorded.get(budget.period, 0)) for budget, micros in pairs])
    return msgspec.structs.replace(reading, spent_micros=more)


def _share(scope: Scope, reading: Reading) -> float:
    """How near a scope is to a limit, without making anything of it: asked of thousands."""
    share = 0.0
    now_us = reading.now_us
    for rate, mark_us in zip(scope.rates, reading.marks_us, strict=True):
        if mark_us > now_us:
            share = max(share, (mark_us - now_us) * rate.per_minute / (US_PER_MINUTE * rate.burst))
    if scope.concurrent:
        share = max(share, reading.in_use / scope.concurrent)
    for budget, spent_micros in zip(scope.budgets, reading.spent_micros, strict=True):
        if budget.limit_micros:
            share = max(share, (spent_micros + reading.reserved_micros) / budget.limit_micros)
    return share
