"""Pages of keys and tenants, found by the database itself: ten thousand keys are never loaded to show fifty.

A page follows the one before by the place of its last entry, so that what is made or removed in between neither repeats
nor hides others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.database.answers import AuditEntry, KeyQuery
from gateway.database.audit import entry_of
from gateway.database.engine import Engine
from gateway.database.errors import NotFound
from gateway.database.rows import Reader, key_rows, tenant_rows
from gateway.database.tables import audit, keys, tenants
from gateway.keys.records import KeyRecord, TenantRecord

JUST_WRITTEN = 1000
"""Entries of the audit: there is no index by what they are about, and need be none for the change of a moment ago."""


class Page(msgspec.Struct, frozen=True):
    """Entries with their versions."""

    keys: tuple[tuple[KeyRecord, int], ...] = ()
    tenants: tuple[tuple[TenantRecord, int, int], ...] = ()
    """With the number of their keys as the third."""
    more: bool = False


class Finding:
    """Reads only."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def keys(self, query: KeyQuery) -> Page:
        """One page."""
        wanted = self._wanted(query)
        at = sa.select(keys.c.created_unix_s).where(keys.c.id == _safe(query.after)).scalar_subquery()
        created, id = keys.c.created_unix_s, keys.c.id
        order = [created.desc(), id.desc()] if query.newest else [id.asc()]
        if query.after:
            older = sa.or_(created < at, sa.and_(created == at, id < _safe(query.after)))
            wanted.append(older if query.newest else id > _safe(query.after))
        # Sorted by themselves first: whole rows are read of the page alone.
        page_of = sa.select(id).where(*wanted).order_by(*order).limit(query.limit + 1)
        found = key_rows.add_columns(keys.c.version).where(id.in_(page_of)).order_by(*order)
        reader = Reader()
        with self._engine.read() as connection:
            rows = connection.execute(found).all()
        page = tuple((reader.key(row), int(row.version)) for row in rows[: query.limit])
        reader.report()
        return Page(keys=page, more=len(rows) > query.limit)

    def count_keys(self, query: KeyQuery) -> int:
        """How many there are on all pages."""
        with self._engine.read() as connection:
            return int(
                connection.execute(
                    sa.select(sa.func.count()).select_from(keys).where(*self._wanted(query))
                ).scalar_one()
            )

    def _wanted(self, query: KeyQuery) -> list[sa.ColumnElement[bool]]:
        wanted: list[sa.ColumnElement[bool]] = [keys.c.removed.is_(False)]
        if query.tenant is not None:
            wanted.append(keys.c.tenant == _safe(query.tenant))
        if query.text:
            pattern = _containing(query.text)
            columns = (keys.c.id, keys.c.name, keys.c.hint, keys.c.tenant)
            wanted.append(sa.or_(*(sa.func.lower(column).like(pattern, escape="\\") for column in columns)))
        if query.state is not None:
            over = sa.and_(keys.c.expires_unix_s.is_not(None), keys.c.expires_unix_s <= self._clock())
            wanted.append(over if query.state == "expired" else sa.not_(over))
            if query.state != "expired":
                wanted.append(keys.c.disabled.is_(query.state == "disabled"))
        return wanted

    def key(self, id: str) -> tuple[KeyRecord, int]:
        """A key and the version of its last change. Raises `NotFound`."""
        wanted = key_rows.add_columns(keys.c.version).where(keys.c.id == _safe(id), keys.c.removed.is_(False))
        with self._engine.read() as connection:
            row = connection.execute(wanted).one_or_none()
        if row is None:
            raise NotFound(f"there is no key {id!r:.80}")
        reader = Reader()
        record = reader.key(row)
        reader.report()
        return record, int(row.version)

    def tenants(self, text: str = "", after: str = "", limit: int = 100) -> Page:
        """One page, by name."""
        wanted = [tenants.c.removed.is_(False), tenants.c.name > _safe(after)]
        if text:
            wanted.append(sa.func.lower(tenants.c.name).like(_containing(text), escape="\\"))
        found = tenant_rows.add_columns(tenants.c.version).where(*wanted).order_by(tenants.c.name).limit(limit + 1)
        reader = Reader()
        with self._engine.read() as connection:
            rows = connection.execute(found).all()
            counts = _key_counts(connection, [row.name for row in rows[:limit]])
        page = tuple((reader.tenant(row), int(row.version), counts.get(row.name, 0)) for row in rows[:limit])
        reader.report()
        return Page(tenants=page, more=len(rows) > limit)

    def tenant(self, name: str) -> tuple[TenantRecord, int, int]:
        """A tenant, the version of its last change, and how many keys it has. Raises `NotFound`."""
        wanted = tenant_rows.add_columns(tenants.c.version)
        wanted = wanted.where(tenants.c.name == _safe(name), tenants.c.removed.is_(False))
        with self._engine.read() as connection:
            row = connection.execute(wanted).one_or_none()
            if row is None:
                raise NotFound(f"there is no tenant {name!r:.80}")
            counts = _key_counts(connection, [name])
        reader = Reader()
        record = reader.tenant(row)
        reader.report()
        return record, int(row.version), counts.get(name, 0)

    def last_change(self, subject: str) -> int | None:
        """The id of the newest entry of the audit on a key or a tenant, of those that have just been written."""
        with self._engine.read() as connection:
            newest = connection.execute(sa.select(sa.func.max(audit.c.id))).scalar() or 0
            wanted = sa.select(sa.func.max(audit.c.id)).where(audit.c.object == _safe(subject))
            wanted = wanted.where(audit.c.id > newest - JUST_WRITTEN)
            found = connection.execute(wanted).scalar()
        return None if found is None else int(found)

    def change(self, audit_id: int) -> AuditEntry:
        """One entry of the audit. Raises `NotFound`."""
        with self._engine.read() as connection:
            row = connection.execute(sa.select(audit).where(audit.c.id == min(audit_id, 2**62))).one_or_none()
        if row is None:
            raise NotFound(f"the audit has no entry {audit_id}")
        return entry_of(row)


def _key_counts(connection: sa.Connection, names: list[str]) -> dict[str, int]:
    wanted = (
        sa.select(keys.c.tenant, sa.func.count())
        .where(keys.c.tenant.in_(names), keys.c.removed.is_(False))
        .group_by(keys.c.tenant)
    )
    rows: Any = connection.execute(wanted)
    return {tenant: int(count) for tenant, count in rows}


def _containing(text: str) -> str:
    escaped = _safe(text).lower().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def _safe(text: str) -> str:
    """A name to look for: what PostgreSQL cannot take as a text is certainly not there."""
    return text if text.isprintable() else "\ufffd"
