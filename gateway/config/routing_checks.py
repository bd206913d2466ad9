"""Checks of policies and spills that need more than one setting, or code.

Like `checks`, they read the raw configuration, and pass over what the schema has reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path as FilePath
from random import Random
from typing import Any

from gateway.config.fallback_checks import check_continuation, check_fallbacks, check_hedge
from gateway.config.problems import Finding, Path, did_you_mean, shown


def check_routing(data: dict[str, Any]) -> Iterator[Finding]:
    """Everything wrong about how models choose replicas, and where they spill."""
    for name, model in _mapping(data, "models").items():
        if not isinstance(model, dict):
            continue
        policy = model.get("policy")
        if isinstance(policy, str) and policy:
            yield from _policy(policy, ("models", name, "policy"))
        shadow = model.get("shadow")
        if isinstance(shadow, dict) and isinstance(shadow.get("policy"), str) and shadow["policy"]:
            yield from _policy(shadow["policy"], ("models", name, "shadow", "policy"))
        template = model.get("chat_template")
        if isinstance(template, str) and template.strip():
            yield from _template(template, ("models", name, "chat_template"))
        if isinstance(model.get("spill"), dict):
            yield from _spill(data, model, ("models", name, "spill"))
        if isinstance(model.get("fallbacks"), (list, tuple)):
            yield from check_fallbacks(data, name, model)
        if isinstance(model.get("hedge"), dict):
            yield from check_hedge(data, name, model)
        if model.get("continuation") is True:
            yield from check_continuation(data, name, model)


def _policy(policy: str, path: Path) -> Iterator[Finding]:
    # Here rather than at the top: most configurations name no policy, and one of the operator's own runs their code.
    from routing.policies import POLICY_NAMES, PolicyError, make_policy

    try:
        make_policy(policy, Random())
    except PolicyError as error:
        hint = did_you_mean(policy, POLICY_NAMES) if ":" not in policy else "write package.module:attribute"
        yield Finding(path, str(error), hint)


def _template(name: str, path: Path) -> Iterator[Finding]:
    """Only that it is there: it is read by the workers, which go by the text of prompts where it cannot be used."""
    try:
        FilePath(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        yield Finding(path, f"{shown(name)} cannot be read: {reason}", "check the path and its permissions")


def _spill(data: dict[str, Any], model: dict[str, Any], path: Path) -> Iterator[Finding]:
    spill = model["spill"]
    backends = _mapping(data, "backends")
    wanted = spill.get("backend")
    if isinstance(wanted, str):
        backend = backends.get(wanted)
        if wanted not in backends:
            hint = did_you_mean(wanted, backends) or "add it under backends"
            yield Finding((*path, "backend"), f"{shown(wanted)} is not the name of a backend", hint)
        elif wanted == model.get("backend"):
            yield Finding((*path, "backend"), f"{shown(wanted)} is the model's own backend", "name a rented one")
        elif isinstance(backend, dict) and not _hosted(backend):
            yield Finding(
                (*path, "backend"),
                f"the replicas of {shown(wanted)} are not hosted ones",
                f"write hosted: true there, in backends.{wanted}",
            )
    if model.get("adapter") is not None:
        yield Finding(path, "a model with an adapter never spills: rented replicas do not have it", "take it out")
    yield from _prices(spill, path)


def _prices(spill: dict[str, Any], path: Path) -> Iterator[Finding]:
    price = spill.get("price")
    if isinstance(price, dict) and not any(_positive(price.get(name)) for name in ("input", "output")):
        yield Finding(
            (*path, "price"),
            "costs nothing, so that the ceilings would never be reached",
            "write what the host charges, e.g. price: {input: 0.3, output: 1.2}",
        )
    hour, day = spill.get("usd_per_hour"), spill.get("usd_per_day")
    if isinstance(hour, (int, float)) and isinstance(day, (int, float)) and hour > day:
        yield Finding((*path, "usd_per_hour"), f"{hour:g} is more than usd_per_day ({day:g})", f"write at most {day:g}")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _hosted(backend: dict[str, Any]) -> bool:
    """Whether its replicas are rented; True where that cannot be told, since something else is wrong then."""
    from backends.dialects import DIALECTS

    said = backend.get("hosted")
    if isinstance(said, bool):
        return said
    engine = backend.get("engine")
    return not isinstance(engine, str) or engine not in DIALECTS or DIALECTS[engine].hosted


def _mapping(data: Any, key: str) -> dict[str, Any]:
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}
