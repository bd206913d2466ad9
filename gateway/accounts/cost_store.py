"""What was used and what it cost, over time, in one small SQLite file: minutes for two hours, hours for eight days,
days for two months.

Everything is added up when it is written, so that a month by tenant is read from 31 rows a tenant, never from records
of requests. The file is bounded: a step of time holds at most `MAX_ROWS_A_STEP` rows, and what comes after those counts
under `other`. It is a view for people: the spend of record, which budgets go by, is in the database of keys.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gateway.accounts.counts import FIELDS, OTHER, Key

logger = logging.getLogger(__name__)

MAX_ROWS_A_STEP = 2000
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
KEPT_S = {MINUTE_S: 2 * HOUR_S, HOUR_S: 8 * DAY_S, DAY_S: 62 * DAY_S}
"""How long each step of time is kept, by its length: of 2,000 tenants that are busy all the time some 750,000 rows, or
100 MB."""
COLUMNS = {"tenant": "tenant", "model": "model", "backend": "pool"}
"""What can be asked for by, and its column."""

_SUMS = ", ".join(f"sum({name})" for name in FIELDS)
_SCHEMA = f"""CREATE TABLE IF NOT EXISTS use_1 (
  step INTEGER NOT NULL, at INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, pool TEXT NOT NULL,
  rented INTEGER NOT NULL, {", ".join(f"{name} INTEGER NOT NULL" for name in FIELDS)},
  PRIMARY KEY (step, at, tenant, model, pool, rented)) WITHOUT ROWID"""
_ADD = f"INSERT INTO use_1 VALUES ({', '.join('?' * (6 + len(FIELDS)))}) ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{name} = {name} + excluded.{name}" for name in FIELDS
)


_WHERE = """FROM use_1 WHERE step = :step AND at BETWEEN :first AND :last AND (:tenant IS NULL OR tenant = :tenant)
  AND (:model IS NULL OR model = :model) AND (:backend IS NULL OR pool = :backend)"""
_CHOSEN = "(SELECT value FROM json_each(:chosen))"
_COUNT = {by: f"SELECT count(DISTINCT {column}) {_WHERE}" for by, column in COLUMNS.items()}
_NAMES = {
    by: f"SELECT {column} AS name {_WHERE} GROUP BY {column} "
    "ORDER BY sum(micros) DESC, sum(prompt + completion) DESC, name LIMIT :most"
    for by, column in COLUMNS.items()
}
_TOTALS = {
    by: f"SELECT {column}, rented, {_SUMS} {_WHERE} AND {column} IN {_CHOSEN} GROUP BY {column}, rented"
    for by, column in COLUMNS.items()
}
_STEPS = f"SELECT at, rented, {_SUMS} {_WHERE} GROUP BY at, rented"
_STEPS_OF = {
    by: f"SELECT at, {column}, sum(micros), sum(prompt + completion) {_WHERE} AND {column} IN {_CHOSEN} "
    f"GROUP BY at, {column}"
    for by, column in COLUMNS.items()
}
"""Statements are whole before anything is asked; what comes from outside is bound."""


class Span(msgspec.Struct, frozen=True):
    """A window, in steps: `first` and `last` are the beginnings of its first and last step, in Unix seconds."""

    step_s: int
    first: int
    last: int

    @property
    def times(self) -> list[int]:
        return list(range(self.first, self.last + 1, self.step_s))


WINDOWS = {
    "hour": (MINUTE_S, HOUR_S),
    "day": (HOUR_S, DAY_S),
    "week": (HOUR_S, 7 * DAY_S),
    "month": (DAY_S, 31 * DAY_S),
}


def span(window: str, now_unix_s: float) -> Span:
    """The steps of a window that ends now; the last of them is not over yet.

    >>> span("hour", 7230.0)
    Span(step_s=60, first=3660, last=7200)
    """
    step_s, length_s = WINDOWS[window]
    last = int(now_unix_s) // step_s * step_s
    return Span(step_s, last - length_s + step_s, last)


class CostStore:
    """Every method blocks, and may be called from any thread. `path` None: in memory, gone at the end."""

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._db = _opened(path)
        self._swept_at = 0.0

    def add(self, deltas: Mapping[Key, Sequence[int]], now_unix_s: float) -> None:
        """Add what was used since the last time."""
        with self._lock, self._db:
            for step_s in KEPT_S:
                at = int(now_unix_s) // step_s * step_s
                rows = self._bounded(step_s, at, deltas)
                self._db.executemany(_ADD, [(step_s, at, *key, *amounts) for key, amounts in rows.items()])
            if now_unix_s - self._swept_at >= MINUTE_S:
                self._swept_at = now_unix_s
                for step_s, kept_s in KEPT_S.items():
                    self._db.execute("DELETE FROM use_1 WHERE step = ? AND at < ?", (step_s, int(now_unix_s) - kept_s))

    def _bounded(self, step_s: int, at: int, deltas: Mapping[Key, Sequence[int]]) -> dict[Key, list[int]]:
        """The rows to add, those that would be too many together as `other`."""
        (count,) = self._db.execute("SELECT count(*) FROM use_1 WHERE step = ? AND at = ?", (step_s, at)).fetchone()
        if count + len(deltas) <= MAX_ROWS_A_STEP:
            return {key: list(amounts) for key, amounts in deltas.items()}
        known = {
            (tenant, model, pool, bool(rented))
            for tenant, model, pool, rented in self._db.execute(
                "SELECT tenant, model, pool, rented FROM use_1 WHERE step = ? AND at = ?", (step_s, at)
            )
        }
        rows: dict[Key, list[int]] = {}
        for key, amounts in deltas.items():
            if key not in known:
                if len(known) < MAX_ROWS_A_STEP - 2:
                    known.add(key)
                else:
                    key = (OTHER, OTHER, OTHER, key[3])
            before = rows.get(key)
            rows[key] = list(amounts) if before is None else [a + b for a, b in zip(before, amounts, strict=True)]
        return rows

    def totals(
        self, by: str, span: Span, only: Mapping[str, str], most: int
    ) -> tuple[list[tuple[str, bool, list[int]]], int]:
        """Names with their sums, own and rented apart, those that cost (or else used) most first; and how many names
        there are. `only`: values of `COLUMNS` that rows must have."""
        values = _values(span, only)
        with self._lock:
            (count,) = self._db.execute(_COUNT[by], values).fetchone()
            chosen = [name for (name,) in self._db.execute(_NAMES[by], {**values, "most": most})]
            found = self._db.execute(_TOTALS[by], {**values, "chosen": json.dumps(chosen)}).fetchall()
        place = {name: position for position, name in enumerate(chosen)}
        rows = [(name, bool(rented), list(amounts)) for name, rented, *amounts in found]
        return sorted(rows, key=lambda row: (place[row[0]], row[1])), count

    def steps(self, span: Span, only: Mapping[str, str]) -> list[tuple[int, bool, list[int]]]:
        """The sums of each step, own and rented apart; steps with nothing in them are left out."""
        with self._lock:
            found = self._db.execute(_STEPS, _values(span, only)).fetchall()
        return [(at, bool(rented), list(amounts)) for at, rented, *amounts in found]

    def steps_of(
        self, by: str, names: Iterable[str], span: Span, only: Mapping[str, str]
    ) -> list[tuple[int, str, int, int]]:
        """Step, name, millionths of a dollar and tokens, for a chart."""
        values = {**_values(span, only), "chosen": json.dumps(list(names))}
        with self._lock:
            return self._db.execute(_STEPS_OF[by], values).fetchall()

    def begins_unix_s(self) -> int | None:
        """The first day of which anything is known."""
        with self._lock:
            (first,) = self._db.execute("SELECT min(at) FROM use_1 WHERE step = ?", (DAY_S,)).fetchone()
        return None if first is None else int(first)

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _values(span: Span, only: Mapping[str, str]) -> dict[str, Any]:
    return {"step": span.step_s, "first": span.first, "last": span.last, **{name: only.get(name) for name in COLUMNS}}


def _opened(path: Path | None) -> sqlite3.Connection:
    """The file, made if there is none; one that is damaged is put aside. In memory where there can be no file."""
    if path is not None:
        for attempt in range(2):
            try:
                return _connected(path)
            except sqlite3.DatabaseError as error:
                logger.warning("costs: %s cannot be used: %s", path, error)
                if attempt == 0 and not isinstance(error, sqlite3.OperationalError):
                    path.replace(path.with_suffix(".damaged"))
                    continue
                break
            except OSError as error:
                logger.warning("costs: %s cannot be used: %s", path, error)
                break
        logger.warning("costs: they are kept in memory only, until this gateway ends")
    return _connected(None)


def _connected(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.touch(mode=0o600)
    connection = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(_SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection
