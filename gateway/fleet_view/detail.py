"""All that is known of one replica, as all workers see it: what `/admin/replicas/` says, and what decisions look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.roster import Roster, State


def detail(roster: Roster, pool: str, replica: str) -> dict[str, Any]:
    """Raises `UnknownReplica`."""
    merged = roster.merged(pool, replica)
    states = [state for _, state in roster.seen(pool, replica)]
    ceilings = [state["ceiling"] for state in states]
    return {
        **merged,
        "ceiling": None if None in ceilings else sum(ceilings),
        "last_of_pool": roster.is_last(pool, replica),
        "share": min(state["share"] for state in states),
        "failures": max(state["failures"] for state in states),
        "limited_s": max((state["limited_s"] for state in states), key=_longest),
        "work": _largest(states, "work"),
        "speed": states[0]["speed"],
        "ttft_error": states[0]["ttft_error"],
        "prefix_index": _largest(states, "prefix_index"),
        "adapter_slots": states[0]["adapter_slots"],
        "adapters_loading": sorted({name for state in states for name in state["adapters_loading"]}),
        "kv_events": next((state["kv_events"] for state in states if state["kv_events"]), None),
        "connections": {
            name: sum(state["connections"][name] for state in states) for name in ("idle", "active", "waiting")
        },
    }


def _largest(states: Sequence[State], name: str) -> dict[str, Any] | None:
    """Figure by figure: each worker has its own picture of the whole, and one that has just begun has little of it."""
    known = [state[name] for state in states if state[name] is not None]
    if not known:
        return None
    return {each: max(picture[each] for picture in known) for each in known[0]}


def _longest(limited_s: dict[str, float]) -> float:
    return max(limited_s.values(), default=0.0)
