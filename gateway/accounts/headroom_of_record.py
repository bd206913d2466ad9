"""Budgets by the spend of record: what a store that has lost its memory, or never had it, does not know of.

An admission takes a store's count for at least what is on record (`gateway.admission.spend`); so does what is shown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gateway.accounts.limit_rows import Gauge, HolderLimits, money_gauge, rank

if TYPE_CHECKING:
    from gateway.database.database import Database

MAX_SPENDERS = 512
"""Asked about by name, however long ago they were active."""

logger = logging.getLogger(__name__)


def with_spend_of_record(rows: list[HolderLimits], database: Callable[[], Database | None]) -> None:
    """Raise the spend of budgets to what is on record, in place, and sort the rows again. Blocks.

    Without a database, or when it is away, the store's own count stands.
    """
    wanted = [(row.scope, gauge.period) for row in rows for gauge in row.limits if gauge.period]
    if not wanted:
        return
    from gateway.database.errors import DatabaseError

    try:
        opened = database()
        totals = {} if opened is None else opened.spend.totals(wanted)
    except DatabaseError as error:
        logger.debug("limits: the spend of record cannot be read: %s", error)
        return
    for row in rows:
        row.limits = [_raised(gauge, totals.get((row.scope, gauge.period), 0)) for gauge in row.limits]
        nearest = max(row.limits, key=lambda gauge: gauge.share)
        row.share, row.nearest = nearest.share, nearest.limit
    rows.sort(key=rank)


def largest_spends(database: Callable[[], Database | None], now_unix_s: float) -> dict[str, dict[str, int]]:
    """Who has spent most this day and this month (UTC), by the key of their scope and the period. Blocks."""
    from gateway.database.errors import DatabaseError

    today = datetime.fromtimestamp(now_unix_s, UTC)
    found: dict[str, dict[str, int]] = {}
    try:
        opened = database()
        if opened is None:
            return {}
        spent = opened.spend.largest((f"d{today:%Y%m%d}", f"m{today:%Y%m}"), MAX_SPENDERS)
    except DatabaseError as error:
        logger.debug("limits: the spend of record cannot be read: %s", error)
        return {}
    for (scope, period), micros in spent.items():
        found.setdefault(scope, {})[period] = micros
    return found


def _raised(gauge: Gauge, micros: int) -> Gauge:
    spent = round(gauge.used * 1e6)
    if not gauge.period or micros <= spent:
        return gauge
    found = money_gauge(gauge.period, round(gauge.most * 1e6), micros, round(gauge.reserved * 1e6), gauge.resets_s)
    found.refused, found.would_refuse = gauge.refused, gauge.would_refuse
    return found
