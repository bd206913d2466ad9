"""Replicas that were found, as a layer of configuration: over file and environment, under what operators override.

What the configuration names itself comes first: a replica that is found at the same address, or that would have the
same name, is left out, and keeps nobody from reading the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

from gateway.config.environment import Overrides
from gateway.config.urls import normal_url

DISCOVERED = "discovered"
"""Where a value comes from that nobody has written down."""

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""By pool: entries as under `replicas`, each with url (in its normal form) and name."""


def apply_found(data: dict[str, Any], found: Found, origins: Overrides) -> None:
    """Append them to raw configuration, and write into `origins` where they came from."""
    backends = data.get("backends")
    for pool, entries in found.items():
        backend = backends.get(pool) if isinstance(backends, dict) else None
        if not isinstance(backend, dict) or not entries:
            continue
        written = backend.get("replicas") or []
        if not isinstance(written, (list, tuple)):
            continue
        places, names = _taken(pool, written)
        replicas = list(written)
        for entry in entries:
            if (entry["url"], entry.get("dp_rank")) not in places and entry["name"] not in names:
                origins.origins["backends", pool, "replicas", len(replicas)] = (DISCOVERED, "")
                replicas.append(dict(entry))
        backend["replicas"] = replicas


def _taken(pool: str, written: Sequence[Any]) -> tuple[set[tuple[str, Any]], set[Any]]:
    places: set[tuple[str, Any]] = set()
    names: set[Any] = set()
    for position, each in enumerate(written):
        if not isinstance(each, dict):
            continue
        names.add(each.get("name") or f"{pool}-{position}")
        try:
            places.add((normal_url(each.get("url", "")), each.get("dp_rank")))
        except (PydanticCustomError, TypeError):
            continue  # reported by the schema
    return places, names
