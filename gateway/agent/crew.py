"""What is to be done about the servers of one pool on this machine: how many, which go, and one after the other anew.

Plain synchronous code around the `Keeper` of each server. Places are numbered from 0; a place stands for a name, a port
and GPUs, and holds one server at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gateway.agent.keeping import Keeper, Phase, Say


@dataclass(slots=True)
class Seat:
    """A place that is taken."""

    place: int
    name: str
    keeper: Keeper
    generation: int | None = None
    """Of the last start (`Crew.generation` then); None before the first."""

    taken: bool = True
    """Whether the gateways have it among their replicas, once it is ready."""

    @property
    def ready(self) -> bool:
        return self.keeper.phase is Phase.READY

    @property
    def serving(self) -> bool:
        return self.ready and self.taken


@dataclass(frozen=True, slots=True)
class Add:
    """Take this place."""

    place: int


@dataclass(frozen=True, slots=True)
class Release:
    """The server of this place is to finish what it has and go; `again`: and to come back."""

    place: int
    again: bool = False


Step = Add | Release | Say


class Crew:
    """The servers of a pool. `decide` says the next steps; who carries them out enters and takes out the seats."""

    def __init__(self, count: int, capacity: int) -> None:
        self.count = count
        """As ordered."""
        self.capacity = capacity
        """Places that there are: ports and GPUs."""
        self.fewer = 0
        """Servers that somebody at this machine has taken away from what is ordered."""
        self.leave: Collection[str] = ()
        """Names of those that should be the first to go."""
        self.seats: dict[int, Seat] = {}
        self.generation = 0
        """Raised by each order to start all servers anew."""
        self.roll: int | None = None
        """Number of the last rolling restart that was carried out; None before the gateway has said one."""
        self.rolling = False
        self._roll_to: int | None = None
        self._moving: int | None = None
        """Place of the server that is being started anew just now."""
        self._surge = False
        """Whether that one is beyond the count, for the time until it is ready."""

    @property
    def wanted(self) -> int:
        return max(0, min(self.count - self.fewer, self.capacity))

    @property
    def live(self) -> list[Seat]:
        """Those that are not on their way out."""
        return [seat for _, seat in sorted(self.seats.items()) if not seat.keeper.leaving]

    @property
    def ready(self) -> int:
        return sum(seat.ready for seat in self.seats.values())

    @property
    def settled(self) -> int:
        """How many there are, the one not counted that is only there until another one has gone."""
        return len(self.live) - (self._surge and self._moving in self.seats)

    # -- orders

    def order(self, count: int, leave: Collection[str], roll: int | None) -> None:
        """What the gateway says. The first number of a rolling restart is taken for carried out, since all servers were
        started just now; so is a lower one: that gateway has begun anew."""
        self.count, self.leave = count, leave
        if roll is None:
            return
        if self.roll is None or roll < self.roll:
            self.roll = roll
        elif roll > self.roll and roll != self._roll_to:
            self._roll_to = roll
            self.renew()

    def renew(self) -> None:
        """Start all servers anew, one after the other."""
        self.generation += 1
        self.rolling = True

    # -- what follows

    def decide(self) -> list[Step]:
        """The next steps; to be called whenever anything has changed, once they are carried out."""
        return [*self._roll(), *self._fit()]

    def _fit(self) -> Iterator[Step]:
        live = self.live
        wanted = self.wanted + self._surge
        for place in self._free()[: max(0, wanted - len(live))]:
            yield Add(place)
        for seat in sorted(live, key=self._worth)[: max(0, len(live) - wanted)]:
            yield Release(seat.place)

    def _worth(self, seat: Seat) -> tuple[bool, bool, bool, int]:
        return (seat.name not in self.leave, seat.ready, not self._outdated(seat), -seat.place)

    def _free(self) -> list[int]:
        return [place for place in range(self.capacity) if place not in self.seats]

    def _outdated(self, seat: Seat) -> bool:
        return seat.generation is not None and seat.generation < self.generation

    def _roll(self) -> Iterator[Step]:
        if not self.rolling:
            return
        if self._moving is not None:
            seat = self.seats.get(self._moving)
            if seat is not None and not self._outdated(seat) and seat.keeper.phase is Phase.WAITING:
                if seat.keeper.trouble:
                    yield self._halt(seat)
                return
            if seat is not None and not seat.keeper.leaving and (self._outdated(seat) or not seat.serving):
                return
            self._moving, self._surge = None, False
        outdated = [seat for seat in self.live if self._outdated(seat)]
        if outdated:
            yield from self._next(min(outdated, key=lambda seat: (seat.ready, seat.place)))
        elif all(seat.serving for seat in self.live):
            self.rolling = False
            if self._roll_to is not None:
                self.roll, self._roll_to = self._roll_to, None
            yield Say("all servers are started anew" if self.live else "there is nothing to start anew")

    def _next(self, seat: Seat) -> Iterator[Step]:
        if seat.ready:
            if sum(each.serving for each in self.seats.values()) < self.wanted or len(self.live) > self.wanted:
                return  # one is missing already, or one too many is about to go
            free = self._free()
            if self.wanted == 1 and free:
                self._moving, self._surge = free[0], True
                yield Say(f"starting another server before {seat.name} goes")
                return
            if self.wanted == 1 and any(each.keeper.leaving for each in self.seats.values()):
                return  # its place is about to be free
            if self.wanted == 1:
                yield Say(f"{seat.name} is the only server and there is no room for a second one: it is drained")
        self._moving = seat.place
        yield Release(seat.place, again=True)

    def _halt(self, seat: Seat) -> Say:
        """The new one does not start: the others are left as they are, until the next order."""
        self.rolling, self._moving, self._surge = False, None, False
        old = sum(self._outdated(each) for each in self.live)
        rest = "the other one runs" if old == 1 else f"the other {old} run"
        return Say(f"stopped starting servers anew: {seat.name} {seat.keeper.trouble}; {rest} on as before")
