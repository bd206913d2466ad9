"""What the database answers with."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from gateway.keys.records import KeyRecord, TenantRecord

MAX_KEYS = 200_000
"""Every gateway holds all keys in memory, about 1 KB each."""

SpendKey: TypeAlias = tuple[str, str]
"""A scope's key (`gateway.store.limits.Scope.key`) and a period (`Budget.period`)."""


class Changes(msgspec.Struct, frozen=True):
    """What was changed after some version. Applying the same twice does no harm."""

    version: int
    """What to ask with next time."""
    keys: tuple[KeyRecord, ...] = ()
    gone: tuple[str, ...] = ()
    """Ids of removed keys."""
    tenants: tuple[TenantRecord, ...] = ()
    gone_tenants: tuple[str, ...] = ()
    complete: bool = False
    """These are all keys and tenants there are: forget all others. So for version 0, and after the database was put
    back to an earlier state (its version is lower than the one asked about)."""


class AuditEntry(msgspec.Struct, frozen=True):
    """Who changed what, when."""

    id: int
    """1, 2, 3 … without gaps: one that is missing was taken out."""
    time_unix_s: float
    actor: str
    action: str
    """`key.create`, `key.update`, `key.disable`, `key.enable`, `key.expire`, `key.rotate`, `key.remove`, `tenant.put`,
    `tenant.remove`, or what else was recorded."""
    object: str
    """The key's id, the tenant's name, ..."""
    diff: dict[str, Any] = {}
    """Field: [before, after]. No digests, no secrets."""


KEY_STATES = ("valid", "disabled", "expired")


class KeyQuery(msgspec.Struct, frozen=True):
    """Which keys, and which page of them."""

    text: str = ""
    """Part of an id, a name, a hint or a tenant's name, in whatever case."""
    tenant: str | None = None
    state: str | None = None
    """One of `KEY_STATES`."""
    newest: bool = False
    """The newest first, instead of in the order of ids."""
    after: str = ""
    """The id of the last key of the page before."""
    limit: int = 100
