"""What is simulated besides traffic: engines, where they are, their prices, what goes wrong, how many gateways ask."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from loadtests.simulator.engine import Constants
from routing.sharing import FLUSH_S

FITS = Path(__file__).parent.parent / "fits" / "engines.json"
DEFAULT_ENGINE = "8b-gpu"


class FleetError(Exception):
    """There is no such engine, or its constants cannot be read."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One replica of the fleet."""

    constants: Constants = field(default_factory=Constants)
    region: str = ""
    usd_per_hour: float = 0.0
    """Of an engine of one's own."""
    hosted: bool = False
    input_usd_per_million: float = 0.0
    """Of a hosted one; or what the gateway is told that tokens cost at an own one (its shadow price)."""
    cached_usd_per_million: float = 0.0
    output_usd_per_million: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something goes wrong at one replica: "crash" (back after `lasts_s` with an empty cache), "slow" (`factor` times
    slower for so long), "flush" (the cache is emptied)."""

    at: float
    replica: int
    kind: str
    lasts_s: float = 0.0
    factor: float = 3.0


@dataclass(frozen=True, slots=True)
class Gossip:
    """How gateways tell each other what they do."""

    coalesce_ms: float = 1000.0 * FLUSH_S
    delay_ms: float = 2.0
    """From one gateway to the others, through whatever is between them."""


@dataclass(frozen=True, slots=True)
class Fleet:
    seats: tuple[Seat, ...]
    gateways: int = 1
    """Per region that has any."""
    gossip: Gossip | None = field(default_factory=Gossip)
    """None: they tell each other nothing."""
    rtt_ms: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """From a gateway's region to a replica's; one that is missing takes `near_ms`."""
    near_ms: float = 0.5
    origins: tuple[str, ...] = ("",)
    faults: tuple[Fault, ...] = ()
    report_s: float = 1.0
    """Engines report their load this often; 0: never."""
    told_speeds: bool = False
    """Gateways are told the engines' constants and learn none."""
    attempts: int = 3

    def rtt(self, origin: str, region: str) -> float:
        return self.rtt_ms.get((origin, region), self.near_ms)


def slower(constants: Constants, factor: float) -> Constants:
    """The same engine on hardware that takes `factor` times as long for everything."""
    return replace(
        constants,
        prefill_ms=constants.prefill_ms * factor,
        step_ms=constants.step_ms * factor,
        request_ms=constants.request_ms * factor,
        kv_ms=constants.kv_ms * factor,
    )


def engine_named(name: str, fits: Path = FITS) -> Constants:
    """Constants by the name of a fit. Raises `FleetError`."""
    engines = engines_in(fits)
    if name not in engines:
        raise FleetError(f"no engine is called {name!r}; there are {', '.join(sorted(engines))}")
    return engines[name]


def engines_in(fits: Path = FITS) -> dict[str, Constants]:
    try:
        rows = json.loads(fits.read_text())
    except (OSError, ValueError) as error:
        raise FleetError(f"{fits} cannot be read: {error}") from error
    known = {each.name for each in fields(Constants)}
    return {
        name: Constants(**{key: value for key, value in row.items() if key in known})
        for name, row in rows.items()
        if isinstance(row, dict)
    }


def seats_of(groups: Sequence[tuple[int, Seat]]) -> tuple[Seat, ...]:
    return tuple(seat for count, seat in groups for _ in range(count))
