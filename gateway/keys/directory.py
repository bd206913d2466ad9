"""Every key and tenant that this process knows, in memory: who a request is from is one look-up away.

An unknown key costs what a known one costs, and never a question to the database. Unknown, expired, disabled and
revoked keys go the same way: one digest, one look-up in a dictionary that is keyed by the whole digest, one comparison
of times; and they get the same answer. What is known comes from two places: the configuration (`replace_static`) and
the database (`apply`, which `gateway.keys.sync` calls).

How old the last reading of the database is decides who is let in (`Freshness`). Nobody is ever let in because
something could not be checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import Enum

from gateway.config.limits import MAX_KEY_BYTES
from gateway.database.answers import Changes
from gateway.keys.errors import KeysUnavailable, Unauthenticated
from gateway.keys.format import Digester, well_formed
from gateway.keys.principal import Principal
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.limits.sets import LimitSet, overlaid

_CARRIERS = frozenset((b"authorization", b"x-api-key", b"api-key"))
"""OpenAI's header, Anthropic's and Azure's."""
_MOST_SALTS = 10_000
_REFUSED = "The API key is missing, or it is not valid. Send a valid one as: Authorization: Bearer <key>."
_UNREADABLE = "API keys cannot be checked at the moment. Try again in a second."


class Freshness(Enum):
    """How far the last reading of the database can be trusted."""

    CURRENT = "current"
    """Keys that are not known do not exist."""
    AGED = "aged"
    """Keys that were valid still are; of the others nobody can say (503)."""
    STALE = "stale"
    """So old, or never made, that nothing is let in (503)."""


class _Holder:
    """A tenant in whatever state it is; its keys' entries share it, so that a change of it is one assignment."""

    __slots__ = ("configured", "merged", "name", "recorded")

    def __init__(self, name: str) -> None:
        self.name = name
        self.configured: TenantRecord | None = None
        self.recorded: TenantRecord | None = None
        self.merged = TenantRecord(name)

    def merge(self) -> None:
        merged = merged_tenant(self.name, self.configured, self.recorded)
        if merged != self.merged:  # else principals stay who they are, and plans that were made for them hold
            self.merged = merged


class _Entry:
    """What a digest opens."""

    __slots__ = ("holder", "principal", "until_unix_s")

    def __init__(self, record: KeyRecord | None, holder: _Holder) -> None:
        self.holder = holder
        self.principal = Principal(record, holder.merged)
        if record is None or record.disabled:
            self.until_unix_s = -math.inf
        else:
            self.until_unix_s = math.inf if record.expires_unix_s is None else record.expires_unix_s


_NOBODY = _Entry(None, _Holder(""))


class Directory:
    """Tells who a request is from. One event loop's; every method is synchronous."""

    def __init__(self, pepper: bytes, *, freshness: Freshness = Freshness.STALE) -> None:
        self._digest = Digester(pepper).digest
        self._entries: dict[bytes, _Entry] = {}
        self._static: dict[bytes, KeyRecord] = {}
        self._recorded: dict[str, KeyRecord] = {}
        self._holders: dict[str, _Holder] = {}
        self._salts: dict[str, str] = {}
        self.freshness = freshness

    def __len__(self) -> int:
        """Keys known, whether they are valid or not."""
        return len(self._entries)

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]], now_unix_s: float) -> Principal:
        """Whose key the request bears; header names are in lower case.

        Raises `Unauthenticated` without a key that is valid at `now_unix_s`, and with two different ones;
        `KeysUnavailable` when that cannot be told.
        """
        given = b""
        for name, value in headers:
            if name in _CARRIERS:
                # White space around a value is not part of it (RFC 9110, 5.5), and not every server takes it away.
                key = value.strip(b" \t") if name != b"authorization" else _bearer(value)
                if key != given and key:
                    if given:
                        raise Unauthenticated(_REFUSED)
                    given = key
        if not 0 < len(given) <= MAX_KEY_BYTES:
            raise Unauthenticated(_REFUSED)
        entry = self._entries.get(self._digest(given), _NOBODY)
        holder = entry.holder
        if entry.until_unix_s <= now_unix_s or holder.merged.disabled:
            # A key of another form cannot have been made since the last reading.
            if self.freshness is not Freshness.CURRENT and well_formed(given):
                raise KeysUnavailable(_UNREADABLE, retry_after_s=1.0)
            raise Unauthenticated(_REFUSED)
        if self.freshness is Freshness.STALE:
            raise KeysUnavailable(_UNREADABLE, retry_after_s=1.0)
        principal = entry.principal
        if principal.tenant is not holder.merged:
            principal = entry.principal = Principal(principal.key, holder.merged)
        return principal

    def still_valid(self, principal: Principal, now_unix_s: float) -> bool:
        """Whether the key that was let in is valid now; asked when its request has waited."""
        if principal.key is None:
            return True
        entry = self._entries.get(principal.key.digest, _NOBODY)
        return entry.until_unix_s > now_unix_s and not entry.holder.merged.disabled

    def tenant(self, name: str) -> TenantRecord:
        """The tenant as it is now, configuration and database together; one that nobody has described has no limits."""
        holder = self._holders.get(name)
        return TenantRecord(name) if holder is None else holder.merged

    def key(self, id: str) -> KeyRecord | None:
        """The key of the database with this id."""
        return self._recorded.get(id)

    def principal(self, key_id: str, now_unix_s: float) -> Principal | None:
        """Who sends requests with the key of this id, one of the configuration or of the database. None where there is
        none that is valid at `now_unix_s`. Looks through all keys."""
        for entry in self._entries.values():
            if entry.principal.key_id == key_id:
                valid = entry.until_unix_s > now_unix_s and not entry.holder.merged.disabled
                return Principal(entry.principal.key, entry.holder.merged) if valid else None
        return None

    def as_now(self, principal: Principal) -> Principal | None:
        """Who had this key, as that one is now; None when there is no such key any more."""
        if principal.key is None:
            return principal
        entry = self._entries.get(principal.key.digest)
        if entry is None or (entry.principal.key is principal.key and entry.holder.merged is principal.tenant):
            return None if entry is None else principal
        return Principal(entry.principal.key, entry.holder.merged)

    def principals(self, tenant: str | None = None) -> list[Principal]:
        """Everybody with a key, valid or not, or those of one tenant; looks through all keys."""
        return [
            Principal(entry.principal.key, entry.holder.merged)
            for entry in self._entries.values()
            if tenant is None or entry.holder.name == tenant
        ]

    def cache_salt(self, tenant: str, own: str) -> str:
        """What an engine keeps this tenant's cache apart by, and within it by what the tenant says itself: 32 hex
        digits, the same at every gateway with this pepper, from which nobody learns the tenant's name."""
        salt = self._salts.get(tenant) if not own else None
        if salt is None:
            # No key begins with a zero byte, so that this is the digest of none.
            salt = self._digest(b"\0cache\0%b\0%b" % (tenant.encode(), own.encode()))[:16].hex()
            if not own and len(self._salts) < _MOST_SALTS:
                self._salts[tenant] = salt
        return salt

    def knows_tenant(self, name: str) -> bool:
        """Whether a key, the configuration or the database names this tenant."""
        return name in self._holders

    def mark(self, freshness: Freshness) -> None:
        """Say how far what is known can be trusted from now on."""
        self.freshness = freshness

    # -- where keys and tenants come from

    def replace_static(self, keys: Iterable[KeyRecord], tenants: Mapping[str, TenantRecord]) -> None:
        """Take the configuration's keys and tenants in place of those of the configuration before."""
        before = self._static
        self._static = {record.digest: record for record in keys}
        for name in self._holders.keys() - tenants.keys():
            self._configure(name, None)
        for name, tenant in tenants.items():
            self._configure(name, tenant)
        for gone in before.keys() - self._static.keys():
            del self._entries[gone]
        for record in self._static.values():
            self._enter(record)
        for record in self._recorded.values():  # what a removed static key, or a new one, stands over
            if record.digest in before or record.digest in self._static:
                self._enter(record)

    def apply(self, changes: Changes) -> None:
        """Take changes of the database.

        A key of the database stands before one of the configuration with the same text: it can be disabled at once.
        """
        gone, gone_tenants = set(changes.gone), set(changes.gone_tenants)
        if changes.complete:
            gone = self._recorded.keys() - {record.id for record in changes.keys}
            known = {name for name, holder in self._holders.items() if holder.recorded is not None}
            gone_tenants = known - {tenant.name for tenant in changes.tenants}
        for name in gone_tenants:
            self._record(name, None)
        for tenant in changes.tenants:
            self._record(tenant.name, tenant)
        for id in gone:
            removed = self._recorded.pop(id, None)
            if removed is not None:
                self._forget(removed)
        for record in changes.keys:
            before = self._recorded.get(record.id)
            if before is not None and before.digest != record.digest:
                self._forget(before)
            self._recorded[record.id] = record
            self._enter(record)

    def _enter(self, record: KeyRecord) -> None:
        entry = self._entries.get(record.digest)
        if entry is None or entry.principal.key != record:
            self._entries[record.digest] = _Entry(record, self._holder(record.tenant))

    def _forget(self, record: KeyRecord) -> None:
        self._entries.pop(record.digest, None)
        if record.digest in self._static:
            self._enter(self._static[record.digest])

    def _holder(self, name: str) -> _Holder:
        holder = self._holders.get(name)
        if holder is None:
            holder = self._holders[name] = _Holder(name)
        return holder

    def _configure(self, name: str, tenant: TenantRecord | None) -> None:
        holder = self._holder(name)
        holder.configured = tenant
        holder.merge()

    def _record(self, name: str, tenant: TenantRecord | None) -> None:
        holder = self._holder(name)
        holder.recorded = tenant
        holder.merge()


def _bearer(value: bytes) -> bytes:
    """The key in an `authorization` header; of another scheme, what no key can be: headers hold no NUL."""
    if value[:7] == b"Bearer ":
        return value[7:].strip()
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    return b"\0" + value if value else b""


def merged_tenant(name: str, configured: TenantRecord | None, recorded: TenantRecord | None) -> TenantRecord:
    """One tenant from what the configuration and the database say of it, field by field, the database first.

    A field that the database has at its default (a weight of 1, a limit that is not set) leaves the configuration's.
    """
    if configured is None or recorded is None:
        return configured or recorded or TenantRecord(name)
    models = configured.model_limits.keys() | recorded.model_limits.keys()
    none = LimitSet()
    return TenantRecord(
        name=name,
        weight=configured.weight if recorded.weight == 1.0 else recorded.weight,
        limits=overlaid(configured.limits, recorded.limits),
        user_limits=overlaid(configured.user_limits, recorded.user_limits),
        model_limits={
            model: overlaid(configured.model_limits.get(model, none), recorded.model_limits.get(model, none))
            for model in sorted(models)
        },
        raises=configured.raises + recorded.raises,
        disabled=configured.disabled or recorded.disabled,
        metadata={**configured.metadata, **recorded.metadata},
    )
