"""`tidegate keys` and `tidegate tenants`: an operator's orders to the database, which need no running gateway.

Gateways on the same database see a change within a second. Exit codes: 0 done; 1 not done (the database is away, or
refuses); 2 the command line, the configuration or the database's address cannot be used, or a name does not exist.
"""

from __future__ import annotations

import argparse
import getpass
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gateway.config import ConfigError, load
from gateway.database.database import Database
from gateway.database.errors import DatabaseError, DatabaseInvalid, InvalidValue
from gateway.keys.format import hidden
from gateway.keys.issuing import (
    KeySpec,
    Office,
    TenantSpec,
    UnknownName,
    key_shown,
    key_state,
    tenant_shown,
)
from gateway.keys.moments import parse_span_s, shown
from gateway.keys.notes import notes
from gateway.keys.options import NONE
from gateway.keys.pepper import PepperError, load_pepper
from gateway.keys.rules import BadValue, listed

if TYPE_CHECKING:
    from gateway.config import Settings
    from gateway.keys.records import KeyRecord, TenantRecord

DONE, FAILED, UNUSABLE = 0, 1, 2
PEPPER = "keys.pepper"
_ISSUING = ("create", "rotate")
_READING = ("list", "show")
_OPTIONS = {"limits": "--limit", "user_limits": "--user-limit", "model_limits": "--model-limit", "raises": "--until"}


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Carry out one command; returns the exit code. `environ` has settings only."""
    try:
        settings = load(options.config, environ, secrets=_needed(options))
        with _office(options, settings) as office:
            for text in notes(options, settings, office):
                _note(text)
            options.database = office.place
            run_one = _key_command if options.command == "keys" else _tenant_command
            code = run_one(office, options)
            if code == DONE and options.action not in _READING:
                print(f"written to the database {office.place}", file=sys.stderr)
            return code
    except ConfigError as error:
        return _end(options, str(error), UNUSABLE, bare=True)
    except BadValue as error:
        return _end(options, f"{_option(options, error.field)}: {str(error).partition(': ')[2]}", UNUSABLE)
    except (UnknownName, PepperError, DatabaseInvalid, InvalidValue) as error:
        return _end(options, str(error), UNUSABLE)
    except DatabaseError as error:
        return _end(options, str(error), FAILED)


@contextmanager
def _office(options: argparse.Namespace, settings: Settings) -> Iterator[Office]:
    database = Database.open(settings.database, password=settings.database_password)
    try:
        if database.made:
            _note(f"made a new database: {database.place}")
        pepper = load_pepper(settings.keys.pepper, settings.database) if PEPPER in _needed(options) else None
        if pepper is not None:
            database.confirm_pepper(pepper)
        yield Office(database, pepper)
    finally:
        database.close()


def _needed(options: argparse.Namespace) -> set[str]:
    """The secrets of the configuration that the command cannot do without."""
    issuing = options.command == "keys" and options.action in _ISSUING
    return {"database_password", PEPPER} if issuing else {"database_password"}


def _end(options: argparse.Namespace, message: str, code: int, *, bare: bool = False) -> int:
    message = hidden(message)
    if options.json:
        print(json.dumps({"error": message}))
    print(message if bare else f"tidegate {options.command} {options.action}: {message}", file=sys.stderr)
    return code


def _option(options: argparse.Namespace, field: str) -> str:
    """What the operator wrote that a field came from."""
    root, _, rest = field.partition(".")
    if root in ("id", "keys") or (root == "tenant" and options.command == "tenants"):
        return field
    if root == "expires" and options.action == "expire":
        return "--at"
    if root == "raises":
        return "--until" if rest == "until" else f"--limit {rest.partition('.')[2]}"
    flag = _OPTIONS.get(root, "--" + root.replace("_", "-"))
    return f"{flag} {rest}" if rest else flag


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a user id without a name, as in many containers
        return f"cli:{os.getuid()}"


def _note(text: str) -> None:
    print(f"note: {hidden(text)}", file=sys.stderr)


# -- keys


def _key_command(office: Office, options: argparse.Namespace) -> int:
    actor = _actor()
    match options.action:
        case "create":
            return _issued(*office.create(_key_spec(options), actor), options, "is issued")
        case "rotate":
            try:
                overlap_s = parse_span_s(options.overlap)
            except ValueError as error:
                raise BadValue("overlap", str(error)) from None
            record, key = office.rotate(options.id, overlap_s, actor)
            old = office.key(options.id)
            ends = "" if old.expires_unix_s is None else f", which ends at {shown(old.expires_unix_s)}"
            return _issued(record, key, options, f"takes the place of {options.id}{ends}")
        case "list":
            return _list_keys(office.keys(options.tenant), options.json)
        case "show":
            return _show_key(office.key(options.id), options)
        case "disable":
            record = office.update(options.id, KeySpec(disabled=True), actor)
            return _show_key(record, options, "is disabled; enable lets it in again")
        case "enable":
            return _show_key(office.update(options.id, KeySpec(disabled=False), actor), options, "is enabled")
        case "revoke":
            return _show_key(office.revoke(options.id, actor), options, "is revoked for good", state="revoked")
        case "expire":
            at = None if options.at == "never" else options.at
            record = office.update(options.id, KeySpec(expires=at), actor)
            ends = "has no end" if record.expires_unix_s is None else f"ends at {shown(record.expires_unix_s)}"
            return _show_key(record, options, ends)
        case "raise":
            raises = office.raised(office.key(options.id).raises, _values("limits", options.limits), options.until)
            record = office.update(options.id, KeySpec(raises=raises), actor)
            return _show_key(record, options, f"has other limits until {shown(record.raises[-1].until_unix_s)}")
        case _:
            spec = _key_spec(options)
            if spec == KeySpec():
                return _end(options, f"nothing was given to change of {options.id}; --help lists the options", UNUSABLE)
            return _show_key(office.update(options.id, spec, actor), options, "is changed")


def _issued(record: KeyRecord, key: str, options: argparse.Namespace, what: str) -> int:
    """The one place where a key is printed: alone on standard output, so that it can be piped to where it belongs."""
    if options.json:
        print(json.dumps({"key": key, **key_shown(record, time.time()), "database": options.database}))
    else:
        print(f"{record.id} of tenant {record.tenant} {what}.", file=sys.stderr)
        print("This is the key. It is not shown again, and nobody can look it up:", file=sys.stderr)
        sys.stderr.flush()
        print(key)
    return DONE


def _key_spec(options: argparse.Namespace) -> KeySpec:
    spec = KeySpec()
    if options.action == "create":
        spec.tenant = options.tenant
    for field in ("name", "priority_class", "deadline_ms", "max_output_tokens"):
        if (value := getattr(options, field)) is not None:
            taken_away = value == NONE and field in ("deadline_ms", "max_output_tokens")
            setattr(spec, field, None if taken_away else value)
    if options.capture_content is not None:
        spec.capture_content = options.capture_content
    for field in ("models", "adapters", "regions"):
        if getattr(options, field) is not None:
            setattr(spec, field, listed(field, getattr(options, field)))
    if options.expires is not None:
        spec.expires = None if options.expires == "never" else options.expires
    if options.limits is not None:
        spec.limits = _values("limits", options.limits)
    if options.metadata is not None:
        spec.metadata = dict(_pair("metadata", each, "NAME=TEXT") for each in options.metadata)
    return spec


def _pair(field: str, text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise BadValue(field, f"{text[:80]!r} has no name and value", f"write {form}")
    return name, value


def _values(field: str, texts: Sequence[str]) -> dict[str, Any]:
    """`LIMIT=VALUE` each, with the values that YAML would see in them."""
    return {name: _value(text) for name, text in (_pair(field, each, "LIMIT=VALUE") for each in texts)}


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _list_keys(records: Sequence[KeyRecord], as_json: bool) -> int:
    now = time.time()
    if as_json:
        print(json.dumps({"data": [key_shown(record, now) for record in records]}))
        return DONE
    rows = [("ID", "TENANT", "NAME", "ENDS IN", "STATE", "CLASS", "MODELS", "EXPIRES")]
    rows += [
        (
            record.id,
            record.tenant,
            record.name or "-",
            record.hint,
            key_state(record, now),
            record.priority_class,
            "*" if record.models is None else ",".join(record.models) or "-",
            "never" if record.expires_unix_s is None else shown(math.floor(record.expires_unix_s)),
        )
        for record in records
    ]
    _print_table(rows)
    return DONE


def _show_key(record: KeyRecord, options: argparse.Namespace, what: str | None = None, state: str | None = None) -> int:
    content = key_shown(record, time.time())
    if state is not None:
        content["state"] = state
    return _show(content, options, None if what is None else f"{record.id} {what}")


def _show(content: dict[str, Any], options: argparse.Namespace, sentence: str | None) -> int:
    if options.json:
        written = {} if sentence is None else {"database": options.database}
        print(json.dumps({**content, **written}))
    elif sentence is not None:
        print(sentence)
    else:
        width = max(map(len, content))
        for name, value in content.items():
            text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
            print(f"{name.ljust(width)}  {text}")
    return DONE


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# -- tenants


def _tenant_command(office: Office, options: argparse.Namespace) -> int:
    actor = _actor()
    match options.action:
        case "list":
            return _list_tenants(office.tenants(), options.json)
        case "show":
            return _show(tenant_shown(office.tenant(options.tenant)), options, None)
        case "raise":
            raises = office.raised(
                office.tenant_or_new(options.tenant).raises, _values("limits", options.limits), options.until
            )
            record = office.put_tenant(options.tenant, TenantSpec(raises=raises), actor)
            until = shown(record.raises[-1].until_unix_s)
            return _show(tenant_shown(record), options, f"{record.name} has other limits until {until}")
        case _:
            record = office.put_tenant(options.tenant, _tenant_spec(options), actor)
            return _show(tenant_shown(record), options, f"{record.name} is set")


def _tenant_spec(options: argparse.Namespace) -> TenantSpec:
    spec = TenantSpec()
    if options.weight is not None:
        spec.weight = options.weight
    for field in ("limits", "user_limits"):
        if getattr(options, field) is not None:
            setattr(spec, field, _values(field, getattr(options, field)))
    if options.model_limits is not None:
        by_model: dict[str, dict[str, Any] | None] = {}
        for each in options.model_limits:
            place, _ = _pair("model_limits", each, "MODEL:LIMIT=VALUE")
            model, colon, _ = place.rpartition(":")  # a model's name may have colons, a limit's has none
            if not (model and colon):
                raise BadValue("model_limits", f"{each[:80]!r} names no model", "write MODEL:LIMIT=VALUE")
            limits = by_model.setdefault(model, {})
            assert limits is not None
            limits.update(_values("model_limits", [each[len(model) + 1 :]]))
        spec.model_limits = by_model
    if options.metadata is not None:
        spec.metadata = dict(_pair("metadata", each, "NAME=TEXT") for each in options.metadata)
    if options.disabled is not None:
        spec.disabled = options.disabled
    return spec


def _list_tenants(records: Sequence[TenantRecord], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"data": [tenant_shown(record) for record in records]}))
        return DONE
    rows = [("TENANT", "STATE", "WEIGHT", "LIMITS")]
    for record in records:
        limits = tenant_shown(record)["limits"]
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in limits.items())
        rows.append((record.name, "disabled" if record.disabled else "enabled", f"{record.weight:g}", text or "-"))
    _print_table(rows)
    return DONE
