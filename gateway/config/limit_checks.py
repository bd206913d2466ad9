"""Checks of keys, tenants, limits and queues that need more than one setting.

Like `checks`, they read the raw configuration, and pass over what the schema has reported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import orjson
from pydantic import SecretStr

from gateway.config.checks import MIN_TOKEN_BYTES
from gateway.config.limits import DEFAULT_TENANT, MAX_KEY_BYTES, MIN_PEPPER_BYTES, LimitBlock, Shares
from gateway.config.problems import Finding, Path, did_you_mean, shown
from gateway.config.schema import Settings

_NEW_KEY = "make one with: openssl rand -hex 32"


def check_limits(data: dict[str, Any]) -> Iterator[Finding]:
    """Everything wrong between the settings of keys, tenants, limits and queues."""
    yield from _static_keys(data)
    yield from _pepper(data)
    yield from _tenants(data)
    yield from _budgets(data)
    yield from _shares(data)
    yield from _tokenizers(data)


def needs_shared_store(settings: Settings) -> str | None:
    """The setting for which several workers or nodes need a Redis, as it stands in the file; None if they need none.

    None as well when there is one. With `store: memory` each worker would count for itself, and let through as many
    times too much as there are workers.
    """
    if settings.store != "memory":
        return None
    if settings.auth == "keys":
        return "auth: keys"
    for place, block in _limit_blocks(settings).items():
        if block != LimitBlock():
            return place
    for name, backend in settings.backends.items():
        if backend.queue.enabled:
            return f"backends.{name}.queue.enabled: true"
    return None


def missing_folder(settings: Settings) -> FilePath | None:
    """The directory that the SQLite file of `database` would need, if the gateway needs the file; None if all is well.

    Paths are relative to the working directory of the process.
    """
    file = settings.database.removeprefix("sqlite:///")
    folder = FilePath(file).parent.absolute()
    if file == settings.database or folder.is_dir():
        return None
    blocks = _limit_blocks(settings).values()
    money = any(block.usd_per_day is not None or block.usd_per_month is not None for block in blocks)
    return folder if money or settings.auth == "keys" else None


def _limit_blocks(settings: Settings) -> dict[str, LimitBlock]:
    """All of them, by where they stand in the file; but those of static keys."""
    blocks: dict[str, LimitBlock] = {
        "limits.key": settings.limits.key,
        "limits.tenant": settings.limits.tenant,
        "limits.user": settings.limits.user,
    }
    for name, tenant in settings.tenants.items():
        blocks[f"tenants.{name}.limits"] = tenant.limits
        blocks[f"tenants.{name}.user_limits"] = tenant.user_limits
        blocks |= {f"tenants.{name}.model_limits.{model}": block for model, block in tenant.model_limits.items()}
    for name, chosen in settings.models.items():
        blocks[f"models.{name}.limits"] = chosen.limits
        blocks[f"models.{name}.tenant_limits"] = chosen.tenant_limits
    return blocks


def _mapping(data: Any, *path: str) -> dict[str, Any]:
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _static(data: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    entries = _mapping(data, "keys").get("static")
    for index, entry in enumerate(entries if isinstance(entries, (list, tuple)) else ()):
        if isinstance(entry, dict):
            yield ("keys", "static", index), entry


def _static_keys(data: dict[str, Any]) -> Iterator[Finding]:
    """A key opens one door, and has one name."""
    tenants = {DEFAULT_TENANT, *_mapping(data, "tenants")}
    names: dict[str, int] = {}
    token = _mapping(data, "admin").get("token")
    secrets: dict[str, str] = {token.get_secret_value(): "admin.token"} if isinstance(token, SecretStr) else {}
    for path, entry in _static(data):
        index = int(path[-1])
        name, key, tenant = entry.get("name"), entry.get("key"), entry.get("tenant", DEFAULT_TENANT)
        if isinstance(name, str) and names.setdefault(name, index) != index:
            yield Finding((*path, "name"), f"{shown(name)} is already the name of static[{names[name]}]", "change one")
        if isinstance(key, SecretStr) and key.get_secret_value():
            value, place = key.get_secret_value(), f"keys.static[{index}].key"
            if len(value.encode()) < MIN_TOKEN_BYTES:
                yield Finding((*path, "key"), f"the key is shorter than {MIN_TOKEN_BYTES} bytes (128 bits)", _NEW_KEY)
            elif len(value.encode()) > MAX_KEY_BYTES:
                yield Finding((*path, "key"), f"the key is longer than {MAX_KEY_BYTES} bytes", _NEW_KEY)
            elif secrets.setdefault(value, place) != place:
                yield Finding((*path, "key"), f"the key is the same as {secrets[value]}", _NEW_KEY)
        if isinstance(tenant, str) and tenant not in tenants:
            close = did_you_mean(tenant, tenants)
            hint = close if close.startswith("did you mean") else f"add it under tenants, as {shown(tenant)}: {{}}"
            yield Finding((*path, "tenant"), f"{shown(tenant)} is not the name of a tenant", hint)
        yield from _models_exist(data, entry.get("models"), (*path, "models"))
    if names and data.get("auth", "insecure") == "insecure":
        yield Finding(("keys", "static"), "auth is insecure, so that nobody is asked for a key", "write auth: keys")


def _models_exist(data: dict[str, Any], names: Any, path: Path) -> Iterator[Finding]:
    models = _mapping(data, "models")
    for index, name in enumerate(names if isinstance(names, (list, tuple)) else ()):
        if isinstance(name, str) and name not in models:
            yield Finding((*path, index), f"{shown(name)} is not the name of a model", _model_hint(models, name))


def _model_hint(models: dict[str, Any], name: str) -> str:
    for model in models:
        aliases = _mapping(models, model).get("aliases")
        if isinstance(aliases, (list, tuple)) and name in aliases:
            return f"it is an alias; write {model}"
    return did_you_mean(name, models) or "add it under models"


def _pepper(data: dict[str, Any]) -> Iterator[Finding]:
    pepper = _mapping(data, "keys").get("pepper")
    if isinstance(pepper, SecretStr):
        if 0 < len(pepper.get_secret_value().encode()) < MIN_PEPPER_BYTES:
            message = f"the pepper is shorter than {MIN_PEPPER_BYTES} bytes (128 bits as hexadecimal digits)"
            yield Finding(("keys", "pepper"), message, _NEW_KEY)
    elif pepper is None and data.get("auth") == "keys" and str(data.get("database")).startswith("postgresql:"):
        yield Finding(
            ("database",),
            "every gateway that uses one PostgreSQL needs the same keys.pepper, which is not set",
            f"{_NEW_KEY}, and write e.g. keys: {{pepper: {{env: KEY_PEPPER}}}}",
        )


def _tenants(data: dict[str, Any]) -> Iterator[Finding]:
    models = _mapping(data, "models")
    for tenant in _mapping(data, "tenants"):
        for name in _mapping(data, "tenants", tenant, "model_limits"):
            if name not in models:
                path: Path = ("tenants", tenant, "model_limits", name)
                yield Finding(path, f"{shown(name)} is not the name of a model", _model_hint(models, name))


def _budgets(data: dict[str, Any]) -> Iterator[Finding]:
    """Money can only run out where every token has a price."""
    models = _mapping(data, "models")
    for path, limits, reach in _blocks(data):
        free = [name for name in reach if name in models and _mapping(models, name).get("price") is None]
        for budget in ("usd_per_day", "usd_per_month"):
            if _mapping(limits).get(budget) is not None and free:
                named = ", ".join(shown(name) for name in free[:5]) + (", ..." if len(free) > 5 else "")
                hint = "give each a price (zeros for your own hardware)"
                yield Finding((*path, budget), f"nothing is known of the price of {named}", hint)


def _blocks(data: dict[str, Any]) -> Iterator[tuple[Path, Any, tuple[str, ...]]]:
    """Every block of limits: where it stands, what it says, and the models whose use counts for it."""
    models = _mapping(data, "models")
    everything = tuple(models)
    for holder in ("key", "tenant", "user"):
        yield ("limits", holder), _mapping(data, "limits").get(holder), everything
    for tenant, entry in _mapping(data, "tenants").items():
        for block in ("limits", "user_limits"):
            yield ("tenants", tenant, block), _mapping(entry).get(block), everything
        for model, limits in _mapping(entry, "model_limits").items():
            yield ("tenants", tenant, "model_limits", model), limits, (model,)
    for path, entry in _static(data):
        named = entry.get("models")
        reach = tuple(str(name) for name in named) if isinstance(named, (list, tuple)) else everything
        yield (*path, "limits"), entry.get("limits"), reach
    for model, entry in models.items():
        for block in ("limits", "tenant_limits"):
            yield ("models", model, block), _mapping(entry).get(block), (model,)


def _shares(data: dict[str, Any]) -> Iterator[Finding]:
    for pool in _mapping(data, "backends"):
        given = _mapping(data, "backends", pool, "queue", "shares")
        shares = {name: given.get(name, field.default) for name, field in Shares.model_fields.items()}
        if all(type(share) is int for share in shares.values()) and sum(shares.values()) > 100:
            message = f"together they guarantee {sum(shares.values())} percent"
            yield Finding(("backends", pool, "queue", "shares"), message, "lower some: 100 is all there is")


def _tokenizers(data: dict[str, Any]) -> Iterator[Finding]:
    for model, entry in _mapping(data, "models").items():
        name = _mapping(entry).get("tokenizer")
        if isinstance(name, str) and name.strip():
            problem = tokenizer_problem(name)
            if problem:
                yield Finding(("models", model, "tokenizer"), *problem)


def tokenizer_problem(name: str) -> tuple[str, str] | None:
    """Why prompts cannot be counted with this file, and what to do about it; None if they can.

    The library itself is not loaded: that takes memory, and is the workers' business.
    """
    if importlib.util.find_spec("tokenizers") is None:
        return "the library tokenizers is not installed", "install tidegate[tokenizer], or leave the setting out"
    try:
        tree = orjson.loads(FilePath(name).read_bytes())
    except (OSError, ValueError) as error:
        if isinstance(error, orjson.JSONDecodeError):
            return f"{shown(name)} is not JSON", "name the model's tokenizer.json"
        reason = error.strerror if isinstance(error, OSError) else "not a usable path"
        return f"{shown(name)} cannot be read: {reason}", "check the path and its permissions"
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        return f"{shown(name)} is not a tokenizer", "name the model's tokenizer.json"
    return None
