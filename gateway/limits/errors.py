"""What a client is told when a limit says no.

    GatewayError
    ├── RateLimited         429 rate_limit_exceeded  a rate, a concurrency, or money that is only reserved
    └── InsufficientQuota   429 insufficient_quota   the money of the day or the month is spent

The message names the limit, whose it is, its figure, what was asked for, and when to come back. `retry-after` is the
longest wait of all limits that said no; OpenAI's SDK obeys it up to 120 seconds, and gives up at once above. What can
never pass says so with `x-should-retry: false` and no time.
"""

from __future__ import annotations

import math

from gateway.errors import GatewayError
from gateway.limits.headers import go_duration
from gateway.limits.plan import Plan, limit_of
from gateway.record import Outcome
from gateway.store.limits import Admission, Cost, Rate, Refusal, Unit

MAX_GUESS_S = 5.0
"""Longest time to come back for what waits for other requests to end. The store knows only when their leases would run
out, which they do not as long as they go on; most requests end within some seconds."""

_UNITS = {"requests": Unit.REQUESTS, "input": Unit.INPUT, "output": Unit.OUTPUT, "total": Unit.TOTAL}
_WORDS = {"requests": "requests", "input": "input tokens", "output": "output tokens", "total": "tokens"}


class RateLimited(GatewayError):
    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    outcome = Outcome.REJECTED

    def __init__(self, message: str, *, tokens: bool = False, retry_after_s: float | None = None) -> None:
        """`tokens`: a limit of tokens, not of requests. Without a time to come back, coming back is pointless."""
        super().__init__(message, retry_after_s=retry_after_s)
        if tokens:
            self.type = "tokens"
        if retry_after_s is None:
            self.should_retry = False


class InsufficientQuota(GatewayError):
    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    outcome = Outcome.REJECTED
    should_retry = False


def refusal_error(plan: Plan, admission: Admission, cost: Cost) -> GatewayError:
    """The answer to a request that was not admitted; `plan` and `cost` as it was asked for."""
    refusals = [refusal for refusal in admission.refusals if not refusal.shadow]
    if not refusals:  # an echo of a request that has ended: nobody waits for this answer
        return RateLimited("This request has already ended.", retry_after_s=1.0)
    # What never passes binds most, and of that money, since it says when it is there again.
    never = [refusal for refusal in refusals if refusal.wait_us < 0]
    for refusal in never:
        if _is_money(refusal):
            return InsufficientQuota(_spent(plan, refusal))
    if never:
        refusal = never[0]
        return RateLimited(_too_large(plan, refusal, cost), tokens=refusal.limit != "requests")
    refusal = max(refusals, key=_wait_s)
    wait_s = _wait_s(refusal)
    return RateLimited(_message(plan, refusal, cost, wait_s), tokens=_is_tokens(refusal), retry_after_s=wait_s)


def _is_money(refusal: Refusal) -> bool:
    return refusal.limit not in _UNITS and refusal.limit != "concurrent"


def _is_tokens(refusal: Refusal) -> bool:
    return refusal.limit in ("input", "output", "total")


def _wait_s(refusal: Refusal) -> float:
    wait_s = max(refusal.wait_us, 1) / 1_000_000
    return wait_s if refusal.limit in _UNITS else min(wait_s, MAX_GUESS_S)


def _message(plan: Plan, refusal: Refusal, cost: Cost, wait_s: float) -> str:
    label = plan.labels[refusal.scope]
    again = f"Please try again in {go_duration(math.ceil(wait_s * 1_000_000)).decode()}."
    if refusal.limit == "concurrent":
        limit = plan.scopes[refusal.scope].concurrent
        return (
            f"Rate limit reached for {label} on concurrent requests: limit {limit}, all under way, requested 1. {again}"
        )
    if _is_money(refusal):
        reach = _usd(_budget_micros(plan, refusal))
        return (
            f"Spending limit reached for {label}: {reach} per {_period(refusal)}, part of which is reserved by "
            f"requests under way; this one needs up to {_usd(cost.micros)}. {again}"
        )
    unit, word = _UNITS[refusal.limit], _WORDS[refusal.limit]
    limit = limit_of(plan.sets[refusal.scope], unit)
    return (
        f"Rate limit reached for {label} on {word} per minute: limit {limit}, requested {_asked(cost, unit)}. {again}"
    )


def _too_large(plan: Plan, refusal: Refusal, cost: Cost) -> str:
    label = plan.labels[refusal.scope]
    if refusal.limit == "concurrent":
        return f"Rate limit reached for {label}: no concurrent requests are allowed. It will never be admitted."
    unit, word = _UNITS[refusal.limit], _WORDS[refusal.limit]
    limit = limit_of(plan.sets[refusal.scope], unit)
    largest = _largest(plan.scopes[refusal.scope].rates, unit)
    asked = _asked(cost, unit)
    return (
        f"Request too large for {label} on {word} per minute: limit {limit}, at most {largest} in one request, "
        f"requested {asked}, which is {asked - largest} too many. It will never be admitted: make it smaller."
    )


def _spent(plan: Plan, refusal: Refusal) -> str:
    label, reach = plan.labels[refusal.scope], _usd(_budget_micros(plan, refusal))
    return (
        f"You exceeded the current quota of {label}: {reach} per {_period(refusal)} (UTC) are spent, or do not cover "
        f"this request. It is renewed with the next {_period(refusal)}; an operator can raise it."
    )


def _largest(rates: tuple[Rate, ...], unit: Unit) -> int:
    return next((rate.largest for rate in rates if rate.unit == unit), 0)


def _asked(cost: Cost, unit: Unit) -> int:
    return (cost.requests, cost.input, cost.output, cost.total)[unit]


def _budget_micros(plan: Plan, refusal: Refusal) -> int:
    budgets = plan.scopes[refusal.scope].budgets
    return next((budget.limit_micros for budget in budgets if budget.period == refusal.limit), 0)


def _period(refusal: Refusal) -> str:
    return "day" if refusal.limit.startswith("d") else "month"


def _usd(micros: int) -> str:
    """Dollars with as many places as are needed: `$0.50`, `$0.000012`."""
    text = f"{micros / 1_000_000:.6f}".rstrip("0")
    whole, _, places = text.partition(".")
    return f"${whole}.{places.ljust(2, '0')}"
