"""How far away each replica is: milliseconds of a round trip, in the same unit as everything else a policy weighs.

A start value comes from the configured matrix of latencies between regions; measured round trips take its place. With
that, "the nearest replica that is not colder or busier by more than it is nearer" needs no rule of its own: it is the
lowest sum (`routing.policies.cost`). GORGO (arXiv 2602.11688) weighs the round trip in the same way.

What is measured is how long connections take to open. Such a time is a round trip plus whatever delayed it: a busy
event loop, a lost packet, a slow resolver, and never less than a round trip. So the estimate follows shorter times
quickly and longer ones slowly, and one that is far too long counts as a few times the present estimate only. With
`a` = 0.5 downwards and 0.1 upwards:

    80 configured, measured 20 20 20        50  35  27
    20 measured,   measured 20 1020 20      20  26  23        (1020: a lost SYN; it counts as 4 * 20)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from routing.types import Replica

UNKNOWN_MS = 100.0
"""Between regions of which nothing is said: about across an ocean, so that a replica nobody knows the way to is not
taken for a near one."""
FASTER, SLOWER = 0.5, 0.1
"""Weight of a measured time below and above the estimate."""
_MOST_TIMES, _MOST_MS = 4.0, 10.0
"""A measured time counts as at most so many times the estimate, or as this where that is more."""

Matrix = Mapping[str, Mapping[str, float]]


def latency_ms(matrix: Matrix, here: str | None, there: str | None, unknown_ms: float = UNKNOWN_MS) -> float:
    """Round trip between two regions. What is given one way holds both ways; 0 where either is not said, or both are
    the same."""
    if here is None or there is None:
        return 0.0
    for start, end in ((here, there), (there, here)):
        row = matrix.get(start)
        if row is not None and end in row:
            return row[end]
    return 0.0 if here == there else unknown_ms


def is_given(matrix: Matrix, here: str, there: str) -> bool:
    """Whether the matrix says how far these regions are from each other, or they are the same."""
    return here == there or there in matrix.get(here, {}) or here in matrix.get(there, {})


class Distances:
    """Round trips to replicas, as seen from one place. Keeps `Speed.network_ms`, and with it `rtt_ms`, up to date."""

    __slots__ = ("_here", "_matrix", "_measured", "_regions")

    def __init__(self, here: str | None = None, matrix: Matrix | None = None) -> None:
        """`here`: the gateway's region; None leaves everything to what is measured."""
        self._here = here
        self._matrix: Matrix = matrix or {}
        self._measured: dict[str, float] = {}
        """By `Replica.identity`, so that it outlasts a reload."""
        self._regions: dict[str, float] = {}
        """The same of whole regions: where a replica that nobody has called yet starts."""

    def configure(self, here: str | None, matrix: Matrix) -> None:
        """Other start values from now on; measured times stay, unless this gateway has moved."""
        if here != self._here:
            self._measured.clear()
            self._regions.clear()
        self._here = here
        self._matrix = matrix

    def place(self, replicas: Iterable[Replica]) -> None:
        """Give each its start value, or what is known of it."""
        for replica in replicas:
            known = self._measured.get(replica.identity)
            _set(replica, self.expected_ms(replica.region) if known is None else known)

    def expected_ms(self, region: str | None) -> float:
        """Round trip to a replica of that region of which nothing else is known."""
        known = None if region is None else self._regions.get(region)
        return latency_ms(self._matrix, self._here, region) if known is None else known

    def observe(self, replica: Replica, rtt_ms: float) -> None:
        """A round trip to the replica was measured, in milliseconds. What is below 0 or no number is passed over."""
        if not 0.0 <= rtt_ms < float("inf"):
            return
        name, region = replica.identity, replica.region
        self._measured[name] = estimate = self._follow(self._measured.get(name), region, rtt_ms)
        if region is not None:
            self._regions[region] = self._follow(self._regions.get(region), region, rtt_ms)
        _set(replica, estimate)

    def _follow(self, estimate: float | None, region: str | None, measured: float) -> float:
        if estimate is None:
            if self._here is None or region is None:
                return measured  # nothing was said of how far it is
            estimate = self.expected_ms(region)
        if measured < estimate:
            return estimate + FASTER * (measured - estimate)
        return estimate + SLOWER * (min(measured, max(_MOST_TIMES * estimate, _MOST_MS)) - estimate)

    def forget(self, replicas: Iterable[Replica]) -> None:
        """They are gone."""
        for replica in replicas:
            self._measured.pop(replica.identity, None)


def _set(replica: Replica, rtt_ms: float) -> None:
    """What is paid once per request beyond the way there, as answers have shown it, stays as it is."""
    speed = replica.speed
    change = rtt_ms - speed.network_ms
    if abs(change) > 0.01:
        speed.network_ms = rtt_ms
        speed.rtt_ms = max(rtt_ms, speed.rtt_ms + change)
        if speed.version:  # 0: nothing is learned of the replica yet
            speed.version += 1
