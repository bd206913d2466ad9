"""Checks of fallbacks and hedging that need more than one setting.

Like `checks`, they read the raw configuration, and pass over what the schema has reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.config.problems import Finding, Path, did_you_mean, shown


def check_fallbacks(data: dict[str, Any], name: str, model: dict[str, Any]) -> Iterator[Finding]:
    """Everything wrong about one model's list. A circle (a falls back to b, and b to a) is no mistake: only the list
    of the model that was asked for is gone through."""
    before: dict[tuple[str, str], int] = {}
    for index, raw in enumerate(model["fallbacks"]):
        path: Path = ("models", name, "fallbacks", index)
        entry = {"model": raw} if isinstance(raw, str) else raw
        if not isinstance(entry, dict):
            continue
        other, backend = entry.get("model"), entry.get("backend")
        if (other is None) == (backend is None):
            yield Finding(
                path,
                "must name either another model or another backend for the same one",
                "write e.g. chat-small, or {backend: rented}",
            )
            continue
        wrong = list(
            _model(data, name, other, entry, path) if other is not None else _backend(data, model, entry, path)
        )
        yield from wrong
        # The same host may have the model under two names, of two sizes say.
        kind = ("model", str(other)) if backend is None else (str(backend), str(entry.get("upstream_model") or ""))
        if not wrong and before.setdefault(kind, index) != index:
            yield Finding(path, f"is the same as fallbacks[{before[kind]}]", "each is asked once; take one of them out")


def _model(data: dict[str, Any], name: str, other: Any, entry: dict[str, Any], path: Path) -> Iterator[Finding]:
    models = _mapping(data, "models")
    for field in ("upstream_model", "price"):
        if entry.get(field) is not None:
            hint = f"take it out; models.{shown(other)[1:-1]} has its own" if isinstance(other, str) else "take it out"
            yield Finding((*path, field), "belongs to an entry with a backend", hint)
    if not isinstance(other, str):
        return
    if other == name:
        yield Finding(path, "is the model itself", "name another model, or {backend: ...} for the same one elsewhere")
    elif other not in models:
        meant = next((each for each, model in models.items() if other in _aliases(model)), None)
        hint = did_you_mean(other, models) or "add it under models"
        if meant is not None:
            hint = f"it is an alias; write {meant}"
        yield Finding(path, f"{shown(other)} is not the name of a model", hint)


def _aliases(model: Any) -> tuple[Any, ...]:
    aliases = model.get("aliases") if isinstance(model, dict) else None
    return tuple(aliases) if isinstance(aliases, (list, tuple)) else ()


def _backend(data: dict[str, Any], model: dict[str, Any], entry: dict[str, Any], path: Path) -> Iterator[Finding]:
    wanted, backends = entry["backend"], _mapping(data, "backends")
    if not isinstance(wanted, str) or not wanted:
        return
    if wanted not in backends:
        hint = did_you_mean(wanted, backends) or "add it under backends"
        yield Finding((*path, "backend"), f"{shown(wanted)} is not the name of a backend", hint)
    elif wanted == model.get("backend") and entry.get("upstream_model") in (None, model.get("upstream_model")):
        yield Finding((*path, "backend"), f"{shown(wanted)} is the model's own backend", "name another one")


def check_hedge(data: dict[str, Any], name: str, model: dict[str, Any]) -> Iterator[Finding]:
    """A request that is sent twice to a hosted API is paid for twice."""
    backend = _mapping(data, "backends").get(str(model.get("backend")))
    if isinstance(backend, dict) and _all_hosted(backend):
        yield Finding(
            ("models", name, "hedge"),
            f"the replicas of {shown(model['backend'])} are hosted ones, and an answer that is asked for twice is paid "
            "for twice",
            "take it out",
        )


def check_continuation(data: dict[str, Any], name: str, model: dict[str, Any]) -> Iterator[Finding]:
    """No hosted API goes on with a text that another one has begun."""
    backend = _mapping(data, "backends").get(str(model.get("backend")))
    if isinstance(backend, dict) and _all_hosted(backend):
        yield Finding(
            ("models", name, "continuation"),
            f"the replicas of {shown(model['backend'])} are hosted ones, which cannot go on with another's answer",
            "take it out",
        )


def _all_hosted(backend: dict[str, Any]) -> bool:
    """Whether every replica is rented. Where that cannot be told, something else is wrong, and this is False."""
    from backends.dialects import DIALECTS

    said = backend.get("hosted")
    if isinstance(said, bool):
        return said
    replicas = backend.get("replicas")
    engines = [
        (each.get("engine") if isinstance(each, dict) else None) or backend.get("engine")
        for each in (replicas if isinstance(replicas, (list, tuple)) else ())
    ]
    return bool(engines) and all(
        isinstance(engine, str) and engine in DIALECTS and DIALECTS[engine].hosted for engine in engines
    )


def _mapping(data: Any, key: str) -> dict[str, Any]:
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}
