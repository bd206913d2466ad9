"""Takes back a change of a key or a tenant, by what the audit says it was before.

Only fields that are still as that change left them are put back: what somebody has set since is never lost. What cannot
be taken back: a rotation and a revocation, since the text of a key is kept nowhere, and the removal of a tenant, which
is made anew by naming it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.database.database import Database
from gateway.database.errors import Conflict, NotFound
from gateway.keys.issuing import UnknownName
from gateway.keys.records import KeyRecord, TenantRecord

UNDOABLE = frozenset({"key.update", "key.disable", "key.enable", "key.expire", "tenant.put"})


def undo(database: Database, audit_id: int, actor: str) -> KeyRecord | TenantRecord:
    """The key or tenant as it is after the change was taken back, which is a change of its own in the audit.

    Raises `UnknownName` when there is no such entry, key or tenant; `Conflict` when it cannot be undone any more.
    """
    try:
        entry = database.finding.change(audit_id)
    except NotFound:
        raise UnknownName(f"the audit has no entry {audit_id}") from None
    if entry.action not in UNDOABLE:
        raise Conflict(f"{entry.action} cannot be undone")
    try:
        if entry.action.startswith("tenant."):
            tenant, version, _ = database.finding.tenant(entry.object)
            fields = {**msgspec.to_builtins(tenant), **_before(tenant, entry.diff)}
            return database.tenants.put(msgspec.convert(fields, TenantRecord), actor, version)
        key, version = database.finding.key(entry.object)
        return database.keys.update(entry.object, _before(key, entry.diff), actor, version)
    except NotFound:
        raise UnknownName(f"{entry.object} is not there any more") from None


def _before(record: KeyRecord | TenantRecord, diff: dict[str, Any]) -> dict[str, Any]:
    """The values to put back. Raises `Conflict` where one was changed again."""
    found: dict[str, Any] = {}
    for field, change in diff.items():
        if field not in record.__struct_fields__ or not isinstance(change, list) or len(change) != 2:
            raise Conflict("the audit does not say what it was before")
        if msgspec.to_builtins(getattr(record, field)) != change[1]:
            raise Conflict(f"{field} was changed again since; set it by hand")
        found[field] = change[0]
    return found
