"""Keys and tenants of record, with one version over all their changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.database import checked
from gateway.database.answers import Changes
from gateway.database.engine import Engine
from gateway.database.errors import Conflict, DatabaseInvalid, InvalidValue, NotFound, VersionConflict
from gateway.database.rows import Reader, key_rows, key_values, tenant_rows, tenant_values
from gateway.database.tables import counters, keys, tenants
from gateway.database.turns import Turn, turn
from gateway.keys.records import KeyRecord, TenantRecord

_AT_ONCE = 2000
_NEVER_TOLD = {"digest"}
_VERSION = sa.select(counters.c.version).where(counters.c.id == 1)


class Keys:
    """Keys by id. A removed one leaves its row behind, so that every gateway hears of it."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def create(self, record: KeyRecord, actor: str) -> KeyRecord:
        """Store a new key; the record as stored comes back. Raises `InvalidValue`, `Conflict` (id or digest known)."""
        record = self._checked_new(record)
        with turn(self._engine, self._clock, actor) as mine:
            self._insert(mine, record)
            mine.record("key.create", record.id, _created(record))
        return record

    def get(self, id: str) -> KeyRecord:
        """Raises `NotFound`."""
        with self._engine.read() as connection:
            return self._row(connection, id)

    def list(self, tenant: str | None = None) -> tuple[KeyRecord, ...]:
        """All keys, or one tenant's, the oldest first."""
        wanted = key_rows.where(keys.c.removed.is_(False)).order_by(keys.c.created_unix_s, keys.c.id)
        if tenant is not None:
            wanted = wanted.where(keys.c.tenant == _safe(tenant))
        reader = Reader()
        with self._engine.read() as connection:
            found = tuple(map(reader.key, connection.execute(wanted, execution_options={"yield_per": _AT_ONCE})))
        reader.report()
        return found

    def update(self, id: str, changes: Mapping[str, object], actor: str, if_version: int | None = None) -> KeyRecord:
        """Change fields (`checked.CHANGEABLE`), given as the record holds them or as JSON does; the new record.

        What is the same already changes nothing and is not recorded. `if_version`: only if that was its last change.
        Raises `NotFound`, `InvalidValue`, `VersionConflict`.
        """
        with turn(self._engine, self._clock, actor) as mine:
            before = self._row(mine.connection, id)
            _expect(mine, keys, keys.c.id == id, if_version, f"the key {id}")
            after = checked.with_changes(before, changes)
            diff = _difference(before, after)
            if diff:
                checked.changed_key(after, diff, mine.now_unix_s)
                self._write(mine, after, diff)
                mine.record(_action(diff, after), id, diff)
        return after

    def rotate(
        self,
        id: str,
        replacement: KeyRecord,
        old_expires_unix_s: float,
        actor: str,
        if_version: int | None = None,
    ) -> KeyRecord:
        """Put a new key in the place of one, which goes on until then (or its own expiry, if that is earlier).

        The old record as changed comes back. Raises `NotFound`; `Conflict` for a key that no longer works or has a
        replacement already; `InvalidValue`.
        """
        replacement = self._checked_new(replacement)
        with turn(self._engine, self._clock, actor) as mine:
            before = self._row(mine.connection, id)
            _expect(mine, keys, keys.c.id == id, if_version, f"the key {id}")
            expired = before.expires_unix_s is not None and before.expires_unix_s <= mine.now_unix_s
            if before.disabled or expired or before.replaced_by is not None:
                state = "disabled" if before.disabled else "expired" if expired else "replaced already"
                raise Conflict(f"the key {id} is {state}: make a new one")
            if replacement.tenant != before.tenant:
                raise InvalidValue("tenant", "a key's replacement belongs to the same tenant")
            ends = min(old_expires_unix_s, before.expires_unix_s or old_expires_unix_s)
            after = msgspec.structs.replace(before, replaced_by=replacement.id, expires_unix_s=ends)
            diff = _difference(before, after)
            checked.changed_key(after, diff, mine.now_unix_s)
            self._insert(mine, replacement)
            self._write(mine, after, diff)
            mine.record("key.rotate", id, {**diff, "replacement": _created(replacement)})
        return after

    def remove(self, id: str, actor: str, if_version: int | None = None) -> None:
        """For good: it is in no list any more, and nothing brings it back. Raises `NotFound`, `VersionConflict`."""
        with turn(self._engine, self._clock, actor) as mine:
            self._exists(mine.connection, id)
            _expect(mine, keys, keys.c.id == id, if_version, f"the key {id}")
            mine.connection.execute(keys.update().where(keys.c.id == id).values(removed=True, version=mine.version))
            mine.live_keys -= 1
            mine.record("key.remove", id, {"removed": [False, True]})

    def changed_since(self, version: int) -> Changes:
        """What changed after this version, of keys and of tenants; 0: everything. One small query if nothing did.

        Nothing is ever left out. What changes while this reads may come twice.
        """
        now = self._engine.value(_VERSION)
        if now is None:
            raise DatabaseInvalid(self._engine.address.shown, "its counters are gone")
        if now == version:
            return Changes(version)
        with self._engine.read() as connection:
            return _changes(connection, version)

    def _checked_new(self, record: KeyRecord) -> KeyRecord:
        now_unix_s = self._clock()
        if not record.created_unix_s:
            record = msgspec.structs.replace(record, created_unix_s=now_unix_s)
        if record.replaced_by is not None:
            raise InvalidValue("replaced_by", "a new key is not replaced yet")
        return checked.key(record, now_unix_s)

    def _insert(self, mine: Turn, record: KeyRecord) -> None:
        mine.room_for_a_key()
        mine.connection.execute(keys.insert().values(**key_values(record), version=mine.version, removed=False))

    def _write(self, mine: Turn, record: KeyRecord, fields: Mapping[str, object]) -> None:
        values = {**key_values(record, fields), "version": mine.version}
        mine.connection.execute(keys.update().where(keys.c.id == record.id).values(**values))

    def _row(self, connection: sa.Connection, id: str) -> KeyRecord:
        reader = Reader()
        record = reader.key(self._exists(connection, id))
        reader.report()
        return record

    def _exists(self, connection: sa.Connection, id: str) -> Any:
        row = connection.execute(key_rows.where(keys.c.id == _safe(id), keys.c.removed.is_(False))).one_or_none()
        if row is None:
            raise NotFound(f"there is no key {id!r:.80}")
        return row


class Tenants:
    """Tenants by name."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def put(self, record: TenantRecord, actor: str, if_version: int | None = None) -> TenantRecord:
        """Make or replace a tenant, as a whole. Raises `InvalidValue`, `VersionConflict`."""
        record = checked.tenant(record)
        with turn(self._engine, self._clock, actor) as mine:
            _expect(mine, tenants, tenants.c.name == record.name, if_version, f"the tenant {record.name}")
            row = mine.connection.execute(tenant_rows.where(tenants.c.name == record.name)).one_or_none()
            values = {**tenant_values(record), "version": mine.version, "removed": False}
            if row is None:
                mine.connection.execute(tenants.insert().values(**values))
            else:
                mine.connection.execute(tenants.update().where(tenants.c.name == record.name).values(**values))
            before = TenantRecord(record.name) if row is None or row.removed else Reader().tenant(row)
            mine.record("tenant.put", record.name, _difference(before, record))
        return record

    def get(self, name: str) -> TenantRecord:
        """Raises `NotFound`."""
        with self._engine.read() as connection:
            return _tenant(connection, name)

    def list(self) -> tuple[TenantRecord, ...]:
        """By name."""
        reader = Reader()
        with self._engine.read() as connection:
            rows = connection.execute(tenant_rows.where(tenants.c.removed.is_(False)).order_by(tenants.c.name))
            found = tuple(map(reader.tenant, rows))
        reader.report()
        return found

    def remove(self, name: str, actor: str, if_version: int | None = None) -> None:
        """Raises `NotFound`, `VersionConflict`, and `Conflict` while it has keys: they would be left without its
        limits."""
        with turn(self._engine, self._clock, actor) as mine:
            _tenant(mine.connection, name)
            _expect(mine, tenants, tenants.c.name == name, if_version, f"the tenant {name}")
            its = sa.select(sa.func.count()).select_from(keys).where(keys.c.tenant == name, keys.c.removed.is_(False))
            if count := mine.connection.execute(its).scalar_one():
                raise Conflict(f"the tenant {name} has {count} keys: remove them first, or disable the tenant")
            values = {"removed": True, "version": mine.version}
            mine.connection.execute(tenants.update().where(tenants.c.name == name).values(**values))
            mine.record("tenant.remove", name, {"removed": [False, True]})


def _tenant(connection: sa.Connection, name: str) -> TenantRecord:
    wanted = tenant_rows.where(tenants.c.name == _safe(name), tenants.c.removed.is_(False))
    row = connection.execute(wanted).one_or_none()
    if row is None:
        raise NotFound(f"there is no tenant {name!r:.80}")
    reader = Reader()
    record = reader.tenant(row)
    reader.report()
    return record


def _expect(mine: Turn, table: sa.Table, is_it: sa.ColumnElement[bool], version: int | None, what: str) -> None:
    """Raise `VersionConflict` unless the last change of this row has that version, if one is asked for."""
    if version is None:
        return
    now = mine.connection.execute(sa.select(table.c.version).where(is_it, table.c.removed.is_(False))).scalar()
    if now != version:
        raise VersionConflict(what, int(now or 0))


def _changes(connection: sa.Connection, version: int) -> Changes:
    now = connection.execute(_VERSION).scalar_one()
    everything = version <= 0 or now < version
    wanted_keys = keys.c.removed.is_(False) if everything else keys.c.version > version
    wanted_tenants = tenants.c.removed.is_(False) if everything else tenants.c.version > version
    reader = Reader()
    found: list[KeyRecord] = []
    gone: list[str] = []
    for row in connection.execute(key_rows.where(wanted_keys), execution_options={"yield_per": _AT_ONCE}):
        if row.removed:
            gone.append(row.id)
        else:
            found.append(reader.key(row))
    tenant_found = connection.execute(tenant_rows.where(wanted_tenants)).all()
    reader.report()
    return Changes(
        now,
        tuple(found),
        tuple(gone),
        tuple(reader.tenant(row) for row in tenant_found if not row.removed),
        tuple(row.name for row in tenant_found if row.removed),
        everything,
    )


def _safe(text: str) -> str:
    """A name to look for: what PostgreSQL cannot take as a text is certainly not there."""
    return text if text.isprintable() else ""


def _difference(before: KeyRecord | TenantRecord, after: KeyRecord | TenantRecord) -> dict[str, list[Any]]:
    return {
        field: [msgspec.to_builtins(getattr(before, field)), msgspec.to_builtins(getattr(after, field))]
        for field in before.__struct_fields__
        if field not in _NEVER_TOLD and getattr(before, field) != getattr(after, field)
    }


def _created(record: KeyRecord) -> dict[str, list[Any]]:
    return _difference(KeyRecord("", b"", ""), record)


def _action(diff: Mapping[str, object], after: KeyRecord) -> str:
    if set(diff) == {"disabled"}:
        return "key.disable" if after.disabled else "key.enable"
    return "key.expire" if set(diff) == {"expires_unix_s"} else "key.update"
