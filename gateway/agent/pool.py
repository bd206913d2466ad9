"""The servers of one pool on this machine: the crew's decisions carried out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.discovery.registrar import PoolOrders, PoolReport
from gateway.agent.crew import Add, Crew, Release, Seat
from gateway.agent.keeping import Keeper, Leave, Limits, Phase, Say
from gateway.agent.places import Room
from gateway.agent.plans import plan_of
from gateway.agent.ports import advice
from gateway.agent.server import Plan, Server
from gateway.agent.times import StartTimes
from gateway.config import Backend, Settings


class LaunchedPool:
    """One pool. Belongs to one event loop."""

    def __init__(
        self,
        settings: Settings,
        room: Room,
        logs: Path,
        times: StartTimes,
        *,
        node_rank: int | None,
        clock: Callable[[], float],
        say: Callable[[str, str], None],
        changed: Callable[[], None],
        gateways: Callable[[str, str], Sequence[tuple[str, bool]]],
        spawn: Callable[[Server], None],
    ) -> None:
        """`node_rank`: instead of `launch.node_rank`."""
        self.name = room.pool
        self.room = room
        self.servers: dict[int, Server] = {}
        self.closing = False
        self._settings, self._node_rank, self._times = settings, node_rank, times
        self._logs = logs
        self._timed: dict[int, int] = {}
        """Restarts of the server in each place when the time of its start was written down last."""
        self._clock, self._say, self._changed, self._gateways, self._spawn = clock, say, changed, gateways, spawn
        assert self.backend.launch is not None
        self.crew = Crew(self.backend.launch.count, room.capacity)
        self._warned: str | None = None
        self._look_at_ports()

    @property
    def backend(self) -> Backend:
        return self._settings.backends[self.name]

    @property
    def answers(self) -> bool:
        """Whether its servers answer requests; not so on the further machines of servers that span several."""
        assert self.backend.launch is not None
        rank = self.backend.launch.node_rank if self._node_rank is None else self._node_rank
        return rank == 0

    def take(self, settings: Settings, room: Room) -> None:
        """Go on with another configuration: servers that it starts differently are started anew."""
        before, self._settings, self.room = self.backend, settings, room
        assert before.launch is not None
        assert self.backend.launch is not None
        for server in self.servers.values():
            server.keeper.limits = self._limits()
        self.crew.capacity = room.capacity
        if self.backend.launch.count != before.launch.count:
            self.crew.count, self.crew.fewer = self.backend.launch.count, 0
        self._look_at_ports()
        if _how_started(before) != _how_started(self.backend):
            self._say(self.name, "its `launch` has changed: its servers are started anew, one after the other")
            self.crew.renew()

    def _look_at_ports(self) -> None:
        """Tell, once, of ports that may be taken away between two starts."""
        told = advice([self.room.port_of(place) for place in range(self.room.capacity)]) if self.answers else None
        if told is not None and told != self._warned:
            self._say(self.name, told)
        self._warned = told

    def turn(self) -> None:
        """Whatever is to be done now."""
        for server in list(self.servers.values()):
            server.post()
        for place, server in list(self.servers.items()):
            if server.keeper.phase is Phase.GONE:
                del self.servers[place], self.crew.seats[place]
                self._timed.pop(place, None)
            elif server.keeper.phase is Phase.READY and self._timed.get(place) != server.keeper.restarts:
                self._timed[place] = server.keeper.restarts
                self._times.took(self.name, server.keeper.started_in_s or 0.0)
        if self.closing:
            return
        for place, server in self.servers.items():
            self.crew.seats[place].taken = server.taken
        for step in self.crew.decide():
            match step:
                case Add(place):
                    self._add(place)
                case Release(place, again):
                    self.servers[place].post(Leave(again))
                case Say(text):
                    self._say(self.name, text)

    def obey(self, orders: PoolOrders) -> None:
        self.crew.order(orders.count, frozenset(orders.leave), orders.roll)

    def report(self) -> PoolReport:
        crew = self.crew
        launched = 0 if self.closing else crew.settled
        most = max(0, crew.capacity - crew.fewer)
        return PoolReport(launched=launched, ready=crew.ready, max=most, roll=crew.roll or 0)

    def _add(self, place: int) -> None:
        name = self.room.name(place)
        keeper = Keeper(self._limits(), self._clock(), random.uniform)
        self.crew.seats[place] = seat = Seat(place, name, keeper)

        def plan() -> Plan:
            seat.generation = self.crew.generation
            return plan_of(self._settings, self.room, place, self._node_rank, self._times.usual_s(self.name))

        self.servers[place] = server = Server(
            self.name,
            name,
            self.room.agent,
            self._logs / self.name / f"{name}.log",
            keeper,
            plan,
            clock=self._clock,
            say=self._say,
            changed=self._changed,
            gateways=lambda: self._gateways(self.name, name),
            spawn=self._spawn,
        )
        server.post()

    def _limits(self) -> Limits:
        launch = self.backend.launch
        assert launch is not None
        return Limits(start_timeout_s=launch.start_timeout_s, stop_timeout_s=launch.stop_timeout_s)


def _how_started(backend: Backend) -> object:
    """What a running server cannot take over."""
    assert backend.launch is not None
    launch = backend.launch.model_dump(exclude={"count", "start_timeout_s", "stop_timeout_s"})
    secrets = {name: value.get_secret_value() for name, value in backend.launch.secret_env.items()}
    return backend.engine, backend.adapters, {**launch, "secret_env": secrets}
