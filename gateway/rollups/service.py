"""The rollups of one gateway: what its workers count, taken every ten seconds, and every second while somebody looks.

Runs in the process that answers operators. A worker that dies takes with it what it counted since it was last
asked, ten seconds' worth at most; nothing else is lost, and nothing counts twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.config import Settings
from gateway.rollups import kept, view
from gateway.rollups.findings import Finding, Since, View, findings
from gateway.rollups.hub import Hub
from gateway.rollups.objective import budget_left, burning
from gateway.rollups.pulse import Pulse
from gateway.rollups.series import HOUR, Series
from gateway.rollups.speeds import Slow, Speeds
from gateway.rollups.tally import Tally, difference, together
from gateway.sources import Source, ask_all
from gateway.whole_files import replace_file

logger = logging.getLogger(__name__)

EVERY_S = 10.0
"""The width of the finest slot."""
LIVE_S = 1.0
OVERVIEW = "overview"
WRITTEN_EVERY_S = 60.0
RATES_S, PERCENTILES_S, MINUTE_S = 10.0, 30.0, 60.0
"""Over how long the figures of this moment are taken: rates, percentiles, and what findings count."""
LIVE_WINDOW_S = 300.0
STARTING_S = 15.0
"""A worker that has never answered is starting, for so long."""
WINDOWS = ("live", "hour", "day", "week")


class Rollups:
    """One gateway's. Belongs to one event loop."""

    def __init__(
        self, sources: Sequence[Source], settings: Callable[[], Settings], state_dir: Path | None, hub: Hub
    ) -> None:
        self.series = Series()
        self._sources = sources
        self._settings = settings
        self._state_dir = state_dir
        self._hub = hub
        self._since = Since()
        self._speeds = Speeds()
        self._last: dict[int, Pulse] = {}
        """Of each worker, what it told last."""
        self._now: list[tuple[int, Pulse | None]] = []
        self._ring: deque[tuple[float, Tally]] = deque(maxlen=int(MINUTE_S / LIVE_S) + 10)
        self._lines: deque[tuple[float, dict[str, int]]] = deque(maxlen=int(MINUTE_S / LIVE_S))
        self._findings: list[Finding] = []
        self._notes: list[str] = []
        self._began_at = self._sampled_at = time.monotonic()
        self._sampling: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._unwritten = False
        self._written_at = self._began_at
        hub.topic(OVERVIEW, LIVE_S, self.live)

    # -- its life

    @property
    def path(self) -> Path | None:
        """The file; None where nothing is kept."""
        return None if self._state_dir is None else self._state_dir / "rollups.msgpack"

    async def start(self) -> None:
        """Read what was kept, and begin to sample."""
        path = self.path
        if path is not None:
            self.series, why = await asyncio.to_thread(kept.read, path, time.time())
            self._note(why)
        self._began_at = self._sampled_at = self._written_at = time.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="rollups")

    async def aclose(self) -> None:
        """End every stream of events and the sampling; count what a worker of this process has served since; write."""
        await self._hub.aclose()
        tasks = [task for task in (self._task, self._sampling) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._sample()
        except Exception:
            logger.exception("the last sample of the rollups failed")
        await self._write()

    async def _run(self) -> None:
        while True:
            # At whole multiples, so that a sample's stretch of time is a slot.
            await asyncio.sleep(EVERY_S - time.time() % EVERY_S)
            try:
                await self.fresh(LIVE_S / 2)
                if time.monotonic() - self._written_at >= WRITTEN_EVERY_S:
                    await self._write()
            except Exception:
                logger.exception("a sample of the rollups failed")

    async def _write(self) -> None:
        self._written_at = time.monotonic()
        path = self.path
        if path is None or not self._unwritten:
            return
        try:
            await asyncio.to_thread(replace_file, path, kept.encode(self.series))
        except OSError as error:
            self._note(f"{path} cannot be written: {error.strerror or error}")
        else:
            self._unwritten = False

    def _note(self, why: str) -> None:
        """Something is wrong with the history: say it once."""
        if why and why not in self._notes:
            self._notes = [*self._notes[-2:], why]
            logger.warning("overview: %s", why)

    # -- sampling

    async def fresh(self, within_s: float) -> None:
        """Have figures that are at most so old. Who asks while workers are being asked waits for the same answers."""
        if self._sampling is not None:
            await asyncio.shield(self._sampling)
        elif not self._now or time.monotonic() - self._sampled_at >= within_s:
            self._sampling = asyncio.get_running_loop().create_task(self._sample(), name="rollups sample")
            await asyncio.shield(self._sampling)

    async def _sample(self) -> None:
        try:
            answers = await ask_all(self._sources, lambda source: source.pulse())
            self.take(answers, time.monotonic(), time.time())
        finally:
            self._sampling = None

    def take(self, answers: Sequence[tuple[int, Pulse | None]], now: float, now_unix_s: float) -> None:
        """Count what the workers have told. `now`: monotonic seconds."""
        tallies = []
        for index, pulse in answers:
            if pulse is None:
                continue
            before = self._last.get(index)
            tallies.append(difference(before, pulse))
            self._speeds.take(before, pulse, now)
            self._last[index] = pulse
        covered_s = max(0.0, now - self._sampled_at)
        tally = together(tallies, covered_s)
        self._sampled_at = now
        self.series.add(tally, now_unix_s - min(covered_s, EVERY_S) / 2)
        self._unwritten = self._unwritten or not tally.empty
        self._ring.append((now, tally))
        starting = now - self._began_at < STARTING_S
        self._now = [each for each in answers if each[1] is not None or each[0] in self._last or not starting]
        self._lines.append((now, _lines(answers)))
        self._look(now, now_unix_s)

    def _look(self, now: float, now_unix_s: float) -> None:
        """See what is wrong."""
        settings = self._settings()
        up = [pulse for _, pulse in self._now if pulse is not None]
        slow: list[Slow] = self._speeds.slow([pool for pulse in up for pool in pulse.pools], now)
        seen = View(
            self._now,
            self._minute(now),
            slow,
            [each for each in self._lines if now - each[0] <= MINUTE_S],
            [(name, len(backend.replicas)) for name, backend in settings.backends.items()],
            settings.store != "memory",
            self._notes,
            burning(settings.slo, self.series, now_unix_s),
        )
        self._findings = self._since.note(findings(seen, now_unix_s), now_unix_s)

    def _minute(self, now: float) -> Tally:
        """Of the last minute, what findings are made of."""
        found = Tally()
        for at, tally in self._ring:
            if now - at < MINUTE_S and (tally.sheds or tally.turned_away or tally.lost or tally.retries_refused):
                found.add(tally)
        return found

    def _last_s(self, seconds: float) -> Tally:
        """Of the last seconds, the newest sample at least."""
        found = Tally()
        for _, tally in reversed(self._ring):
            if found.covered_s >= seconds:
                break
            found.add(tally)
        return found

    # -- what is told

    @property
    def health(self) -> list[Finding]:
        """What is wrong, worst first."""
        return self._findings

    async def live(self) -> dict[str, Any]:
        """This moment, for the live topic."""
        await self.fresh(0.8 * LIVE_S)
        return self._moment()

    async def overview(self, window: str) -> dict[str, Any]:
        """This moment, and a window of `WINDOWS`."""
        await self.fresh(LIVE_S)
        now_unix_s = time.time()
        level = self.series.levels[HOUR.name if window == "live" else window]
        last_s = LIVE_WINDOW_S if window == "live" else None
        total = level.total(now_unix_s, last_s)
        return {
            "window": window,
            **self._moment(),
            "totals": view.figures(total),
            "series": view.series(level, now_unix_s, 0.0 if last_s is None else now_unix_s - last_s),
            "models": view.models(total),
        }

    def _moment(self) -> dict[str, Any]:
        settings, now_unix_s = self._settings(), time.time()
        up = [pulse for _, pulse in self._now if pulse is not None]
        rates = view.figures(self._last_s(RATES_S))
        slo = settings.slo
        return {
            "at_unix_s": round(now_unix_s),
            "verdict": view.verdict(self._findings, up),
            "health": self._findings,
            "now": {
                **view.figures(self._last_s(PERCENTILES_S)),
                **{name: rates[name] for name in ("requests_per_s", "errors_per_s", "error_ratio")},
                **view.state(self._now),
            },
            "slo": {
                "availability": slo.availability,
                "ttft_p95_ms": slo.ttft_p95_ms,
                "window": slo.window,
                "budget_left": budget_left(slo, self.series, now_unix_s),
            },
        }


def _lines(answers: Sequence[tuple[int, Pulse | None]]) -> dict[str, int]:
    """Requests in line by pool, of all workers."""
    found: dict[str, int] = {}
    for _, pulse in answers:
        for pool in () if pulse is None else pulse.pools:
            if pool.waiting or pool.name in found:
                found[pool.name] = found.get(pool.name, 0) + pool.waiting
    return found
