"""Rows and records: how a key or a tenant is written, and how one is read that another version wrote.

Reading never fails. A field of a limit that this version does not know is left out, and said; a class that it does not
know is taken for the least urgent one; a row that makes no sense becomes a disabled record: one bad row must neither
stop the gateway nor let anybody in with more rights than were meant.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.database import checked
from gateway.database.errors import InvalidValue
from gateway.database.tables import keys, tenants
from gateway.keys.records import PRIORITY_CLASSES, KeyRecord, TenantRecord
from gateway.limits.sets import LimitSet

logger = logging.getLogger(__name__)

_KEY_FIELDS = KeyRecord.__struct_fields__
_TENANT_FIELDS = TenantRecord.__struct_fields__
_LIMIT_FIELDS = frozenset(LimitSet.__struct_fields__)
_EMPTY = {"{}": dict, "[]": list}
_KEY_JSON = ("models", "adapters", "regions", "limits", "raises", "metadata")
_TENANT_JSON = ("limits", "user_limits", "model_limits", "raises", "metadata")
_ERRORS = (msgspec.MsgspecError, InvalidValue, TypeError, ValueError, AttributeError, RecursionError)


def _select(table: sa.Table, fields: tuple[str, ...]) -> sa.Select[Any]:
    """A record's fields in their order, as the driver gives them: a type that is not what it should be must not fail
    here. The tombstone last."""
    columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in (*fields, "removed")]
    return sa.select(*columns).select_from(table)


def key_values(record: KeyRecord, fields: Iterable[str] = _KEY_FIELDS) -> dict[str, Any]:
    """The columns for these fields."""
    return {field: _written(getattr(record, field), field in _KEY_JSON) for field in fields}


def tenant_values(record: TenantRecord) -> dict[str, Any]:
    """All columns but the version and the tombstone."""
    return {field: _written(getattr(record, field), field in _TENANT_JSON) for field in _TENANT_FIELDS}


def _written(value: Any, as_json: bool) -> Any:
    return msgspec.json.encode(value).decode() if as_json and value is not None else value


class Reader:
    """Reads the rows of one answer; `report` then says in the log what was wrong, once for all of them."""

    def __init__(self) -> None:
        self._unknown: Counter[str] = Counter()
        self._unreadable: list[str] = []

    def key(self, row: Any) -> KeyRecord:
        try:
            values = dict(zip(_KEY_FIELDS, row, strict=False))
            for name in _KEY_JSON:
                values[name] = _parsed(values[name])
            values["disabled"] = values["disabled"] != 0
            values["capture_content"] = values["capture_content"] == 1  # anything else keeps nothing
            values["tenant"] = sys.intern(values["tenant"])
            if (its_class := values["priority_class"]) not in PRIORITY_CLASSES:
                self._unknown[f"priority class {its_class!s:.40}"] += 1
                values["priority_class"] = PRIORITY_CLASSES[-1]
            record = self._record(values, KeyRecord)
            if not (record.tenant.isascii() and record.hint.isascii() and record.name.isprintable()):
                raise ValueError
            if len(record.digest) != 32 or (record.deadline_ms or 1) < 1 or (record.max_output_tokens or 1) < 1:
                raise ValueError
            return record
        except _ERRORS:
            self._unreadable.append(f"key {row.id!s:.64}")
            return KeyRecord(
                id=str(row.id),
                digest=row.digest if isinstance(row.digest, bytes) else b"",
                tenant=row.tenant if isinstance(row.tenant, str) else "",
                models=(),
                adapters=(),
                priority_class=PRIORITY_CLASSES[-1],
                disabled=True,
            )

    def tenant(self, row: Any) -> TenantRecord:
        try:
            values = dict(zip(_TENANT_FIELDS, row, strict=False))
            for name in _TENANT_JSON:
                values[name] = _parsed(values[name])
            values["disabled"] = values["disabled"] != 0
            record = self._record(values, TenantRecord)
            if not 0 < record.weight <= checked.MAX_WEIGHT:
                raise ValueError
            checked.limits("user_limits", record.user_limits)
            for limits in record.model_limits.values():
                checked.limits("model_limits", limits)
            return record
        except _ERRORS:
            self._unreadable.append(f"tenant {row.name!s:.64}")
            return TenantRecord(name=str(row.name), disabled=True)

    def _record(self, values: dict[str, Any], kind: type[checked.Record]) -> checked.Record:
        try:
            record = msgspec.convert(values, kind)
        except msgspec.ValidationError:
            self._leave_out_unknown(values)
            record = msgspec.convert(values, kind)
        checked.limits("limits", record.limits)
        if record.raises:
            checked.raises(record.raises)
        return record

    def _leave_out_unknown(self, values: dict[str, Any]) -> None:
        sets = [values["limits"], *(one["limits"] for one in values["raises"])]
        if "user_limits" in values:
            sets += [values["user_limits"], *values["model_limits"].values()]
        for limits in sets:
            for name in [name for name in limits if name not in _LIMIT_FIELDS]:
                self._unknown[f"limit {name:.40}"] += 1
                del limits[name]

    def report(self) -> None:
        """Say what was left out and what was disabled."""
        if self._unknown:
            what = ", ".join(f"{name} ({count})" for name, count in sorted(self._unknown.items())[:20])
            logger.warning("the database has what this version does not know and leaves out: %s", what)
        if self._unreadable:
            which = ", ".join(self._unreadable[:20])
            logger.error("%d rows cannot be read and count as disabled: %s", len(self._unreadable), which)


def _parsed(text: Any) -> Any:
    if text is None:
        return None
    if (empty := _EMPTY.get(text)) is not None:
        return empty()
    return msgspec.json.decode(text)


key_rows = _select(keys, _KEY_FIELDS)
tenant_rows = _select(tenants, _TENANT_FIELDS)
