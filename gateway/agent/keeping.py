"""What is to be done about one server: when it is started, when it counts as ready, and how it goes.

    waiting ──due──▶ starting ──answers──▶ ready ──leave──▶ draining ──empty, or late──▶ stopping ──ended──▶ gone
       ▲                 │                   │                                               │
       └── back-off ─────┴──── ended, or silent for too long (stopping first) ◀──── again ────┘

Plain synchronous code: what has happened and what time it is come in, what to do comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 300.0
"""As Kubernetes' CrashLoopBackOff: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/"""
JITTER: Final = 0.2
"""Servers that fell together, because a disk was full, should not load their models at the same moment again."""
STABLE_S: Final = 600.0
"""Who was ready for so long begins with the first delay again; ten minutes, as in Kubernetes."""
HOPELESS_AFTER: Final = 5
"""Failed starts in a row after which the longest delay is waited at once: what fails five times, a model that does not
fit, fails a sixth time, and each attempt reads hundreds of gigabytes."""
SILENT_S: Final = 180.0
"""Seconds without an answer after which a running process is started again. Three minutes: some engines answer nothing
while they compile a kernel or load an adapter, and the gateway has stopped sending requests long before."""
KILL_AFTER_S: Final = 30.0
"""Seconds from SIGTERM to SIGKILL."""


class Phase(StrEnum):
    WAITING = "waiting"
    """It has no process, and gets one when it is due."""
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """Nothing new is sent to it; what it has, it finishes."""
    STOPPING = "stopping"
    """It was told to end."""
    GONE = "gone"


# -- what has happened


@dataclass(frozen=True, slots=True)
class Exited:
    """Its process is over, or could not be started; `how` is the end of a sentence, `why` what its log says."""

    how: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """It takes work."""


@dataclass(frozen=True, slots=True)
class Silent:
    """It did not answer, or said that it takes no work."""

    why: str


@dataclass(frozen=True, slots=True)
class Doomed:
    """It said itself that it cannot get ready, and lives on."""

    why: str


@dataclass(frozen=True, slots=True)
class Empty:
    """Nothing of what was sent to it is under way any more."""


@dataclass(frozen=True, slots=True)
class Leave:
    """It is to finish what it has and end; with `again` it is started once more after that."""

    again: bool = False


@dataclass(frozen=True, slots=True)
class Hurry:
    """Nobody waits any longer: for requests under way, and asked once more, for an orderly end."""


Event = Exited | Answered | Silent | Doomed | Empty | Leave | Hurry


# -- what is to be done

Do = Literal["start", "terminate", "kill"]


@dataclass(frozen=True, slots=True)
class Say:
    """Something that people should read."""

    text: str


Action = Do | Say


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long things may take."""

    start_timeout_s: float
    stop_timeout_s: float


def span(seconds: float) -> str:
    """For people.

    >>> span(0.58312), span(42.51), span(2199.6)
    ('0.583 s', '42.5 s', '2200 s')
    """
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


class Keeper:
    """One server. Times are seconds of any clock that only goes forward."""

    def __init__(self, limits: Limits, now: float, uniform: Callable[[float, float], float]) -> None:
        """`uniform(a, b)`: a random number between the two. It is due at once."""
        self.limits = limits
        self.phase = Phase.WAITING
        self.since = now
        """When the phase began."""
        self.due = now
        """While it waits: when it is started."""
        self.restarts = 0
        """How often it was started again, asked-for restarts included."""
        self.failed_starts = 0
        """In a row, since it was ready last."""
        self.started_in_s: float | None = None
        """What the last start took that succeeded."""
        self.trouble = ""
        """Why it is not running, or silent; empty while all is well."""
        self._uniform = uniform
        self._delay_s = 0.0
        self._started = 0
        self._started_at = now
        self._ready_since: float | None = None
        """None: not since its process was started."""
        self._answered_at = now
        self._deadline = now
        self._leaving = False
        self._again = False
        self._why = ""
        self._killed = False

    @property
    def leaving(self) -> bool:
        """Whether it goes and does not come back."""
        return self._leaving and not self._again

    @property
    def was_ready(self) -> bool:
        """Since its process was started."""
        return self._ready_since is not None

    @property
    def running(self) -> bool:
        """Whether it has a process."""
        return self.phase in (Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.STOPPING)

    @property
    def _last_trouble(self) -> str:
        return f" ({self.trouble})" if self.trouble else ""

    def decide(self, now: float, events: Iterable[Event] = ()) -> list[Action]:
        """What to do, in this order. To be called whenever something has happened, and every second or so."""
        actions: list[Action] = []
        for event in events:
            actions += self._on(event, now)
        return actions + self._by_the_clock(now)

    def _on(self, event: Event, now: float) -> list[Action]:
        match event:
            case Exited(how, why):
                return self._exited(how, why, now)
            case Answered():
                return self._answered(now)
            case Silent(why):
                if self.phase in (Phase.STARTING, Phase.READY):
                    self.trouble = why
                return []
            case Doomed(why):
                return [Say(f"{why}; ending it"), *self._stop(now, why)] if self.phase is Phase.STARTING else []
            case Empty():
                return self._stop(now, "") if self.phase is Phase.DRAINING else []
            case Leave(again):
                return self._leave(now, again)
            case Hurry():
                return self._hurry(now)

    def _by_the_clock(self, now: float) -> list[Action]:
        match self.phase:
            case Phase.WAITING if now >= self.due:
                return self._start(now)
            case Phase.STARTING if now - self._started_at > self.limits.start_timeout_s:
                why = f"was not ready within {self.limits.start_timeout_s:g} s{self._last_trouble}"
                return [Say(f"{why}; ending it"), *self._stop(now, why)]
            case Phase.READY if now - self._answered_at > SILENT_S:
                why = f"has not answered for {SILENT_S:g} s{self._last_trouble}"
                return [Say(f"{why}; ending it"), *self._stop(now, why)]
            case Phase.DRAINING if now >= self._deadline:
                late = f"still has requests after {self.limits.stop_timeout_s:g} s, or nobody says; ending it"
                return [Say(late), *self._stop(now, "")]
            case Phase.STOPPING if now >= self._deadline and not self._killed:
                self._killed = True
                return [Say(f"has not ended within {KILL_AFTER_S:g} s; killing it"), "kill"]
        return []

    # -- each step

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self.since = now

    def _start(self, now: float) -> list[Action]:
        self._enter(Phase.STARTING, now)
        self.restarts += self._started > 0
        self._started += 1
        self._started_at = now
        self._ready_since = None
        self._leaving = self._again = self._killed = False
        self._why = self.trouble = ""
        return ["start"]

    def _answered(self, now: float) -> list[Action]:
        self._answered_at = now
        if self.phase in (Phase.STARTING, Phase.READY):
            self.trouble = ""
        if self.phase is not Phase.STARTING:
            return []
        self._ready_since = now
        self.started_in_s = now - self._started_at
        self.failed_starts = 0
        self._enter(Phase.READY, now)
        return [Say(f"ready in {span(self.started_in_s)}")]

    def _leave(self, now: float, again: bool) -> list[Action]:
        if self.phase is Phase.GONE:
            return []
        if self._leaving:
            self._again = self._again and again  # to go for good wins over a restart
            if self.phase is Phase.WAITING and not self._again:
                self._enter(Phase.GONE, now)
            return []
        self._leaving, self._again = True, again
        if self.phase is Phase.WAITING:
            if again:
                self.due = now
                self._leaving = self._again = False
            else:
                self._enter(Phase.GONE, now)
            return []
        if self.phase is Phase.STARTING:  # nothing was sent to it yet
            return self._stop(now, "")
        if self.phase is Phase.READY:
            self._enter(Phase.DRAINING, now)
            self._deadline = now + self.limits.stop_timeout_s
            return [Say("draining")]
        return []

    def _hurry(self, now: float) -> list[Action]:
        if self.phase is Phase.DRAINING:
            return self._stop(now, "")
        if self.phase is Phase.STOPPING and not self._killed:
            self._killed = True
            return ["kill"]
        return []

    def _stop(self, now: float, why: str) -> list[Action]:
        """`why`: what is wrong with it; empty where it was asked to go."""
        self._enter(Phase.STOPPING, now)
        self._why = why
        self._deadline = now + KILL_AFTER_S
        return ["terminate"]

    def _exited(self, how: str, why: str, now: float) -> list[Action]:
        if not self.running:
            return []
        lasted_s = now - self._started_at
        asked = self._leaving and self.phase in (Phase.STOPPING, Phase.DRAINING)
        if self._leaving and not self._again:
            self._enter(Phase.GONE, now)
            return [Say("stopped" if asked and not self._why else how)]
        if asked and not self._why:  # to be started again
            self._wait(now, 0.0)
            return [Say("stopped, and starts again")]
        how += f" after {span(lasted_s)}" if lasted_s >= 0.01 else ""
        how = self._why or (f"{how}: {why}" if why else how)
        delay_s = self._next_delay_s(now)
        self._wait(now, delay_s)
        self.trouble = how
        said = f"{how}; starts again in {span(delay_s)}"
        if self.failed_starts == HOPELESS_AFTER:
            said += f" ({HOPELESS_AFTER} starts in a row have failed: from now on every {LONGEST_DELAY_S / 60:g} min)"
        return [Say(said)]

    def _wait(self, now: float, delay_s: float) -> None:
        self._enter(Phase.WAITING, now)
        self.due = now + delay_s
        self._leaving = self._again = False

    def _next_delay_s(self, now: float) -> float:
        self.failed_starts = self.failed_starts + 1 if self._ready_since is None else 0
        stable = self._ready_since is not None and now - self._ready_since >= STABLE_S
        if stable or self._delay_s <= 0:
            self._delay_s = FIRST_DELAY_S
        else:
            self._delay_s = min(self._delay_s * 2, LONGEST_DELAY_S)
        if self.failed_starts >= HOPELESS_AFTER:
            self._delay_s = LONGEST_DELAY_S
        return min(self._delay_s * self._uniform(1 - JITTER, 1 + JITTER), LONGEST_DELAY_S)
