"""One worker's watch over itself: samples four times a second, and refuses what its level sheds.

Each worker samples itself, its own event loop above all. What workers share (the memory of a container) they all read,
and act alike.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.config.overload import Overload as OverloadSettings
from gateway.keys.principal import Principal
from gateway.keys.records import PRIORITY_CLASSES
from gateway.limits.classes import HEADER, band_of
from gateway.overload.descriptors import Descriptors
from gateway.overload.errors import SHED
from gateway.overload.levels import LAG_FOR_S, RESOURCES, Cause, Levels, Reading, Thresholds
from gateway.overload.memory import Memory, MemoryUse, bytes_for_bodies
from gateway.store.places import Band

logger = logging.getLogger(__name__)

EVERY_S = 0.25
CLASS_HEADER = HEADER.encode()
STANDARD = "standard"
"""Class of requests without a key."""
CLOSING_LEVEL = 2
"""From here on replies close their connections: clients come back through a load balancer, which has others."""
FIRST_SHED = (len(Band), Band.SHEDDABLE, Band.BATCH, Band.STANDARD)
"""By level: the most urgent class that is shed."""
RETRY_AFTER_S = (1.0, 3.0)
"""Drawn from in between, so that those who were shed together do not come back together."""
_WORDS = {
    Cause.MEMORY: "memory",
    Cause.DESCRIPTORS: "open files",
    Cause.BYTES: "room for request bodies",
    Cause.LOOP: "time",
}


class Budget(Protocol):
    """The bound on request bytes in memory."""

    limit_bytes: int
    used_bytes: int


class Overload:
    """The worker's level, kept up by a timer between `start` and `close`; 0 while it is off."""

    def __init__(self, settings: OverloadSettings, budget: Budget, rng: Random) -> None:
        self.level = 0
        """0 to 3, read by every request."""
        self.closing = False
        """Replies close their connections."""
        self.max_connections: int | None = None
        """Ceiling on clients where there are too few descriptors for what is configured."""
        self.reading = Reading()
        self._settings = settings
        self._budget = budget
        self._most_bytes = budget.limit_bytes
        """As configured; `budget` has less where memory is short."""
        self._largest_bytes = 0
        self._workers = 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rng = rng
        self._levels = Levels()
        self._thresholds = _thresholds(settings)
        self._unsent: Callable[[], int] = int
        self._memory: Memory | None = None
        self._memory_use = MemoryUse(0, 0)
        self._descriptors: Descriptors | None = None
        self._handle: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._shed: dict[tuple[Band, Cause], int] = {}

    # -- what requests ask

    def check(self, band: Band) -> None:
        """Raises `Overloaded` when requests of this class are refused at the moment."""
        if self.level and band >= FIRST_SHED[self.level]:
            cause = self._levels.cause
            key = (band, cause)
            self._shed[key] = self._shed.get(key, 0) + 1
            raise SHED[cause](
                f"This gateway is short of {_WORDS[cause]} and refuses requests of this class for a moment.",
                retry_after_s=self._rng.uniform(*RETRY_AFTER_S),
            )

    def check_unread(self, caller: Principal, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The same before the body is read, of which the class could only be lowered. Raises `InvalidRequest` for a
        class in the headers that does not exist."""
        asked = next((value for name, value in headers if name == CLASS_HEADER), None)
        self.check(band_of(STANDARD if caller.key is None else caller.key.priority_class, None, asked))

    # -- its life

    def start(self, *, descriptors: int, unsent: Callable[[], int], largest_bytes: int = 0, workers: int = 1) -> None:
        """Begin to sample, in the running event loop.

        `descriptors`: how many may be open; `unsent`: bytes that slow clients have not fetched; `largest_bytes`: of one
        request body; `workers`: how many of them share a cgroup.
        """
        self._descriptors = Descriptors(descriptors, time.perf_counter)
        self._unsent = unsent
        self._loop = asyncio.get_running_loop()
        self._largest_bytes, self._workers = largest_bytes, workers
        self._open_memory()
        self._arm()

    def reload(self, settings: OverloadSettings) -> None:
        """Thresholds hold from the next sample on."""
        before, self._settings = self._settings, settings
        self._thresholds = _thresholds(settings)
        if self._memory is not None and (before.max_memory_bytes, before.enabled) != (
            settings.max_memory_bytes,
            settings.enabled,
        ):
            self._memory.close()
            self._open_memory()

    def close(self) -> None:
        """Stop sampling. What is shed stays shed: the worker is about to end."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _open_memory(self) -> None:
        """Also fits the request bytes into it: a large body needs several times its size while it is parsed, and four
        looks a second come too late for that."""
        self._memory = Memory(self._settings.max_memory_bytes)
        use = self._memory.read()
        budget, most = self._budget, self._most_bytes
        if not self._settings.enabled or use.limit == 0:
            budget.limit_bytes = most
            return
        workers = self._workers if self._memory.shared else 1
        fitting = bytes_for_bodies(use, self._settings.critical_only_at, self._largest_bytes, workers)
        budget.limit_bytes = min(most, fitting)
        if budget.limit_bytes < most:
            logger.info(
                "this worker holds %d MiB of request bodies at once, not %d (server.max_in_flight_bytes): %d of %d MiB "
                "of memory are in use (%s)",
                budget.limit_bytes >> 20,
                most >> 20,
                use.used >> 20,
                use.limit >> 20,
                self._memory.source,
            )

    def _arm(self) -> None:
        assert self._loop is not None
        self._due_at = time.monotonic() + EVERY_S
        self._handle = self._loop.call_later(EVERY_S, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        try:
            self.sample(now, max(0.0, now - self._due_at))
        except Exception:
            logger.exception("a sample of what the gateway uses failed")
        self._arm()

    def sample(self, now: float, lag_s: float) -> None:
        """Read everything, and act on it."""
        self.reading = self._read(lag_s)
        if self._settings.enabled:
            self._move(self._levels.after(self.reading, self._thresholds, now))
        elif self.level:
            self._levels = Levels()
            self._move(0)

    def _read(self, lag_s: float) -> Reading:
        if self._memory is not None:
            self._memory_use = self._memory.read()
        budget = self._budget
        return Reading(
            memory=self._memory_use.share,
            descriptors=0.0 if self._descriptors is None else self._descriptors.share,
            held_bytes=(budget.used_bytes + self._unsent()) / budget.limit_bytes,
            lag_s=lag_s,
        )

    def _move(self, level: int) -> None:
        before = self.level
        if level == before:
            return
        self.level, self.closing = level, level >= CLOSING_LEVEL
        if level:
            spared = "only critical requests are" if level == 3 else ("batch and " * (level == 2)) + "sheddable are not"
            falling = "less pressed now, " if level < before else ""
            logger.warning(
                "overload level %d (was %d): %s%s; %s served", level, before, falling, self._figure(), spared
            )
        else:
            logger.warning("overload is over (level was %d): every class is served", before)

    def _figure(self) -> str:
        """What is short, in figures."""
        cause, reading = self._levels.cause, self.reading
        match cause:
            case Cause.MEMORY:
                use = self._memory_use
                source = "" if self._memory is None else f" ({self._memory.source})"
                return f"memory is at {use.share:.1%}: {use.used >> 20} of {use.limit >> 20} MiB{source}"
            case Cause.DESCRIPTORS:
                limit = 0 if self._descriptors is None else self._descriptors.limit
                return f"open files are at {reading.descriptors:.1%} of {limit} (RLIMIT_NOFILE)"
            case Cause.BYTES:
                return f"request bytes held are at {reading.held_bytes:.1%} of {self._budget.limit_bytes >> 20} MiB"
        return f"the event loop has been late for {LAG_FOR_S:g} s, now by {reading.lag_s * 1000:.0f} ms"

    # -- what is told of it

    @property
    def cause(self) -> Cause | None:
        """What is short; None at level 0."""
        return self._levels.cause if self.level else None

    @property
    def shed(self) -> Mapping[tuple[Band, Cause], int]:
        """Requests refused so that others could be served, by their class and what was short."""
        return self._shed

    def state(self) -> dict[str, Any]:
        """For operators, as JSON."""
        reading = self.reading
        return {
            "level": self.level,
            "cause": self._levels.cause.value if self.level else None,
            "pressure": {cause.value: round(reading.share(cause), 4) for cause in RESOURCES},
            "loop_lag_ms": round(reading.lag_s * 1000, 1),
            "memory_source": None if self._memory is None else self._memory.source,
            "memory_bytes": self._memory_use.used,
            "memory_limit_bytes": self._memory_use.limit,
            "max_connections": self.max_connections,
        }

    def families(self) -> Iterator[Metric]:
        reading = self.reading
        yield GaugeMetricFamily("tidegate_overload_level", "0: everything is served; 3: critical only.", self.level)
        pressure = GaugeMetricFamily(
            "tidegate_overload_pressure_ratio", "Use of what a worker could run out of.", labels=["resource"]
        )
        for cause in RESOURCES:
            pressure.add_metric([cause.value], reading.share(cause))
        yield pressure
        yield GaugeMetricFamily("tidegate_loop_lag_seconds", "How late the event loop called a timer.", reading.lag_s)
        shed = CounterMetricFamily(
            "tidegate_overload_shed",
            "Requests that were refused so that others could be served.",
            labels=["class", "cause"],
        )
        for (band, cause), count in list(self._shed.items()):
            shed.add_metric([PRIORITY_CLASSES[band], cause.value], count)
        yield shed


def _thresholds(settings: OverloadSettings) -> Thresholds:
    shares = (settings.shed_sheddable_at, settings.shed_batch_at, settings.critical_only_at)
    return Thresholds(shares, settings.max_loop_lag_ms / 1000)
