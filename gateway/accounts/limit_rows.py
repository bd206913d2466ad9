"""How limits and what is left of them are told: asked of workers, merged, and shown."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.admission.refused import limit_name

MAX_ROWS = 500
"""In one answer."""
MAX_SCOPES = 4096
"""Holders of limits that are looked at for one answer, all workers together."""


class LimitsQuestion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to look at. Without any name: who has been active lately, and then everybody as far as there is room."""

    tenant: str | None = None
    key: str | None = None
    """Id of a key: everything that limits it, its tenant's and its models' limits included."""
    model: str | None = None
    most: int = 100
    """Rows wanted, those nearest to a limit first."""
    scopes: int = MAX_SCOPES
    """Holders to look at."""
    idle: bool = True
    """Whether to look at those that have sent nothing lately."""
    spent: dict[str, dict[str, int]] = {}
    """Those who have spent most by the record, by the key of their scope: period and millionths of a dollar. They are
    looked at whether they have been active lately or not: their budget may be all that they have used up."""


class Gauge(msgspec.Struct, omit_defaults=True):
    """One limit of a holder, now. Counts, or US dollars."""

    limit: str
    """Its name in the configuration: `requests_per_minute`, `usd_per_day`, ..."""
    most: float
    """As configured."""
    used: float
    """Of a rate: what is taken of its burst and not refilled yet. Of money: what settled requests have cost."""
    remaining: float
    """What may come at once now; never below 0."""
    share: float
    """How much is taken, reservations included: 1 is all of it. More is owed by those who come."""
    capacity: float = 0.0
    """What can be taken at once: the burst of a rate, else the limit itself."""
    reserved: float = 0.0
    """Of money: what requests under way may cost at most, on top of what is used."""
    resets_s: float = 0.0
    """Until nothing is taken any more if nobody comes, or until the period ends."""
    period: str = ""
    """Of money: `d20261122`, `m202611`."""
    refused: int = 0
    """Requests that it has refused since the workers began."""
    would_refuse: int = 0
    """The same of a limit in shadow, which refuses nobody."""


class HolderLimits(msgspec.Struct, omit_defaults=True):
    """A key, a tenant, an end user, a model or a tenant's use of a model, with all limits of its own."""

    scope: str
    """What the store calls it."""
    kind: str
    """`key`, `tenant`, `user`, `model`, `tenant_model`."""
    share: float
    """Of the limit nearest to its end."""
    nearest: str
    """Which one that is."""
    tenant: str = ""
    key: str = ""
    name: str = ""
    """Of the key, as its operator calls it."""
    model: str = ""
    user: str = ""
    """A digest: names of end users are kept nowhere."""
    shadow: bool = False
    in_flight: int = 0
    """Requests under way, where concurrency or money is limited."""
    in_line: int = 0
    """Requests of its tenant that wait for a place."""
    raised: dict[str, list[float | bool | None]] = {}
    """Temporary changes in force: the limit without and with them."""
    raised_until_unix_s: float | None = None
    """When the first of them ends."""
    limits: list[Gauge] = []


class LimitsAnswer(msgspec.Struct):
    """One worker's."""

    rows: list[HolderLimits]
    looked_at: int
    """Holders."""
    complete: bool
    """Whether these are all there are, as far as the question goes."""
    store: str
    """What decides at the moment: `memory`, `redis`, or `local` while Redis is away."""


def merged(answers: list[LimitsAnswer], most: int) -> LimitsAnswer:
    """All workers' answers as one. Of the same holder the fullest reading counts, which is the newest in a shared
    store; refusals and those in line are added up."""
    rows: dict[str, HolderLimits] = {}
    for answer in answers:
        for row in answer.rows:
            known = rows.get(row.scope)
            rows[row.scope] = row if known is None else _both(known, row)
    ranked = sorted(rows.values(), key=rank)
    mode = next((answer.store for answer in answers if answer.store == "local"), answers[0].store if answers else "")
    looked_at = max((answer.looked_at for answer in answers), default=0)
    return LimitsAnswer(ranked[:most], max(looked_at, len(rows)), all(answer.complete for answer in answers), mode)


def rank(row: HolderLimits) -> tuple[float, str]:
    """The nearest to a limit first."""
    return -row.share, row.scope


def _both(one: HolderLimits, other: HolderLimits) -> HolderLimits:
    fuller, emptier = (one, other) if one.share >= other.share else (other, one)
    counts = {gauge.limit: gauge for gauge in emptier.limits}
    for gauge in fuller.limits:
        if (twin := counts.get(gauge.limit)) is not None:
            gauge.refused += twin.refused
            gauge.would_refuse += twin.would_refuse
    fuller.in_line += emptier.in_line
    return fuller


def shown(row: HolderLimits) -> dict[str, Any]:
    """A row as JSON, every field of it."""
    found: dict[str, Any] = {name: getattr(row, name) for name in HolderLimits.__struct_fields__}
    found["limits"] = [{name: getattr(each, name) for name in Gauge.__struct_fields__} for each in row.limits]
    return found


def money_gauge(period: str, limit_micros: int, spent_micros: int, reserved_micros: int, resets_s: float) -> Gauge:
    """A budget: what settled requests have used, and what those under way reserve on top of that."""
    taken = spent_micros + reserved_micros
    return Gauge(
        limit_name(period),
        limit_micros / 1e6,
        spent_micros / 1e6,
        max(0, limit_micros - taken) / 1e6,
        round(taken / limit_micros, 4) if limit_micros else 1.0,
        capacity=limit_micros / 1e6,
        reserved=reserved_micros / 1e6,
        resets_s=round(max(0.0, resets_s), 3),
        period=period,
    )
