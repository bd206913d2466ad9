"""The replicas as all workers together see them: one entry each, made from what every worker says of itself.

Nothing here asks anybody; see `gateway.operations`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.errors import InvalidRequest
from routing.filters import HELD_BACK

MAX_NAMED = 20
"""Names that a message lists."""

_ABLE = frozenset({"full"}) | HELD_BACK
State = Mapping[str, Any]
"""One replica in the answer of one worker, see `gateway.state`."""


class UnknownReplica(InvalidRequest):
    status = 404
    code = "unknown_replica"


class UnknownAdapter(InvalidRequest):
    status = 404
    code = "unknown_adapter"


@dataclass
class Roster:
    """Every pool and replica that some worker knows, each with what each worker says of it."""

    answering: list[int] = field(default_factory=list)
    """The workers that answered, by their numbers."""
    silent: list[int] = field(default_factory=list)
    pools: dict[str, dict[str, list[tuple[int, State]]]] = field(default_factory=dict)
    """By pool and replica: what each worker says. Workers differ for a moment during a reload."""
    configured: dict[str, dict[str, str]] = field(default_factory=dict)
    """By pool: path by name of the adapters that the configuration lists."""

    @classmethod
    def of(cls, answers: Iterable[tuple[int, State | None]]) -> Roster:
        """From each worker's `/admin/fleet`; None for one that did not answer."""
        roster = cls()
        for index, answer in answers:
            if answer is None or not answer.get("up"):
                roster.silent.append(index)
                continue
            roster.answering.append(index)
            for pool in answer["pools"]:
                replicas = roster.pools.setdefault(pool["name"], {})
                roster.configured.setdefault(pool["name"], {}).update(pool["adapters"])
                for state in pool["replicas"]:
                    replicas.setdefault(state["name"], []).append((index, state))
        return roster

    def seen(self, pool: str, replica: str) -> list[tuple[int, State]]:
        """What each worker says of a replica. Raises `UnknownReplica`, which names what there is."""
        replicas = self.replicas_of(pool)
        if replica not in replicas:
            raise UnknownReplica(
                f"The pool {pool!r} has no replica {replica[:80]!r}{_instead(replica, replicas)}.", param="replica"
            )
        return replicas[replica]

    def replicas_of(self, pool: str) -> Mapping[str, list[tuple[int, State]]]:
        """Raises `UnknownReplica`."""
        if pool not in self.pools:
            raise UnknownReplica(f"There is no pool {pool[:80]!r}{_instead(pool, self.pools)}.", param="pool")
        return self.pools[pool]

    def merged(self, pool: str, replica: str) -> dict[str, Any]:
        """One replica over all workers. Raises `UnknownReplica`."""
        seen = self.seen(pool, replica)
        states = [state for _, state in seen]
        draining = all(state["draining"] for state in states)
        cordoned = all(state["cordoned"] for state in states)
        in_flight = sum(state["in_flight"] for state in states)
        reasons = [state["unavailable_reason"] for state in states]
        differ = len(set(reasons)) > 1 or len({state["health"] for state in states}) > 1
        return {
            "pool": pool,
            "replica": replica,
            **{name: states[0][name] for name in ("url", "engine", "region", "weight", "max_in_flight")},
            "draining": draining,
            "cordoned": cordoned,
            "in_flight": in_flight,
            "in_flight_bytes": sum(state["in_flight_bytes"] for state in states),
            # What a worker that does not answer still has under way is not known.
            "empty": in_flight == 0 and not self.silent and not any(map(known_work, states)),
            "available": all(state["available"] for state in states),
            "unavailable_reason": next((reason for reason in reasons if reason is not None), None),
            "health": states[0]["health"],
            "workers": [_of_worker(index, state) for index, state in seen] if differ else [],
            "silent_workers": self.silent,
            "capacity": states[0]["capacity"],
            "epoch": _first(states, "epoch"),
            "load": _newest_load(states),
            "info": _first(states, "info"),
            "adapters": _first(states, "adapters") or [],
            "lacking": {signal: reason for state in states for signal, reason in state["lacking"].items()},
            "refused_fields": sorted({name for state in states for name in state["refused_fields"]}),
        }

    def all_merged(self) -> Iterator[dict[str, Any]]:
        for pool, replicas in self.pools.items():
            for replica in replicas:
                yield self.merged(pool, replica)

    def is_last(self, pool: str, replica: str) -> bool:
        """Whether no other replica of the pool takes work. One that is only full or held back just now does."""
        return not any(
            state["available"] or state["unavailable_reason"] in _ABLE
            for name, seen in self.replicas_of(pool).items()
            if name != replica
            for _, state in seen
        )

    def is_draining(self, pool: str, replica: str, wanted: bool) -> bool:
        """Whether all workers know that the replica is drained, or that it is not."""
        return all(state["draining"] == wanted for _, state in self.seen(pool, replica))

    def is_cordoned(self, pool: str, replica: str, wanted: bool) -> bool:
        """Whether all workers know that the replica is cordoned, or that it is not."""
        return all(state["cordoned"] == wanted for _, state in self.seen(pool, replica))

    def holds(self, pool: str, replica: str, adapter: str, wanted: bool) -> bool:
        """Whether all workers know that a replica holds an adapter, or that it does not."""
        return all((adapter in _held(state)) == wanted for _, state in self.seen(pool, replica))

    def adapters(self, pools: Iterable[str]) -> dict[str, Any]:
        """The adapters of these pools: those that replicas hold and those that the configuration lists."""
        listed: list[dict[str, Any]] = []
        lacking: list[dict[str, Any]] = []
        for pool in pools:
            paths: dict[str, str | None] = dict(self.configured[pool])
            holders: dict[str, list[str]] = {name: [] for name in paths}
            for replica in self.pools[pool]:
                merged = self.merged(pool, replica)
                for name, path in _held(merged).items():
                    paths[name] = paths.get(name) or path
                    holders.setdefault(name, []).append(replica)
                if "adapters" in merged["lacking"]:
                    lacking.append({"pool": pool, "replica": replica, "reason": merged["lacking"]["adapters"]})
            listed += [
                {
                    "pool": pool,
                    "name": name,
                    "path": paths[name],
                    "replicas": replicas,
                    "configured": name in self.configured[pool],
                }
                for name, replicas in sorted(holders.items())
            ]
        return {"adapters": listed, "lacking": lacking}


def known_work(state: State) -> int:
    """Requests at a replica as far as one worker knows: those of other gateways, and of others, too."""
    work = state.get("work") or {}
    return int(work.get("queued", 0)) + int(work.get("running", 0))


def _of_worker(index: int, state: State) -> dict[str, Any]:
    names = ("available", "unavailable_reason", "health", "in_flight", "draining")
    return {"worker": index, **{name: state[name] for name in names}}


def _held(state: State) -> dict[str, str | None]:
    """Path by name of the adapters in memory."""
    return {each["name"]: each["path"] for each in state["adapters"] if each["resident"]}


def _first(states: Sequence[State], name: str) -> Any:
    """What the first worker that knows says: all have it from the same fact, a new one perhaps not yet."""
    return next((state[name] for state in states if state[name]), None)


def _newest_load(states: Sequence[State]) -> Any:
    loads = [state["load"] for state in states if state["load"] is not None]
    return min(loads, key=lambda load: float(load["age_s"]), default=None)


def _instead(given: str, known: Iterable[str]) -> str:
    """The end of a message about a name that does not exist."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}? There are: {_named(names)}"
    return f"; there are: {_named(names)}" if names else "; there are none"


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


def unknown_adapter(pool: str, name: str, known: Iterable[str]) -> UnknownAdapter:
    """The error for an adapter that no replica of a pool holds."""
    return UnknownAdapter(f"No replica of {pool!r} holds an adapter {name!r}{_instead(name, known)}.", param="name")
