"""One simulated gateway: the production router with replicas of its own, and what it tells its peers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from time import process_time

from loadtests.simulator.engine import Constants, Engine
from loadtests.simulator.fleet import Fleet
from loadtests.simulator.traffic import Workload
from routing.calibration import Calibration
from routing.evidence import Evidence
from routing.health import Health
from routing.load import Load
from routing.observing import observe
from routing.router import PoolState, Router
from routing.sharing import WORKER_BYTES, Peerage
from routing.speed import Speed
from routing.types import Chooser, Decision, InferenceRequest, Replica, Reservation


class Silent(Calibration):
    """Learns no speeds: for gateways that are told them."""

    def first_token(self, *_: object) -> None: ...

    def failed(self, *_: object) -> None: ...


class Gateway:
    def __init__(self, name: str, origin: str, fleet: Fleet, workload: Workload, chooser: Chooser, seed: int) -> None:
        self.name = name
        self.origin = origin
        state = PoolState(calibration=Silent() if fleet.told_speeds else Calibration())
        self.router = Router(chooser, state, Random(seed))
        self.replicas = [_replica(fleet, workload, number, origin, seed) for number in range(len(fleet.seats))]
        self.numbers = {replica: number for number, replica in enumerate(self.replicas)}
        self.decide_s: list[float] = []
        self.peerage: Peerage | None = None
        self._places: dict[tuple[str, int], Reservation] = {}

    def share(self, number: int, wake: Callable[[bool], None]) -> None:
        """There are peers to tell things to."""
        self.peerage = Peerage(number.to_bytes(WORKER_BYTES, "little"), self.router.state, self.replicas, wake)

    def decide(self, request: InferenceRequest, now: float, tried: list[Replica]) -> Decision:
        begun = process_time()
        decision = self.router.decide(request, self.replicas, now, tried)
        self.decide_s.append(process_time() - begun)
        return decision

    def dispatched(self, request: InferenceRequest, number: int, decision: Decision, now: float) -> None:
        replica = self.replicas[number]
        place = self._places[request.id, number] = replica.reserve(request)
        place.__enter__()
        self.router.dispatched(request, replica, now, decision)

    def first_token(self, request: InferenceRequest, number: int, now: float) -> None:
        self.router.first_token(request, self.replicas[number], now)

    def finished(self, request: InferenceRequest, number: int, now: float, cached: int, output: int) -> None:
        replica = self.replicas[number]
        self._places.pop((request.id, number)).__exit__()
        self.router.finished(
            request,
            replica,
            now,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=cached,
            output_tokens=output,
        )
        observe(replica, self.replicas, Evidence.ANSWERED, now)

    def failed(self, request: InferenceRequest, number: int, now: float) -> None:
        replica = self.replicas[number]
        self._places.pop((request.id, number)).__exit__()
        self.router.failed(request, replica, now)
        observe(replica, self.replicas, Evidence.FAILED, now)

    def reported(self, number: int, load: Load, epoch: str) -> None:
        replica = self.replicas[number]
        replica.load = load
        replica.epoch = epoch
        replica.meter.observe(load.running, load.waiting)


def report_of(engine: Engine, now: float, previous: tuple[float, int]) -> Load:
    """What the engine would say of itself, as SGLang's /v1/loads does. `previous`: prefill milliseconds and tokens at
    the last report."""
    constants = engine.constants
    tokens = engine.prefilled_tokens - previous[1]
    return Load(
        observed_at=now,
        running=engine.running,
        max_running=constants.max_running,
        waiting=len(engine.waiting),
        waiting_uncached_tokens=sum(each.prompt - engine.cache.match(each.path)[0] for each in engine.waiting),
        kv_use=min(1.0, engine.used_tokens / constants.kv_tokens),
        kv_used_tokens=engine.used_tokens,
        kv_capacity_tokens=constants.kv_tokens,
        prefill_us_per_token=(engine.prefill_busy_ms - previous[0]) * 1000.0 / tokens if tokens else None,
        adapter_slots=constants.adapter_slots or None,
        adapter_slots_used=len(engine.loaded) if constants.adapter_slots else None,
    )


def true_speed(constants: Constants, rtt_ms: float) -> Speed:
    return Speed(
        prefill_ms=constants.prefill_ms,
        curve=constants.curve,
        step_ms=constants.step_ms,
        request_ms=constants.request_ms,
        kv_ms=constants.kv_ms,
        chunk=constants.chunk,
        rtt_ms=rtt_ms,
        adapter_ms=constants.adapter_ms,
    )


def _replica(fleet: Fleet, workload: Workload, number: int, origin: str, seed: int) -> Replica:
    seat = fleet.seats[number]
    constants = seat.constants
    rtt_ms = fleet.rtt(origin, seat.region)
    replica = Replica(
        f"r{number}",
        "pool",
        f"http://r{number}",
        "sglang",
        region=seat.region,
        health=Health(rng=Random(seed + number)),
        epoch="0",
        hosted=seat.hosted,
        input_usd_per_million=seat.input_usd_per_million,
        cached_usd_per_million=seat.cached_usd_per_million,
        output_usd_per_million=seat.output_usd_per_million,
    )
    # A gateway measures its round trips in any case; the other constants it learns, unless it is told.
    replica.speed = (
        true_speed(constants, rtt_ms) if fleet.told_speeds else Speed(rtt_ms=rtt_ms, network_ms=rtt_ms)
    )  # gateways time their connections
    replica.meter.state(constants.max_running, constants.kv_tokens)
    if workload.adapters and constants.adapter_slots:
        replica.adapters = frozenset()
        replica.loadable = frozenset(workload.adapters)
        replica.adapter_slots = constants.adapter_slots
        replica.speed.adapter_ms = constants.adapter_ms
    return replica
