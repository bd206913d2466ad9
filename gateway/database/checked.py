"""What may be stored: every value is checked here, whoever brings it, and an error names the field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from gateway.config.values import ADAPTER_NAME, MODEL_NAME, NAME, PATTERN_HINTS, REGION
from gateway.database.errors import InvalidValue
from gateway.keys.format import holds_key
from gateway.keys.records import PRIORITY_CLASSES, KeyRecord, TenantRecord
from gateway.limits.sets import LimitSet, Raise

MAX_TEXT = 200
"""Characters of a key's name, an actor."""
MAX_METADATA_BYTES = 4096
"""As JSON."""
MAX_METADATA_DEPTH = 16
MAX_ENTRIES = 1000
"""Of a list of models, adapters, regions, limits by model."""
MAX_RAISES = 32
MAX_COUNT = 10**12
MAX_USD = 10.0**9
MAX_BURST_S = 3600.0
MAX_WEIGHT = 10.0**6
MAX_DEADLINE_MS = 24 * 3600 * 1000
SLACK_S = 60.0
"""How far in the past an expiry may lie that means "now", on a clock that is not quite ours."""

KEY_ID = r"^(key_[a-z2-7]{16})$"
_FIELD = re.compile(r" - at `(key in )?\$\.?(?P<path>[^`]*)`$")

Record = TypeVar("Record", KeyRecord, TenantRecord)


def key(record: KeyRecord, now_unix_s: float) -> KeyRecord:
    """The record, if it may be stored as a new key. Raises `InvalidValue`."""
    record = _typed(record, KeyRecord)
    _matches("id", record.id, KEY_ID, "use gateway.keys.format.new_id")
    if len(record.digest) != 32:
        raise InvalidValue("digest", "it must be the 32 bytes of an HMAC-SHA-256")
    _matches("tenant", record.tenant, NAME, PATTERN_HINTS[NAME])
    _matches("hint", record.hint, r"^[0-9A-Za-z]{0,4}$", "at most the key's last four characters")
    _number("created_unix_s", record.created_unix_s, 0, float(MAX_COUNT))
    changed_key(record, KeyRecord.__struct_fields__, now_unix_s)
    if record.expires_unix_s is not None and record.expires_unix_s <= now_unix_s:
        raise InvalidValue("expires_unix_s", "it must be in the future")
    return record


def changed_key(record: KeyRecord, fields: Iterable[str], now_unix_s: float) -> None:
    """Check those of a key's fields that can change, as far as they are among `fields`."""
    for field in fields:
        if (check := _KEY_CHECKS.get(field)) is not None:
            check(field, getattr(record, field))
        if field == "raises":
            raises(record.raises)
        elif field == "expires_unix_s" and record.expires_unix_s is not None:
            _number(field, record.expires_unix_s, now_unix_s - SLACK_S, float(MAX_COUNT), "it must be in the future")


def tenant(record: TenantRecord) -> TenantRecord:
    """The record, if it may be stored. Raises `InvalidValue`."""
    record = _typed(record, TenantRecord)
    _matches("name", record.name, NAME, PATTERN_HINTS[NAME])
    if not 0 < record.weight <= MAX_WEIGHT:
        raise InvalidValue("weight", f"it must be above 0 and at most {MAX_WEIGHT:g}")
    limits("limits", record.limits)
    limits("user_limits", record.user_limits)
    _each_name("model_limits", record.model_limits, MODEL_NAME)
    for model, its in record.model_limits.items():
        limits(f"model_limits.{model}", its)
    raises(record.raises)
    metadata("metadata", record.metadata)
    return record


def with_changes(record: KeyRecord, changes: Mapping[str, object]) -> KeyRecord:
    """The record with these fields, given as records hold them or as JSON does. Raises `InvalidValue`."""
    for field in changes:
        if field not in CHANGEABLE:
            known = field in KeyRecord.__struct_fields__
            raise InvalidValue(field, "it never changes: make a new key" if known else "a key has no such field")
    return _typed({**_builtins(record), **_builtins(dict(changes))}, KeyRecord)


def text(field: str, value: str, shortest: int = 0) -> None:
    """Printable, of bounded length, and with no key in it."""
    if not shortest <= len(value) <= MAX_TEXT:
        raise InvalidValue(field, f"it must have {shortest} to {MAX_TEXT} characters")
    if not value.isprintable():
        raise InvalidValue(field, "it has a line break or another character that cannot be printed")
    if holds_key(value):
        raise InvalidValue(field, "it has an API key in it: keys are never stored")


def limits(field: str, value: LimitSet) -> None:
    """Every limit that is set is above 0 and within reason."""
    if value == _NO_LIMITS:
        return
    for name in LimitSet.__struct_fields__:
        number = getattr(value, name)
        if number is None or isinstance(number, bool):
            continue
        most = MAX_BURST_S if name == "burst_s" else MAX_USD if name.startswith("usd_") else MAX_COUNT
        if not 0 < number <= most:
            raise InvalidValue(f"{field}.{name}", f"it must be above 0 and at most {most:g}")


def raises(value: tuple[Raise, ...]) -> None:
    if len(value) > MAX_RAISES:
        raise InvalidValue("raises", f"at most {MAX_RAISES} at a time")
    for position, one in enumerate(value):
        limits(f"raises[{position}].limits", one.limits)
        _number(f"raises[{position}].until_unix_s", one.until_unix_s, 0, float(MAX_COUNT))


def metadata(field: str, value: object) -> None:
    if not isinstance(value, dict):
        raise InvalidValue(field, "it must be a mapping of names to values")
    if not _flat(value, MAX_METADATA_DEPTH):
        raise InvalidValue(field, f"it is nested more than {MAX_METADATA_DEPTH} deep")
    try:
        written = msgspec.json.encode(value)
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is one of the latter
        raise InvalidValue(field, "it has something in it that JSON cannot hold") from error
    if len(written) > MAX_METADATA_BYTES:
        raise InvalidValue(field, f"it has {len(written)} bytes as JSON, at most {MAX_METADATA_BYTES} are kept")
    if holds_key(written.decode()):
        raise InvalidValue(field, "it has an API key in it: keys are never stored")


def _flat(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_flat(inner, depth - 1) for inner in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_flat(inner, depth - 1) for inner in value)
    return True


def _builtins(value: object) -> Any:
    try:
        return msgspec.to_builtins(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue("record", "it has something in it that JSON cannot hold") from error


def _typed(value: object, kind: type[Record]) -> Record:
    try:
        return msgspec.convert(_builtins(value), kind)
    except (msgspec.ValidationError, RecursionError) as error:
        problem = str(error)
        found = _FIELD.search(problem)
        field = found["path"].replace("[...]", "") if found else ""
        raise InvalidValue(field or "record", problem[: found.start()] if found else problem) from error


def _matches(field: str, value: str, pattern: str, hint: str) -> None:
    if re.fullmatch(pattern.removeprefix("^").removesuffix("$"), value) is None:
        raise InvalidValue(field, hint)


def _each_name(field: str, values: Iterable[str] | None, pattern: str) -> None:
    values = list(values or ())
    if len(values) > MAX_ENTRIES:
        raise InvalidValue(field, f"at most {MAX_ENTRIES} entries")
    for value in values:
        _matches(field, value, pattern, PATTERN_HINTS[pattern])


def _number(field: str, value: float | None, least: float, most: float, hint: str = "") -> None:
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise InvalidValue(field, hint or f"it must be from {least:g} to {most:g}")


def _class(field: str, value: str) -> None:
    if value not in PRIORITY_CLASSES:
        raise InvalidValue(field, f"it must be one of {', '.join(PRIORITY_CLASSES)}")


_NO_LIMITS = LimitSet()
_KEY_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "name": text,
    "models": lambda field, value: _each_name(field, value, MODEL_NAME),
    "adapters": lambda field, value: _each_name(field, value, ADAPTER_NAME),
    "regions": lambda field, value: _each_name(field, value, REGION),
    "priority_class": _class,
    "deadline_ms": lambda field, value: _number(field, value, 1, MAX_DEADLINE_MS),
    "max_output_tokens": lambda field, value: _number(field, value, 1, MAX_COUNT),
    "limits": limits,
    "metadata": metadata,
}
CHANGEABLE = frozenset({*_KEY_CHECKS, "raises", "disabled", "expires_unix_s", "capture_content"})
"""What `update` may change. `replaced_by` changes by a rotation; a key never goes to another tenant."""
