"""What a scaler has learned, as plain values that outlive it: over a restart, and at another gateway.

    long     what one replica serves and carries, and the last start times: good for hours, and less and less so
    short    what came and was decided in the last minutes: good for `RECENT_S`

All times are ages, in seconds before it was taken: clocks differ between processes. What is to be taken over is checked
first, and refused as a whole: half of it would be something that nobody has ever seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

VERSION = 1
RECENT_S = 120.0
"""For how long the last minutes still say something of the next ones."""
OLDEST_S = 7 * 86_400.0
"""What is older is not taken over. Long before that, a few minutes of what is seen weigh more."""
AHEAD_S = 300.0
"""How far two clocks may differ."""
MOST_SAMPLES = 64
"""Of arrivals, and of what was wanted: five minutes of decisions that are five seconds apart, and a few."""
MOST_STARTS = 20

_REPLICAS = 1e7
_RATE = 1e12
_REQUESTS = 1e9
_SECONDS = 1e13
_WEIGHT_S = 1e5
_KV_LEAST = 0.01
"""Of caches that are in use, all together: what is below `capacity.KV_LEAST` is not looked at."""
_ABOUT = 200

Aged = tuple[float, float]
"""A value, and the seconds since it was observed."""


class Implausible(ValueError):
    """It is not taken over. The message says why, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedLine:
    """Weighted sums over (requests in a replica, seconds each); weights are seconds."""

    weight: float
    b: float
    w: float
    bb: float
    bw: float
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedCapacity:
    """Of `routing.scaling.capacity.Capacity`."""

    by_tokens: bool
    line: LearnedLine | None = None
    told: float | None = None
    told_age_s: float | None = None
    lowered: float | None = None
    """Requests that a replica was seen to carry where first tokens came late, and more the longer ago that is."""
    tried: float | None = None
    """As many, when it was seen last."""
    arrivals: Aged | None = None
    tokens: Aged | None = None
    tokens_age_s: float | None = None
    held: Aged | None = None
    rate: Aged | None = None
    kv: Aged | None = None
    kv_held: Aged | None = None
    age_s: float | None = None
    full_for_s: float | None = None
    steady_for_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedCourse:
    """Of `routing.scaling.forecast.Series`."""

    samples: tuple[tuple[float, float, float], ...] = ()
    """Age, seconds, rate; the oldest first."""
    minute: tuple[float, float, float] | None = None
    """Age of the beginning, sum, seconds: of the minute that is not over."""
    level: float | None = None
    before: float = 0.0
    trend: float = 0.0
    increases: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedOrders:
    """What was wanted, and said. Ages and counts, the oldest first."""

    wanted: tuple[tuple[float, int], ...] = ()
    said: tuple[tuple[float, int], ...] = ()
    ordered: tuple[float, int] | None = None
    up_age_s: float | None = None
    down_age_s: float | None = None
    ready: tuple[float, int] = (0.0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """All of it; at most 12 KiB as JSON. `Scaler.learned` makes it, and `Scaler.restore` takes it."""

    version: int
    about: str
    """What capacity depends on, as one word: a model, an engine, how it is launched."""
    starts: tuple[float, ...]
    capacity: LearnedCapacity
    course: LearnedCourse
    orders: LearnedOrders


def age_at(now: float, at: float) -> float:
    """Of what was at `at`; beyond the oldest that is taken over, nobody asks how old."""
    return min(OLDEST_S, max(0.0, now - at))


def check(learned: Learned, about: str, age_s: float) -> None:
    """That it can be taken over by one who knows replicas of this kind, so long after. Raises `Implausible`."""
    if learned.version != VERSION:
        raise Implausible(f"it is of version {learned.version}, and {VERSION} is known here")
    if learned.about != about or len(about) > _ABOUT:
        raise Implausible("it was learned of another model, or of engines that are started in another way")
    if not -AHEAD_S <= age_s <= OLDEST_S:
        raise Implausible(f"its age is {age_s:.0f} s: it is to be from the last {OLDEST_S / 86_400.0:.0f} days")
    _numbers("starts", learned.starts, 0.0, _SECONDS, MOST_STARTS)
    _capacity(learned.capacity)
    _course(learned.course)
    _orders(learned.orders)


def _capacity(found: LearnedCapacity) -> None:
    line = found.line
    if line is not None:
        if not 0.0 < line.weight <= _WEIGHT_S:
            raise Implausible(f"capacity.line.weight is {line.weight}")
        b, w = line.b / line.weight, line.w / line.weight
        _number("capacity.line.b", b, 0.0, _REQUESTS)
        _number("capacity.line.w", w, 0.0, _SECONDS)
        # No more than chance and rounding below what one load alone would give.
        _number("capacity.line.bb", line.bb / line.weight, b * b * (1.0 - 1e-6), _REQUESTS**2)
        _number("capacity.line.bw", line.bw / line.weight, 0.0, _REQUESTS * _SECONDS)
        _age("capacity.line.age_s", line.age_s)
    for name, requests in (("told", found.told), ("lowered", found.lowered), ("tried", found.tried)):
        if requests is not None and not 0.0 < requests <= _REQUESTS:
            raise Implausible(f"capacity.{name} is {requests}")
    for name, aged, most in (
        ("arrivals", found.arrivals, _RATE),
        ("tokens", found.tokens, _RATE),
        ("held", found.held, _REQUESTS),
        ("rate", found.rate, _RATE),
        ("kv", found.kv, _REPLICAS),
        ("kv_held", found.kv_held, _REQUESTS),
    ):
        if aged is not None:
            _number(f"capacity.{name}", aged[0], 0.0, most)
            _age(f"capacity.{name}", aged[1])
    if found.kv is not None and found.kv[0] < _KV_LEAST:
        raise Implausible(f"capacity.kv is {found.kv[0]}")
    halves = ((found.kv, found.kv_held), (found.held, found.rate), (found.lowered, found.tried))
    if any((one is None) != (other is None) for one, other in halves):
        raise Implausible("capacity has one half of what it knows only as a whole")
    for name in ("age_s", "told_age_s", "tokens_age_s", "full_for_s", "steady_for_s"):
        age_s = getattr(found, name)
        if age_s is not None:
            _age(f"capacity.{name}", age_s)


def _course(found: LearnedCourse) -> None:
    _numbers("course.samples", [each[0] for each in found.samples], 0.0, OLDEST_S, MOST_SAMPLES)
    _falling("course.samples", [each[0] for each in found.samples])
    _numbers("course.samples", [each[1] for each in found.samples], 0.0, OLDEST_S, MOST_SAMPLES)
    _numbers("course.samples", [each[2] for each in found.samples], 0.0, _RATE, MOST_SAMPLES)
    if found.minute is not None:
        _age("course.minute", found.minute[0])
        _numbers("course.minute", found.minute[1:], 0.0, _RATE, 2)
    for name, value in (("level", found.level), ("before", found.before), ("trend", found.trend)):
        if value is not None:
            _number(f"course.{name}", value, -_RATE, _RATE)
    _numbers("course.increases", found.increases, -_RATE, _RATE, 5)


def _orders(found: LearnedOrders) -> None:
    for name, counts in (("wanted", found.wanted), ("said", found.said)):
        _numbers(f"orders.{name}", [each[1] for each in counts], 0.0, _REPLICAS, MOST_SAMPLES)
        _numbers(f"orders.{name}", [each[0] for each in counts], 0.0, OLDEST_S, MOST_SAMPLES)
        _falling(f"orders.{name}", [each[0] for each in counts])
    # The first one is the most that was wanted: whoever takes over goes down to that.
    _falling("orders.wanted", [float(each[1]) for each in found.wanted])
    for name, pair in (("ordered", found.ordered), ("ready", found.ready)):
        if pair is not None:
            _age(f"orders.{name}", pair[0])
            _number(f"orders.{name}", pair[1], 0.0, _REPLICAS)
    for name, age_s in (("up_age_s", found.up_age_s), ("down_age_s", found.down_age_s)):
        if age_s is not None:
            _age(f"orders.{name}", age_s)


def _number(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # neither is NaN
        raise Implausible(f"{name} is {value}")


def _numbers(name: str, values: Iterable[float], least: float, most: float, count: int) -> None:
    values = list(values)
    if len(values) > count:
        raise Implausible(f"{name} has {len(values)} entries, and {count} are kept at most")
    for value in values:
        _number(name, value, least, most)


def _age(name: str, value: float) -> None:
    _number(f"the age of {name}" if "age" not in name else name, value, 0.0, OLDEST_S)


def _falling(name: str, values: list[float]) -> None:
    if any(late > early for early, late in pairwise(values)):
        raise Implausible(f"{name} is not in order")


def thinned(counts: list[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    """Of what was wanted at most so many: neighbours become one, of the greater count and the later time, which takes
    nothing away sooner. The counts fall, the oldest first."""
    while len(counts) > MOST_SAMPLES:
        counts = [(counts[min(place + 1, len(counts) - 1)][0], counts[place][1]) for place in range(0, len(counts), 2)]
    return tuple(counts)
