"""Checks of scaling that need more than one setting.

Like `checks`, they read the raw configuration, and pass over what the schema has reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.config.problems import Finding, Path, shown

_SECTIONS = ("kubernetes", "command", "webhook")


def check_scaling(data: dict[str, Any]) -> Iterator[Finding]:
    """Everything wrong between the settings of a pool's scaling."""
    backends = data.get("backends")
    for pool, backend in backends.items() if isinstance(backends, dict) else ():
        scaling = backend.get("scaling") if isinstance(backend, dict) else None
        if isinstance(scaling, dict):
            yield from _numbers(scaling, ("backends", pool, "scaling"))
            yield from _provider(backend, scaling, ("backends", pool, "scaling"))


def _numbers(scaling: dict[str, Any], path: Path) -> Iterator[Finding]:
    least, most = scaling.get("min", 1), scaling.get("max")
    if _number(least) and _number(most) and least > most:
        yield Finding((*path, "max"), f"{shown(most)} is less than min, which is {least}", f"use {least} or more")
    price, ceiling = scaling.get("usd_per_hour", 0.0), scaling.get("max_usd_per_hour")
    if not _number(ceiling) or not _number(price):
        return
    if not price:
        yield Finding(
            (*path, "max_usd_per_hour"),
            "has no effect: usd_per_hour does not say what a replica costs",
            "say so, or take this one out",
        )
    elif _number(least) and least * price > ceiling:
        yield Finding(
            (*path, "max_usd_per_hour"),
            f"does not pay for the {least} replicas of min, which cost {least * price:g} an hour",
            f"use {least * price:g} or more, or a lower min",
        )
    elif price > ceiling:
        yield Finding((*path, "max_usd_per_hour"), "does not pay for a single replica", f"use {price:g} or more")


def _provider(backend: dict[str, Any], scaling: dict[str, Any], path: Path) -> Iterator[Finding]:
    provider = scaling.get("provider", "none")
    if provider in _SECTIONS and scaling.get(provider) is None:
        yield Finding(
            (*path, "provider"),
            f"{provider} needs the section of this name, which says what it acts on",
            f"add scaling.{provider}",
        )
    for name in _SECTIONS:
        if name != provider and scaling.get(name) is not None and isinstance(provider, str):
            yield Finding(
                (*path, name), f"is not used: the provider is {provider}", f"use provider: {name}, or take it out"
            )
    if provider == "local" and backend.get("launch") is None:
        yield Finding(
            (*path, "provider"),
            "local stands for servers that `tidegate fleet up` starts, and the backend has no launch",
            "add launch, which says how they are started",
        )
    if backend.get("hosted") is True:
        yield Finding(path, "the replicas are rented (hosted): nobody here starts or stops any", "take one of them out")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
