"""What operators have changed while the gateway runs, as one more layer of configuration: over file and environment.

Replicas are addressed by name and not by position, since a position means another replica once the file has changed.
What leads nowhere (a model that the file no longer has) changes nothing and is reported, not refused: a gateway must
start with the file that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.config.environment import Overrides
from gateway.config.problems import Path

OVERRIDE = "override"
"""Where a value comes from that an operator has set: the file that a problem with it names."""

Layer = Sequence[tuple[tuple[str, ...], Any]]
"""Paths by names, `("backends", "pool", "replicas", "pool-0", "weight")`, and their values, as JSON has them."""

_SECTIONS_OF_THEIR_OWN = frozenset({"overload"})
"""These need not be in the file: they have defaults throughout."""


def apply_layer(data: dict[str, Any], layer: Layer, origins: Overrides) -> list[tuple[str, ...]]:
    """Write the layer into raw configuration, and where it came from into `origins`; the paths that lead nowhere."""
    unused: list[tuple[str, ...]] = []
    for path, value in layer:
        place = locate(data, path)
        if place is None:
            unused.append(path)
            continue
        here: Any = data
        for part in place[:-1]:
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = here[part]
        here[place[-1]] = value
        for known in [each for each in origins.origins if each[: len(place)] == place]:
            del origins.origins[known]  # a variable for a part of what is replaced as a whole
        origins.origins[place] = (OVERRIDE, "")
    return unused


def locate(data: dict[str, Any], path: Sequence[str]) -> Path | None:
    """The path with positions for the names of replicas; None where the configuration has nothing there."""
    here: Any = data
    found: list[str | int] = []
    if path and path[0] in _SECTIONS_OF_THEIR_OWN:
        section = data.get(path[0], {})
        return tuple(path) if isinstance(section, dict) else None
    for depth, part in enumerate(path[:-1]):
        if isinstance(here, list):
            position = _position(here, part, str(path[depth - 2]))
            if position is None:
                return None
            found.append(position)
            here = here[position]
            continue
        if not isinstance(here, dict) or (part not in here and not _may_be_made(path, depth)):
            return None
        found.append(part)
        here = here.get(part, {})
        if here is None and _may_be_made(path, depth):
            here = {}
    return (*found, path[-1]) if isinstance(here, dict) else None


def _may_be_made(path: Sequence[str], depth: int) -> bool:
    """Whether this part has defaults throughout, so that the file need not name it."""
    return path[0] == "models" and path[depth] == "ttft_target_ms"


def _position(entries: list[Any], name: str, pool: str) -> int | None:
    for position, entry in enumerate(entries):
        if isinstance(entry, dict) and (entry.get("name") or f"{pool}-{position}") == name:
            return position
    return None
