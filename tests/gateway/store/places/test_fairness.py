"""What the order of the queue comes to over many requests. A simulation on its own clock: the same at every run."""

from __future__ import annotations

import heapq
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest

from gateway.store.memory_places import Line
from gateway.store.places import Band, Room, State, Ticket

MS = 1000


class Simulation:
    """A pool whose requests take as long as they cost; whoever was served asks again at once.

    Estimates are `estimated(real cost)`.
    """

    def __init__(self, room: Room, estimated: Callable[[str, int], int] | None = None, seed: int = 4) -> None:
        self.line = Line()
        self.room = room
        self.now_us = 1_000_000
        self.rng = random.Random(seed)
        self.estimated = estimated or (lambda tenant, cost: cost)
        self.running: list[tuple[int, str]] = []
        self.tickets: dict[str, tuple[Ticket, int]] = {}
        self.entered_us: dict[str, int] = {}
        self.count = 0
        self.served: Counter[str] = Counter()
        """Real cost by tenant, of what was granted."""
        self.waits_us: defaultdict[str, list[int]] = defaultdict(list)
        self.busy_us: Counter[Band] = Counter()
        """Places times time, by band."""
        self.releases_us: list[int] = []
        self.again = True

    def heavy_tailed(self) -> int:
        return min(32_000, int(200 * self.rng.paretovariate(1.3)))

    def enter(
        self, tenant: str, weight: float = 1.0, band: Band = Band.STANDARD, cost: int = 0, tokens: int = 1
    ) -> None:
        self.count += 1
        real = cost or self.heavy_tailed()
        ticket = Ticket(
            f"{tenant}-{self.count}", "g", tenant, weight, band, self.estimated(tenant, real), tokens, 10**15
        )
        self.tickets[ticket.id] = (ticket, real)
        self.entered_us[ticket.id] = self.now_us
        if self.line.enter(ticket, self.room, self.now_us).state is State.GRANTED:
            self.start(ticket.id)
        for grant in self.line.told:
            self.start(grant.id)
        self.line.told.clear()

    def start(self, id: str) -> None:
        ticket, real = self.tickets[id]
        self.served[ticket.tenant] += real
        self.waits_us[ticket.tenant].append(self.now_us - self.entered_us[id])
        took_us = int(real * self.rng.uniform(80, 120))
        self.line.renew("g", [ticket], [], self.room, self.now_us)
        self.busy_us[ticket.band] += took_us
        heapq.heappush(self.running, (self.now_us + took_us, id))

    def step(self) -> None:
        """The next release, and the same client's next request."""
        self.now_us, id = heapq.heappop(self.running)
        self.releases_us.append(self.now_us)
        ticket, real = self.tickets.pop(id)
        for granted in self.line.leave(id, "g", real, self.room, self.now_us).ids:
            self.start(granted)
        if self.again:
            self.enter(ticket.tenant, ticket.weight, ticket.band, tokens=ticket.tokens)


ESTIMATES: dict[str, Callable[[str, int], int]] = {
    "right": lambda tenant, cost: cost,
    "twice": lambda tenant, cost: 2 * cost,
    "half": lambda tenant, cost: max(1, cost // 2),
    "one tenant twice, one half": lambda tenant, cost: {"a": 2 * cost, "b": max(1, cost // 2)}.get(tenant, cost),
    "always the same": lambda tenant, cost: 700,
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_tenants_are_served_by_weight_whatever_their_costs_and_estimates(name: str) -> None:
    lease_us = 10**12
    simulation = Simulation(Room(16, lease_us=lease_us, gateway_us=10**12), ESTIMATES[name])
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    callers = {"a": 160, "b": 48, "c": 48}  # the lightest asks most
    for tenant, count in callers.items():
        for _ in range(count):
            simulation.enter(tenant, weights[tenant])
    for _ in range(1000):
        simulation.step()
    simulation.served.clear()
    for _ in range(24_000):
        simulation.step()
    total = sum(simulation.served.values())
    for tenant, weight in weights.items():
        assert simulation.served[tenant] / total == pytest.approx(weight / 7, rel=0.01)


def test_a_light_tenant_waits_two_releases_at_most_beside_a_heavy_one() -> None:
    simulation = Simulation(Room(16, gateway_us=10**12, lease_us=10**12))
    for _ in range(200):
        simulation.enter("heavy")
    simulation.again = True
    for _ in range(500):
        simulation.step()
    start, began_us = len(simulation.releases_us), simulation.now_us
    light_running = False
    for _ in range(20_000):
        if not light_running:
            simulation.enter("light")
            light_running = True
        before = len(simulation.waits_us["light"])
        simulation.now_us, id = heapq.heappop(simulation.running)
        simulation.releases_us.append(simulation.now_us)
        ticket, real = simulation.tickets.pop(id)
        for granted in simulation.line.leave(id, "g", real, simulation.room, simulation.now_us).ids:
            simulation.start(granted)
        if ticket.tenant == "heavy":
            simulation.enter("heavy")
        else:
            light_running = False
        assert len(simulation.waits_us["light"]) - before <= 1
    releases = len(simulation.releases_us) - start
    mean_us = (simulation.now_us - began_us) / releases
    assert len(simulation.waits_us["light"]) > 500
    assert statistics.median(simulation.waits_us["light"]) <= 2 * mean_us
    assert statistics.median(simulation.waits_us["heavy"]) > 20 * mean_us


def held(simulation: Simulation, steps: int) -> dict[Band, float]:
    """Mean places that each band held over so many releases."""
    held_us: Counter[Band] = Counter()
    began_us = simulation.now_us
    for _ in range(steps):
        running = simulation.line.standing(simulation.now_us).running
        before_us = simulation.now_us
        simulation.step()
        for band in Band:
            held_us[band] += running[band] * (simulation.now_us - before_us)
    return {band: held_us[band] / (simulation.now_us - began_us) for band in Band}


@pytest.mark.parametrize("places", [20, 7, 2, 1])
def test_every_band_gets_its_share_of_the_places_under_full_load(places: int) -> None:
    simulation = Simulation(Room(places, gateway_us=10**15, lease_us=10**15))
    for band in reversed(Band):
        for _ in range(40):
            simulation.enter(f"t{band}", band=band)
    for _ in range(20 * places):
        simulation.step()
    means = held(simulation, 20_000)
    for band, share in zip(Band, (0.50, 0.30, 0.15, 0.05), strict=True):
        assert means[band] == pytest.approx(places * share, rel=0.15, abs=0.03), (means, band)


def test_a_band_alone_has_the_whole_pool_and_gives_back_what_was_borrowed() -> None:
    simulation = Simulation(Room(20, gateway_us=10**15, lease_us=10**15))
    for _ in range(100):
        simulation.enter("greedy", band=Band.SHEDDABLE)
    assert held(simulation, 1000)[Band.SHEDDABLE] == 20
    for _ in range(40):
        simulation.enter("urgent", band=Band.CRITICAL)
    for _ in range(20):  # each place that is released goes to the band that is below its guarantee
        simulation.step()
    assert simulation.line.standing(simulation.now_us).running[Band.CRITICAL] >= 10


@pytest.mark.parametrize("shares", [(50, 30, 15, 5), (100, 0, 0, 0), (50, 50, 0, 0)])
def test_no_band_starves_not_even_one_without_a_share(shares: tuple[int, int, int, int]) -> None:
    simulation = Simulation(Room(2, shares=shares, gateway_us=10**15, lease_us=10**15))
    for band in Band:
        for _ in range(20):
            simulation.enter(f"t{band}", band=band)
    for _ in range(5000):
        simulation.step()
    assert min(simulation.served[f"t{band}"] for band in Band) > 0
    assert len(simulation.served) == 4


def test_a_request_as_large_as_the_pool_is_served_beside_a_stream_of_small_urgent_ones() -> None:
    simulation = Simulation(Room(64, 1000, gateway_us=10**15, lease_us=10**15))
    for _ in range(100):
        simulation.enter("small", band=Band.CRITICAL, tokens=50)
        simulation.enter("other", band=Band.STANDARD, tokens=30)
    simulation.enter("huge", band=Band.SHEDDABLE, tokens=5000)
    steps = 0
    while not simulation.waits_us["huge"]:
        simulation.step()
        steps += 1
        assert steps < 1000, "starved"
    standing = simulation.line.standing(simulation.now_us)
    assert standing.running == (0, 0, 0, 1)
    assert standing.tokens == 1000
