"""What operators order about keys and tenants: the one set of rules behind `tidegate keys` and the admin API.

Synchronous, on the database: callers in an event loop go through `asyncio.to_thread`. A key's text is in the answer to
`create` and `rotate`, and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from gateway.config.problems import did_you_mean
from gateway.config.values import ADAPTER_NAME, MODEL_NAME, NAME, REGION
from gateway.database.errors import Conflict, NotFound
from gateway.keys import format as key_format
from gateway.keys.moments import parse_moment, shown
from gateway.keys.records import PRIORITY_CLASSES, KeyRecord, TenantRecord
from gateway.keys.rules import BadValue, checked_limits, checked_metadata, checked_name, checked_names, checked_whole
from gateway.limits.sets import LimitSet, Raise

if TYPE_CHECKING:  # it brings in SQLAlchemy, which a gateway without keys does not need
    from gateway.database.database import Database

MAX_DEADLINE_MS = 86_400_000
MAX_OUTPUT_TOKENS = 10_000_000
MAX_RAISES = 32
DEFAULT_OVERLAP_S = 86_400.0


class UnknownName(Exception):
    """There is no such key or tenant."""


class RaiseSpec(msgspec.Struct, forbid_unknown_fields=True):
    """A temporary change as it is ordered."""

    limits: dict[str, Any]
    until: str


class KeySpec(msgspec.Struct, forbid_unknown_fields=True, rename={"priority_class": "class"}):
    """Fields of a key that may be ordered. Unset: as it is, or the default; null: the default."""

    tenant: str | UnsetType = UNSET
    name: str | UnsetType | None = UNSET
    models: list[str] | UnsetType | None = UNSET
    adapters: list[str] | UnsetType | None = UNSET
    regions: list[str] | UnsetType | None = UNSET
    priority_class: str | UnsetType | None = UNSET
    deadline_ms: int | UnsetType | None = UNSET
    max_output_tokens: int | UnsetType | None = UNSET
    limits: dict[str, Any] | UnsetType | None = UNSET
    """These over what there is, field by field; a field of null is taken away. Null: no limits."""
    raises: list[RaiseSpec] | UnsetType | None = UNSET
    disabled: bool | UnsetType = UNSET
    expires: str | UnsetType | None = UNSET
    metadata: dict[str, Any] | UnsetType | None = UNSET
    capture_content: bool | UnsetType = UNSET


class TenantSpec(msgspec.Struct, forbid_unknown_fields=True):
    """Fields of a tenant that may be ordered, with the same meaning of unset and null."""

    weight: float | UnsetType | None = UNSET
    limits: dict[str, Any] | UnsetType | None = UNSET
    user_limits: dict[str, Any] | UnsetType | None = UNSET
    model_limits: dict[str, dict[str, Any] | None] | UnsetType | None = UNSET
    raises: list[RaiseSpec] | UnsetType | None = UNSET
    disabled: bool | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType | None = UNSET


class Office:
    """Issues and changes keys and tenants. Raises `BadValue`, `UnknownName` and what the database raises."""

    def __init__(self, database: Database, pepper: bytes | None, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._pepper = pepper
        self._now = now

    @property
    def place(self) -> str:
        """Where the database is, for operators."""
        return self._database.place

    # -- keys

    def create(self, spec: KeySpec, actor: str) -> tuple[KeyRecord, str]:
        """A new key's record, and the key. Its tenant is put on record if it is not."""
        if spec.tenant is UNSET:
            raise BadValue("tenant", "is missing", "a key belongs to a tenant; any name will do")
        now = self._now()
        tenant = checked_name("tenant", spec.tenant, NAME)
        changes = self._key_changes(spec, LimitSet(), now)
        record, key = self._minted({**changes, "tenant": tenant}, now)
        self._put_tenant_if_new(record.tenant, actor)
        self._database.keys.create(record, actor)
        return record, key

    def key(self, id: str) -> KeyRecord:
        """Raises `UnknownName`."""
        try:
            return self._database.keys.get(id)
        except NotFound:
            raise UnknownName(_no_key(id)) from None

    def keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """All of them, or one tenant's, in the order of their ids."""
        return sorted(self._database.keys.list(tenant), key=lambda record: record.id)

    def update(self, id: str, spec: KeySpec, actor: str, if_version: int | None = None) -> KeyRecord:
        """The key with what is set in the order. Raises `VersionConflict`, as everything with `if_version` does, when
        its last change had another."""
        before = self.key(id)
        if spec.tenant is not UNSET and spec.tenant != before.tenant:
            raise BadValue("tenant", "never changes", "create a key for the other tenant, and revoke this one")
        changes = self._key_changes(spec, before.limits, self._now())
        return self._database.keys.update(id, changes, actor, if_version) if changes else before

    def rotate(self, id: str, overlap_s: float, actor: str, if_version: int | None = None) -> tuple[KeyRecord, str]:
        """A new key with the same rights; the old one ends after the overlap, or when it would have ended anyway.

        The new one can be rotated in its turn. Raises `Conflict` for a key that is replaced already, or not valid.
        """
        before = self.key(id)
        now = self._now()
        if before.replaced_by is not None:
            raise Conflict(f"the key {id} was replaced by {before.replaced_by}: rotate that one")
        if (state := key_state(before, now)) != "valid":
            raise Conflict(f"the key {id} is {state}, and so would be one in its place: create a new one")
        record, key = self._minted(msgspec.structs.asdict(before), now)
        self._database.keys.rotate(id, record, now + overlap_s, actor, if_version)
        return record, key

    def revoke(self, id: str, actor: str, if_version: int | None = None) -> KeyRecord:
        """Take the key off the record, for good; the record as it was."""
        before = self.key(id)
        try:
            self._database.keys.remove(id, actor, if_version)
        except NotFound:  # somebody else was quicker
            raise UnknownName(_no_key(id)) from None
        return before

    def _minted(self, fields: dict[str, Any], now: float) -> tuple[KeyRecord, str]:
        if self._pepper is None:
            raise BadValue("keys.pepper", "is not known here", "set it, or run the command where the gateway runs")
        key = key_format.mint()
        own = {
            "id": key_format.new_id(),
            "digest": key_format.digest(self._pepper, key.encode()),
            "hint": key_format.hint(key),
            "created_unix_s": now,
            "replaced_by": None,
        }
        return KeyRecord(**{**fields, **own}), key

    def _key_changes(self, spec: KeySpec, limits: LimitSet, now: float) -> dict[str, Any]:
        """Fields of the record that the order sets, over these limits. Raises `BadValue`."""
        changes: dict[str, Any] = {}
        if spec.name is not UNSET:
            name = spec.name or ""
            if len(name) > 200 or not name.isprintable():
                raise BadValue("name", "is too long or not printable", "write at most 200 printable characters")
            if key_format.holds_key(name):
                raise BadValue("name", "has an API key in it", "names are shown; leave it out")
            changes["name"] = name
        for field, pattern in (("models", MODEL_NAME), ("adapters", ADAPTER_NAME), ("regions", REGION)):
            values = getattr(spec, field)
            if values is not UNSET:
                none = () if field == "regions" else None
                changes[field] = none if values is None else checked_names(field, values, pattern)
        if spec.priority_class is not UNSET:
            changes["priority_class"] = _checked_class(spec.priority_class or "standard")
        for field, most in (("deadline_ms", MAX_DEADLINE_MS), ("max_output_tokens", MAX_OUTPUT_TOKENS)):
            value = getattr(spec, field)
            if value is not UNSET:
                changes[field] = None if value is None else checked_whole(field, value, most)
        if spec.limits is not UNSET:
            changes["limits"] = checked_limits("limits", spec.limits, limits)
        if spec.raises is not UNSET:
            changes["raises"] = _raises(spec.raises, now)
        if spec.disabled is not UNSET:
            changes["disabled"] = spec.disabled
        if spec.capture_content is not UNSET:
            changes["capture_content"] = spec.capture_content
        if spec.expires is not UNSET:
            changes["expires_unix_s"] = _end(spec.expires, now)
        if spec.metadata is not UNSET:
            changes["metadata"] = checked_metadata("metadata", spec.metadata)
        return changes

    # -- tenants

    def tenant(self, name: str) -> TenantRecord:
        """Raises `UnknownName`."""
        try:
            return self._database.tenants.get(name)
        except NotFound:
            said = (
                f"there is no tenant {key_format.hidden(name)[:80]!r} in the database; tidegate tenants list shows all"
            )
            raise UnknownName(said) from None

    def tenants(self) -> list[TenantRecord]:
        return sorted(self._database.tenants.list(), key=lambda record: record.name)

    def put_tenant(self, name: str, spec: TenantSpec, actor: str, if_version: int | None = None) -> TenantRecord:
        """The tenant with what is set in the order; made if there is none."""
        before = self.tenant_or_new(name)
        changes: dict[str, Any] = {}
        if spec.weight is not UNSET:
            weight = 1.0 if spec.weight is None else spec.weight
            if not (math.isfinite(weight) and 0.01 <= weight <= 1000):
                raise BadValue("weight", "is not a number from 0.01 to 1000", "1 is a tenant like any other")
            changes["weight"] = float(weight)
        for field in ("limits", "user_limits"):
            values = getattr(spec, field)
            if values is not UNSET:
                changes[field] = checked_limits(field, values, getattr(before, field))
        if spec.model_limits is not UNSET:
            changes["model_limits"] = _model_limits(spec.model_limits, before.model_limits)
        if spec.raises is not UNSET:
            changes["raises"] = _raises(spec.raises, self._now())
        if spec.disabled is not UNSET:
            changes["disabled"] = spec.disabled
        if spec.metadata is not UNSET:
            changes["metadata"] = checked_metadata("metadata", spec.metadata)
        return self._database.tenants.put(msgspec.structs.replace(before, **changes), actor, if_version)

    def remove_tenant(self, name: str, actor: str, if_version: int | None = None) -> TenantRecord:
        """Take a tenant off the record; the record as it was. Raises `Conflict` while it has keys."""
        before = self.tenant(name)
        try:
            self._database.tenants.remove(name, actor, if_version)
        except NotFound:  # somebody else was quicker
            raise UnknownName(f"there is no tenant {name!r} in the database") from None
        return before

    def tenant_or_new(self, name: str) -> TenantRecord:
        """What is on record, or a tenant of which nothing is."""
        try:
            return self.tenant(checked_name("tenant", name, NAME))
        except UnknownName:
            return TenantRecord(name)

    def _put_tenant_if_new(self, name: str, actor: str) -> None:
        try:
            self.tenant(name)
        except UnknownName:
            self._database.tenants.put(TenantRecord(name), actor)

    def raised(self, before: tuple[Raise, ...], limits: dict[str, Any], until: str) -> list[RaiseSpec]:
        """The raises of a holder with one more, and without those that are over."""
        now = self._now()
        current = [
            RaiseSpec(msgspec.to_builtins(each.limits), shown(each.until_unix_s))
            for each in before
            if each.until_unix_s > now
        ]
        return [*current, RaiseSpec(limits, until)]


def _checked_class(text: str) -> str:
    if text not in PRIORITY_CLASSES:
        hint = did_you_mean(text, PRIORITY_CLASSES)
        raise BadValue("class", f"{text[:80]!r} is not a class", hint if "?" in hint else _classes())
    return text


def _classes() -> str:
    return "write one of " + ", ".join(PRIORITY_CLASSES)


def _moment(field: str, text: str, now: float) -> float:
    try:
        return parse_moment(text, now)
    except ValueError as error:
        said, _, hint = str(error).partition(": ")
        raise BadValue(field, said, hint) from None


def _end(text: str | None, now: float) -> float | None:
    if text is None:
        return None
    end = _moment("expires", text, now)
    if end < now:
        raise BadValue("expires", f"{shown(end)} has passed", "write a time to come, or now to end a key at once")
    return end


def _no_key(id: str) -> str:
    if key_format.hidden(id) != id:
        return "there is no key of that id, which looks like a key: ids begin with key_; tidegate keys list shows all"
    return f"there is no key {id[:80]!r}; it may have been revoked. tidegate keys list shows all"


def _raises(specs: list[RaiseSpec] | None, now: float) -> tuple[Raise, ...]:
    if specs is not None and len(specs) > MAX_RAISES:
        raise BadValue("raises", f"are more than {MAX_RAISES}", "take those away that are over")
    return tuple(
        Raise(checked_limits("raises.limits", each.limits, LimitSet()), _moment("raises.until", each.until, now))
        for each in specs or ()
    )


def _model_limits(given: dict[str, dict[str, Any] | None] | None, before: dict[str, LimitSet]) -> dict[str, LimitSet]:
    if given is None:
        return {}
    merged = dict(before)
    for model, values in given.items():
        checked_name("model_limits", model, MODEL_NAME)
        if values is None:
            merged.pop(model, None)
        else:
            merged[model] = checked_limits(f"model_limits.{model}", values, before.get(model, LimitSet()))
    return merged


# -- how records are shown


def key_state(record: KeyRecord, now_unix_s: float) -> str:
    """`valid`, `disabled` or `expired`, of the key alone: its tenant may be disabled."""
    if record.expires_unix_s is not None and record.expires_unix_s <= now_unix_s:
        return "expired"
    return "disabled" if record.disabled else "valid"


def key_shown(record: KeyRecord, now_unix_s: float) -> dict[str, Any]:
    """A key as JSON, without its digest. What can be ordered has the names and forms of `KeySpec`."""
    return {
        "id": record.id,
        "tenant": record.tenant,
        "name": record.name,
        "hint": record.hint,
        "state": key_state(record, now_unix_s),
        "models": record.models,
        "adapters": record.adapters,
        "regions": record.regions,
        "class": record.priority_class,
        "deadline_ms": record.deadline_ms,
        "max_output_tokens": record.max_output_tokens,
        "limits": msgspec.to_builtins(record.limits),
        "raises": _raises_shown(record.raises),
        "disabled": record.disabled,
        "created": shown(record.created_unix_s),
        "expires": None if record.expires_unix_s is None else shown(record.expires_unix_s),
        "replaced_by": record.replaced_by,
        "metadata": record.metadata,
        "capture_content": record.capture_content,
    }


def tenant_shown(record: TenantRecord) -> dict[str, Any]:
    """A tenant as JSON: what the database has of it."""
    return {
        "name": record.name,
        "weight": record.weight,
        "limits": msgspec.to_builtins(record.limits),
        "user_limits": msgspec.to_builtins(record.user_limits),
        "model_limits": msgspec.to_builtins(record.model_limits),
        "raises": _raises_shown(record.raises),
        "disabled": record.disabled,
        "metadata": record.metadata,
    }


def _raises_shown(raises: tuple[Raise, ...]) -> list[dict[str, Any]]:
    return [{"limits": msgspec.to_builtins(each.limits), "until": shown(each.until_unix_s)} for each in raises]
