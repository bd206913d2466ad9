"""Which LoRA adapters a replica should hold: what makes room for what, and when a request may have one loaded.

An engine has a few slots for adapters, and loading one takes a good part of a second, during which others wait. The
policy says where an adapter is loaded (`routing.policies.cost` counts the loading as what it takes); this module says
whether it may be, and which other one goes:

- Only adapters that can be loaded again are ever dropped, the longest unused first.
- One that is in use is never dropped.
- One that has just been loaded stays for `HOLD_LOADS` times what loading takes. With `s` slots at most
  `s / HOLD_LOADS` of a replica's time goes into loading, however many adapters take turns: with two slots a fifth.

A replica is asked for one load at a time, by whoever carries this out (`gateway.adapters`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from routing.speed import Speed

HOLD_LOADS = 10.0
"""How many times what loading takes an adapter stays: a slot is to be used for much longer than it takes to fill."""
MAX_HOLD_S = 10.0
"""An adapter that takes minutes to load does not keep others out for longer than a request may reasonably wait."""
REFUSED_S = 30.0
"""How long a replica that refused to load an adapter is not asked for it again: a wrong path stays wrong."""

NOT_THERE = "adapter"
"""Reason: the replica does not have the adapter, and will not get it."""
NO_SLOT = "adapter_slots"
"""Reason: the replica could load it, once another adapter is no longer needed."""
ELSEWHERE = "adapter_elsewhere"
"""Reason: another replica has the adapter, and the policy does not weigh what loading it here would cost."""


@dataclass(slots=True)
class Shelf:
    """When the adapters of one replica came and were last wanted. Times are seconds of the router's clock."""

    since: dict[str, float] = field(default_factory=dict)
    """When each was first seen there, where that was observed."""
    used: dict[str, float] = field(default_factory=dict)
    """When each was last asked for."""
    refused_until: dict[str, float] = field(default_factory=dict)
    loads: int = 0
    """Times of loading that were observed."""

    def begin(self, names: Collection[str], known: Collection[str] | None, now: float) -> None:
        """The replica holds `names`; before it held `known`, None if nobody knew."""
        if known is None:  # they may have been there for long
            self.since.clear()
        else:
            for name in names:
                if name not in known:
                    self.since[name] = now
        for times in (self.since, self.used):
            if len(times) > 2 * len(names) + 64:  # names that are gone for good must not add up
                for name in [each for each in times if each not in names]:
                    del times[name]

    def refuse(self, name: str, now: float) -> None:
        """The engine would not load it."""
        for each in [each for each, until in self.refused_until.items() if until <= now]:
            del self.refused_until[each]
        self.refused_until[name] = now + REFUSED_S


class Holder(Protocol):
    """What is looked at of a `routing.types.Replica`."""

    @property
    def adapters(self) -> frozenset[str] | None: ...
    @property
    def adapter_slots(self) -> int | None: ...
    @property
    def loadable(self) -> frozenset[str]: ...
    @property
    def loading(self) -> frozenset[str]: ...
    @property
    def adapter_use(self) -> Mapping[str, int]: ...
    @property
    def shelf(self) -> Shelf: ...
    @property
    def speed(self) -> Speed: ...


H = TypeVar("H", bound=Holder)


def obstacle(adapter: str, replica: Holder, now: float) -> str | None:
    """Why a request for `adapter` should not go to this replica: `NOT_THERE`, `NO_SLOT`, or None if it may.

    Where it is not in memory, None means that it can be loaded there now.
    """
    held = replica.adapters
    if held is None:
        return NOT_THERE  # unknown is no: SGLang answers for adapters it does not have, from its base model
    if adapter in held:
        return None
    if adapter not in replica.loadable:
        return NOT_THERE
    shelf, slots = replica.shelf, replica.adapter_slots
    if shelf.refused_until and shelf.refused_until.get(adapter, 0.0) > now:
        return NOT_THERE
    if slots is None or adapter in replica.loading or len(held) + len(replica.loading) < slots:
        return None
    short = lacking_slots(replica)
    if short <= 0:
        return None
    # What `_idle` says, written out: this is on the way of every request for an adapter, once for each replica.
    use, loadable, since = replica.adapter_use, replica.loadable, shelf.since
    before = now - hold_s(replica.speed)
    left = short
    for name in held:
        if name not in use and name in loadable and since.get(name, before) <= before:
            left -= 1
            if not left:
                return None
    return NO_SLOT


def lacking_slots(replica: Holder, *, alone: bool = False) -> int:
    """How many adapters must go before one more fits; 0 or less: none.

    Those that are being loaded are counted, unless this one is `alone`.
    """
    slots = replica.adapter_slots
    if slots is None:
        return 0
    held, loadable = replica.adapters or frozenset(), replica.loadable
    own = kept = len(held & loadable)
    if replica.loading and not alone:
        own += len(replica.loading - held)
    return own + 1 - room(slots, len(held) - kept)


def room(slots: int, others: int) -> int:
    """How many adapters may be loaded and dropped at will, beside `others` that nobody could load again.

    One at least: engines that were started with as many adapters as they have slots put up with more of them, and
    exchange them by themselves.
    """
    return max(1, slots - others)


def victim(replica: Holder, busy: Collection[str], now: float) -> str | None:
    """The adapter that makes room for another one: the longest unused of those that may go. None: all must stay.

    `busy`: adapters that are in use by what somebody else knows, such as the engine itself.
    """
    used = replica.shelf.used
    return min(_idle(replica, busy, now), key=lambda name: (used.get(name, 0.0), name), default=None)


def next_to_go(replica: Holder, now: float) -> str | None:
    """The adapter that should be let go although it is in use, once nobody uses it: the one there for longest.

    Asked for where `victim` finds none, so that a request for another adapter comes to its turn even where all that
    are in memory are always wanted. None while all have just been loaded.
    """
    since = replica.shelf.since
    found = _past_hold(replica, now)
    return min(found, key=lambda name: (since.get(name, 0.0), name), default=None)


def hold_s(speed: Speed) -> float:
    """Seconds for which an adapter stays after it was loaded."""
    return min(MAX_HOLD_S, HOLD_LOADS * speed.adapter_ms / 1000.0)


def learn_load(replica: Holder, took_ms: float) -> None:
    """An adapter was loaded in this time. The first observation takes the place of the assumption."""
    shelf, speed = replica.shelf, replica.speed
    shelf.loads += 1
    speed.adapter_ms += (took_ms - speed.adapter_ms) * max(0.2, 1.0 / shelf.loads)
    speed.version += 1


def stay_where_loaded(adapter: str, candidates: Sequence[H]) -> Sequence[H]:
    """The candidates that have the adapter or are getting it, else those with a free slot, else all.

    For policies that do not know what loading costs: round robin would have every adapter loaded everywhere.
    """
    holders = [
        each
        for each in candidates
        if (each.adapters is not None and adapter in each.adapters) or adapter in each.loading
    ]
    return holders or [each for each in candidates if lacking_slots(each) <= 0] or candidates


def _idle(replica: Holder, busy: Collection[str], now: float) -> Iterable[str]:
    use = replica.adapter_use
    return (name for name in _past_hold(replica, now) if name not in use and name not in busy)


def _past_hold(replica: Holder, now: float) -> Iterable[str]:
    """The adapters that could be loaded again, and have not just been."""
    held, loadable, since = replica.adapters or frozenset(), replica.loadable, replica.shelf.since
    before = now - hold_s(replica.speed)
    return (name for name in held if name in loadable and since.get(name, before) <= before)
