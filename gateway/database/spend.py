"""Money of record: what each holder of a budget has spent in each calendar period, in millionths of a US dollar.

Gateways add in batches. A batch counts once, whatever became of the answer: who does not know whether it arrived sends
the same batch with the same id again, within a day.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from itertools import islice

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from gateway.database.answers import SpendKey
from gateway.database.engine import Engine
from gateway.database.errors import InvalidValue
from gateway.database.tables import spend, spend_batches

BATCHES_KEPT_S = 24 * 3600.0
PRUNED_EVERY_S = 600.0
USERS_KEPT_DAYS = 40
"""Users' rows outlast their period by so many days. Their names are the clients' to invent, so there may be any number;
all other rows are kept for good."""
PRUNED_AT_ONCE = 10_000
"""Of users' rows: a batch that also prunes must not take long."""
MAX_MICROS = 10**15
"""A thousand million dollars in one batch: whatever is above is a fault."""
MAX_SCOPE_LENGTH = 1000
_PERIOD = re.compile(r"[a-z][0-9A-Za-z-]{1,31}")
_AT_ONCE = 200


class Spend:
    """Totals by scope and period. They only grow."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._prune_at_unix_s = 0.0

    def add(self, batch_id: str, deltas: Mapping[SpendKey, int]) -> bool:
        """Add all of it, or nothing. False: this batch was there already. Raises `InvalidValue`.

        After `DatabaseUnavailable` the outcome is unknown: send the same again.
        """
        rows = [_row(key, micros) for key, micros in sorted(deltas.items()) if micros != 0]
        if not 1 <= len(batch_id) <= 200 or not batch_id.isprintable():
            raise InvalidValue("batch_id", "it must have 1 to 200 printable characters")
        insert = sqlite.insert if self._engine.sqlite else postgresql.insert
        now_unix_s = self._clock()
        batch = insert(spend_batches).values(id=batch_id, added_unix_s=now_unix_s).on_conflict_do_nothing()
        is_new = batch.returning(spend_batches.c.id)  # the drivers' counts of rows differ
        total = insert(spend)
        total = total.on_conflict_do_update(
            index_elements=["period", "scope"], set_={"micros": spend.c.micros + total.excluded.micros}
        )
        with self._engine.write() as connection:
            if connection.execute(is_new).first() is None:
                return False
            if rows:
                connection.execute(total, rows)  # in the order of their keys, so that two batches never wait in a ring
            more = False
            if now_unix_s >= self._prune_at_unix_s:
                old = spend_batches.c.added_unix_s < now_unix_s - BATCHES_KEPT_S
                connection.execute(spend_batches.delete().where(old))
                more = self._prune_users(connection, now_unix_s)
        if now_unix_s >= self._prune_at_unix_s:
            self._prune_at_unix_s = now_unix_s + (0.0 if more else PRUNED_EVERY_S)
        return True

    @staticmethod
    def _prune_users(connection: sa.Connection, now_unix_s: float) -> bool:
        """Delete rows of users whose period is long over; whether there may be more of them."""
        ended_unix_s = now_unix_s - USERS_KEPT_DAYS * 86_400
        day = datetime.fromtimestamp(ended_unix_s - 86_400, UTC).strftime("d%Y%m%d")
        month = datetime.fromtimestamp(ended_unix_s, UTC).strftime("m%Y%m")
        over = sa.or_(
            sa.and_(spend.c.period.between("d00000000", day), sa.func.length(spend.c.period) == len(day)),
            sa.and_(spend.c.period >= "m000000", spend.c.period < month, sa.func.length(spend.c.period) == len(month)),
        )
        # A name of a model might have ":u:" in it as well; a tenant's has no colon.
        users = sa.and_(spend.c.scope.like("{t:%}:u:" + 16 * "_"), spend.c.scope.not_like("%}:%:u:%"))
        some = sa.select(spend.c.period, spend.c.scope).where(over, users).limit(PRUNED_AT_ONCE)
        some = some.with_for_update(skip_locked=True)  # another gateway may be at the same ones
        which = sa.tuple_(spend.c.period, spend.c.scope).in_(some)
        return connection.execute(spend.delete().where(which)).rowcount >= PRUNED_AT_ONCE

    def totals(self, keys: Iterable[SpendKey]) -> dict[SpendKey, int]:
        """What is on record for each of them, 0 for one that is not."""
        wanted = list(dict.fromkeys(keys))
        found = dict.fromkeys(wanted, 0)
        rest = iter([key for key in wanted if _plausible(key)])
        with self._engine.read() as connection:
            while part := list(islice(rest, _AT_ONCE)):
                which = sa.tuple_(spend.c.scope, spend.c.period).in_(part)
                for scope, period, micros in connection.execute(
                    sa.select(spend.c.scope, spend.c.period, spend.c.micros).where(which)
                ):
                    found[scope, period] = micros
        return found

    def largest(self, periods: Iterable[str], most: int) -> dict[SpendKey, int]:
        """Who has spent most in these periods, as far as `most` goes."""
        wanted = sa.select(spend.c.scope, spend.c.period, spend.c.micros).where(spend.c.period.in_(list(periods)))
        with self._engine.read() as connection:
            rows = connection.execute(wanted.order_by(spend.c.micros.desc()).limit(most))
            return {(scope, period): micros for scope, period, micros in rows}

    def of_period(self, period: str) -> dict[str, int]:
        """Every scope that has spent in this period, and how much."""
        if _PERIOD.fullmatch(period) is None:
            return {}
        with self._engine.read() as connection:
            rows = connection.execute(sa.select(spend.c.scope, spend.c.micros).where(spend.c.period == period))
            return {scope: micros for scope, micros in rows}


def _plausible(key: SpendKey) -> bool:
    scope, period = key
    return 1 <= len(scope) <= MAX_SCOPE_LENGTH and scope.isprintable() and _PERIOD.fullmatch(period) is not None


def _row(key: SpendKey, micros: int) -> dict[str, object]:
    if not _plausible(key):
        raise InvalidValue("deltas", "a scope has 1 to 1000 printable characters, a period e.g. d20261122")
    if type(micros) is not int or not 0 <= micros <= MAX_MICROS:
        raise InvalidValue("deltas", f"an amount must be a whole number from 0 to {MAX_MICROS}")
    return {"period": key[1], "scope": key[0], "micros": micros}
