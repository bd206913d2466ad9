"""What tenants have used, counted in each worker: requests, tokens by kind, and dollars, own and rented apart.

Counted by tenant, model and pool, and cumulative since the worker began: whoever collects (`gateway.accounts.ledger`)
keeps the last reading and takes the difference, so that an answer that gets lost costs nothing. Money is in whole
millionths of a US dollar, rounded for each request exactly as its settlement is (`gateway.admission.settlement`), so
that sums agree with the spend of record to the last of them.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:  # the process that collects holds nothing of the request path
    from gateway.record import Exchange

MAX_TENANTS = 2000
"""Tenants counted by name in one worker; about 300 bytes for each of their models."""
MAX_ROWS = 20_000
"""Combinations of tenant, model and pool, in all."""
OTHER = "other"
"""Whoever comes after that. No tenant is named so by an operator who wants to tell it from these."""

FIELDS: Final = (
    "requests",
    "prompt",
    "cached",
    "cache_write",
    "completion",
    "estimated",
    "unpriced",
    "micros",
    "spilled",
    "spilled_micros",
)
"""What is counted, in the order of `Use.amounts`. `prompt` has all prompt tokens, `cached` and `cache_write` among
them; `estimated` are requests without a usage report; `unpriced` are tokens of requests without a price; `spilled` are
requests that left for rented replicas since the own ones were late."""

Key = tuple[str, str, str, bool]
"""Tenant, model, pool, and whether the replica is rented."""


class Use(msgspec.Struct, array_like=True, gc=False):
    """One row, as it travels from a worker."""

    tenant: str
    model: str
    pool: str
    rented: bool
    amounts: list[int]
    """In the order of `FIELDS`; all of them only grow."""
    changed_in: int = 0
    """The turn of collecting in which it grew last."""


class Counted(msgspec.Struct, array_like=True, gc=False):
    """A worker's answer."""

    life: str
    """Of the worker: another one has begun from zero."""
    turn: int
    """What to ask with next time."""
    rows: list[Use]
    """Those that have grown since the turn that was asked with, whole."""


class UseCounts:
    """One worker's."""

    __slots__ = ("_life", "_rows", "_tenants", "_turn")

    def __init__(self) -> None:
        self._life = secrets.token_hex(8)
        self._rows: dict[Key, Use] = {}
        self._tenants: set[str] = set()
        self._turn = 1

    def observe(self, exchange: Exchange, rented: bool) -> None:
        """Count one settled exchange. Those that no model has worked for, refusals say, are left out."""
        used = exchange.usage
        if used is None:
            return
        row = self._rows.get((exchange.tenant, exchange.model, exchange.pool, rented))
        if row is None:
            row = self._begin((exchange.tenant, exchange.model, exchange.pool, rented))
        row.changed_in = self._turn
        amounts = row.amounts
        prompt, completion, cost_usd = used.prompt_tokens, used.completion_tokens, exchange.cost_usd
        amounts[0] += 1
        amounts[1] += prompt
        if used.cached_tokens:
            amounts[2] += used.cached_tokens
        if used.cache_write_tokens:
            amounts[3] += used.cache_write_tokens
        amounts[4] += completion
        if exchange.usage_estimated:
            amounts[5] += 1
        micros = 0
        if cost_usd is None:
            amounts[6] += prompt + completion
        else:
            micros = round(cost_usd * 1_000_000)
            amounts[7] += micros
        if exchange.spill:
            amounts[8] += 1
            amounts[9] += micros

    def _begin(self, key: Key) -> Use:
        tenant, model, pool, rented = key
        full = len(self._rows) >= MAX_ROWS
        if full or (tenant not in self._tenants and len(self._tenants) >= MAX_TENANTS):
            tenant = OTHER
            if full:
                model = pool = OTHER
        self._tenants.add(tenant)
        key = (tenant, model, pool, rented)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Use(tenant, model, pool, rented, [0] * len(FIELDS))
        return row

    def since(self, life: str, turn: int) -> Counted:
        """What has grown since that turn of this life; everything to who asks for the first time."""
        after = turn if life == self._life else 0
        rows = [row for row in self._rows.values() if row.changed_in >= after]
        self._turn += 1
        return Counted(self._life, self._turn, rows)


def as_amounts(amounts: list[int]) -> dict[str, Any]:
    """Named."""
    return dict(zip(FIELDS, amounts, strict=True))
