"""Who changed what, when: written with the change or not at all, and never changed by anyone.

The database itself refuses to change or delete an entry (triggers), so no fault of this program can. Whoever owns the
database can still take the triggers away; ids follow each other without gaps, so that what was taken out is missed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.database import checked
from gateway.database.answers import AuditEntry
from gateway.database.engine import Engine
from gateway.database.errors import InvalidValue
from gateway.database.tables import audit, counters
from gateway.database.turns import turn
from gateway.keys.format import holds_key

MAX_DIFF_BYTES = 65_536
MAX_LIST = 1001
"""A page, and whether there is more."""


class Audit:
    """The entries, the newest first."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def list(
        self, limit: int = 100, before_id: int | None = None, *, actor: str = "", action: str = "", object: str = ""
    ) -> tuple[AuditEntry, ...]:
        """At most `limit` (1 to 1001) entries older than `before_id`, of actors and objects with these texts in their
        names, and of actions that begin so."""
        wanted = sa.select(audit).order_by(audit.c.id.desc()).limit(max(1, min(limit, MAX_LIST)))
        if before_id is not None:
            wanted = wanted.where(audit.c.id < min(before_id, 2**62))
        for column, text in ((audit.c.actor, actor), (audit.c.object, object)):
            if text:
                wanted = wanted.where(sa.func.lower(column).contains(_safe(text.lower()), autoescape=True))
        if action:
            wanted = wanted.where(audit.c.action.startswith(_safe(action), autoescape=True))
        with self._engine.read() as connection:
            return tuple(entry_of(row) for row in connection.execute(wanted))

    def record(self, actor: str, action: str, subject: str, diff: Mapping[str, Any]) -> int:
        """Note something that changes no key and no tenant: a reload, a drain. Its id. Raises `InvalidValue`."""
        checked.text("action", action[:65], 1)
        checked.text("object", subject)
        try:
            written = msgspec.json.encode(diff)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidValue("diff", "it has something in it that JSON cannot hold") from error
        if len(action) > 64 or len(written) > MAX_DIFF_BYTES:
            raise InvalidValue("diff", f"at most {MAX_DIFF_BYTES} bytes as JSON, and 64 characters of action")
        if holds_key(written.decode()):
            raise InvalidValue("diff", "it has an API key in it: keys are never stored")
        with turn(self._engine, self._clock, actor, directory=False) as mine:
            mine.record(action, subject, diff)
        return mine.audit_id

    def missing(self) -> tuple[tuple[int, int], ...]:
        """First and last id of each run of entries that were there and are not: empty unless somebody removed some."""
        summary = sa.select(sa.func.count(), sa.func.min(audit.c.id), sa.func.max(audit.c.id))
        with self._engine.read() as connection:
            found = tuple(connection.execute(summary).one())
            issued = connection.execute(sa.select(counters.c.audit_id).where(counters.c.id == 1)).scalar() or 0
        if found == ((issued, 1, issued) if issued else (0, None, None)):
            return ()  # ids are unique: these are all from 1 to the last
        before = sa.func.lag(audit.c.id, 1, 0).over(order_by=audit.c.id).label("before")
        steps = sa.select(audit.c.id, before).subquery()
        with self._engine.read() as connection:
            rows = connection.execute(sa.select(steps).where(steps.c.id > steps.c.before + 1)).all()
            last = connection.execute(sa.select(sa.func.max(audit.c.id))).scalar() or 0
            issued = connection.execute(sa.select(counters.c.audit_id).where(counters.c.id == 1)).scalar() or 0
        tail = ((last + 1, issued),) if issued > last else ()
        return (*((row.before + 1, row.id - 1) for row in rows), *tail)


def _safe(text: str) -> str:
    """What PostgreSQL cannot take as a text is certainly in none."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def entry_of(row: Any) -> AuditEntry:
    """A row as an entry."""
    try:
        diff = msgspec.json.decode(row.diff, type=dict[str, Any])
    except msgspec.MsgspecError:
        diff = {}
    return AuditEntry(row.id, row.time_unix_s, row.actor, row.action, row.object, diff)
