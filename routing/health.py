"""Whether a replica may be given new work, judged from what its requests showed first and from probes second.

Five marks are kept per replica, each with its own way in and out; none of them outlasts a replica that works:

| mark         | in                                            | out                                               |
|--------------|-----------------------------------------------|---------------------------------------------------|
| cooling_down | a refused connection, of a request or a probe | 0.5 s, doubling to 10 s; any answer; a good probe |
| ejected      | 5 failures in a row, or half of 10 in 30 s    | 10 s per ejection in a row, then 3 good trials    |
| not_ready    | a probe that was answered with "no"           | a probe that was answered with "yes"              |
| unresponsive | 3 unanswered probes and no sign of life since | any sign of life; an answered probe               |
| stalled      | work in flight and no progress for 30 s       | any progress; idle and probed; idle for 30 s      |

Three more say nothing bad of it, and hold it back all the same:

| held back    | in                                            | out                                               |
|--------------|-----------------------------------------------|---------------------------------------------------|
| joining      | it is new to a pool at work                   | the first probe that is answered with "yes"       |
| warming      | then; or it has begun anew with an empty cache| it is told to be warm, or the time for that ends  |
| cordoned     | an operator wants no new prompts there        | the operator's word                               |

Passive evidence wins over probes, since an engine that is busy with a long prefill may not find the time to answer
one, while its streams go on. A client error (4xx) shows that somebody is there, and nothing else; "too busy" (429,
529, a full queue) is load. A replica that comes, or comes back, begins with a tenth of its share (slow start, Envoy's
and HAProxy's), except at the gateway's own start, when all are new.

What an attempt shows comes in by `routing.observing`. The cool-down is in `routing.cooldown`, ejection and the way back
from it in `routing.ejection`.

Nothing here reads a clock: `now` is seconds of any monotonic clock, and never goes back.
"""

from __future__ import annotations

from random import Random

from routing.cooldown import FIRST_COOLDOWN_S, MAX_COOLDOWN_S, Cooldown
from routing.credential import Credential, Credentials
from routing.ejection import Ejection, Rules
from routing.evidence import Change, Evidence, HealthState

__all__ = [
    "FIRST_COOLDOWN_S",
    "MAX_COOLDOWN_S",
    "Change",
    "Cooldown",
    "Credential",
    "Credentials",
    "Evidence",
    "Health",
    "HealthState",
    "Rules",
]

CORDONED = "cordoned"
LONG_AWAY_S = 5.0
"""Refused or not ready for longer than this, it has probably been restarted with an empty cache: slow start."""
ALIVE_S = 5.0
"""So long after its last sign of life no number of unanswered probes makes a replica unresponsive."""
_NEVER = float("-inf")


class Health:
    """One replica's marks, as one worker sees them. Queries change nothing.

    `rng` draws the jitter of ejections; without one there is none. `rules` may be replaced at any time.
    """

    __slots__ = (
        "_alive_at",
        "_away_since",
        "_busy_since",
        "_engine_progressed_at",
        "_idle_since",
        "_joining",
        "_not_ready",
        "_probe_failed_since",
        "_probe_failures",
        "_probed_at",
        "_stalled_at",
        "_warm_s",
        "_warm_until",
        "calm",
        "cooldown",
        "cordoned",
        "ejection",
        "progressed_at",
        "rules",
        "warm_from",
        "window",
    )

    def __init__(self, rules: Rules | None = None, rng: Random | None = None) -> None:
        self.rules = Rules() if rules is None else rules
        self.cooldown = Cooldown()
        self.ejection = Ejection(rng)
        self.window = self.ejection.window
        self.progressed_at = _NEVER
        """When bytes of an answer last came. Whoever relays them writes it."""
        self._alive_at = _NEVER
        """When it last answered anything at all, if only with a refusal."""
        self._away_since: float | None = None
        """Refused or not ready since."""
        self._not_ready = False
        self._probed_at = _NEVER
        self._probe_failures = 0
        self._probe_failed_since = 0.0
        self._busy_since: float | None = None
        self._idle_since: float | None = None
        self._engine_progressed_at = _NEVER
        self._stalled_at: float | None = None
        self.warm_from: float | None = None
        """Start of the last slow start, to come while it is warming; None when there was none, or long ago."""
        self.cordoned = False
        """An operator wants no new prompts there; `cordon` sets it."""
        self._joining = False
        self._warm_s = 0.0
        """How long it may be warmed once it was found ready."""
        self._warm_until = _NEVER
        self.calm = True
        """Read only. No mark and no suspicion besides the cool-down: the state that costs least to look at."""

    # What routing asks.

    def unavailable_reason(self, now: float) -> str | None:
        """The mark that speaks against new work at `now`, or None.

        A half-open replica whose trial runs here and has room for a request has no reason against it.
        """
        if now < self.cooldown.until:
            return "cooling_down"
        if self.calm:
            return None
        reason = self.ejection.reason(now)
        if reason is not None:
            return reason
        if self._not_ready:
            return "not_ready"
        if self._unresponsive(now):
            return "unresponsive"
        if self._stalled():
            return "stalled"
        if self._joining:
            return "joining"
        if now < self._warm_until:
            return "warming"
        return CORDONED if self.cordoned else None

    def state(self, now: float) -> HealthState:
        reason = self.unavailable_reason(now)
        if reason is not None and reason != CORDONED:
            return HealthState(reason)
        if self.ejection.out:
            return HealthState.HALF_OPEN
        return HealthState.WARMING if self.share(now) < 1.0 else HealthState.HEALTHY

    def share(self, now: float) -> float:
        """Part of its weight that it should be given, `slow_start_floor` to 1, linear in time since its return.

        A trial has the full share: what holds it back is how many requests it may have at once.
        """
        if self.warm_from is None:
            return 1.0
        rules = self.rules
        elapsed_s = max(0.0, now - self.warm_from)
        if elapsed_s >= rules.slow_start_s:
            return 1.0
        return rules.slow_start_floor + (1.0 - rules.slow_start_floor) * elapsed_s / rules.slow_start_s

    @property
    def out(self) -> bool:
        """Ejected or half-open: what the ceiling counts."""
        return self.ejection.out

    # A replica that is new, or begins anew.

    def join(self, now: float, *, until_ready: bool, warm_s: float) -> None:
        """It is new to a pool that is at work: it gets nothing while there are others, until it is known to be ready
        and warm, and a small share at first.

        `until_ready`: probes will say when it is ready; else it is taken to be. `warm_s`: how long it may then be
        warmed, 0: not at all.
        """
        self._warm_s = warm_s
        self._joining = until_ready
        if not until_ready:
            self._begin_warming(now)
        self._settle()

    def begin_anew(self, now: float, warm_s: float) -> None:
        """It has restarted, and its cache is empty: it is warmed for so long. Nothing changes where that is 0."""
        if warm_s > 0:
            self._warm_s = warm_s
            if not self._joining:
                self._begin_warming(now)
            self._settle()

    def warming(self, now: float) -> bool:
        """Whether it is ready and held back to be warmed."""
        return not self._joining and now < self._warm_until

    def warmed(self, now: float) -> None:
        """It has what it needs: slow start begins. Harmless for one that was not held back."""
        if self._joining or now < self._warm_until:
            self._joining = False
            self._warm_until = _NEVER
            self.warm_from = now
            self._settle()

    def cordon(self, cordoned: bool) -> None:
        self.cordoned = cordoned
        self._settle()

    def _begin_warming(self, now: float) -> None:
        self._joining = False
        self.warm_from = now + self._warm_s
        self._warm_until = self.warm_from if self._warm_s > 0 else _NEVER

    # What requests show. `routing.observing.observe` is the way in.

    def answered(self, now: float) -> Change | None:
        self.progressed_at = now
        recovered = self.ejection.answered(self.rules, now)
        if recovered:
            self.warm_from = now
        elif self.warm_from is not None and now - self.warm_from >= self.rules.slow_start_s:
            self.warm_from = None
        if now >= self._warm_until:
            self._warm_until = _NEVER
        self.alive(now)
        if self._joining:  # asked for want of any other: it is ready, whatever the probes will say
            self._begin_warming(now)
        return Change.RECOVERED if recovered else None

    def alive(self, now: float) -> None:
        """It answered, if only with a refusal: it can be reached."""
        self._alive_at = now
        if self.cooldown.failures:
            self.cooldown.succeeded()
        if not self._not_ready:
            self._returned(now)
        self._settle()

    def failed(self, now: float, room: bool) -> Change | None:
        """A failure, with or without room for one more below the ceiling."""
        change: Change | None = None
        if self.ejection.failed(self.rules, now):
            if room:
                self._eject(now)
                change = Change.EJECTED
            elif not self.ejection.spared:
                self.ejection.spared = True
                change = Change.SPARED
        self._settle()
        return change

    def unreachable(self, now: float) -> Change | None:
        """A connection was refused. Ends a trial like any failure; otherwise the cool-down is answer enough."""
        change = self._refused(now)
        if self.ejection.out and self.ejection.failed(self.rules, now):
            self._eject(now)
            change = Change.EJECTED
        self._settle()
        return change

    def _refused(self, now: float) -> Change | None:
        """Leave it alone for a moment. A refused probe is no failed trial: an ejection would outlast the absence."""
        begins = not self.cooldown.active(now)
        self.cooldown.failed(now)
        if self._away_since is None:
            self._away_since = now
        self._settle()
        return Change.UNREACHABLE if begins else None

    def _eject(self, now: float) -> None:
        self.ejection.eject(self.rules, now)
        self.warm_from = None

    # What probes show.

    def probed(self, ready: bool, now: float) -> None:
        """A probe was answered. "Not ready" excludes at once, "ready" ends that, and a cool-down too."""
        self._probe_failures = 0
        self._probed_at = self._alive_at = now
        self._not_ready = not ready
        if ready:
            self.cooldown.succeeded()
            self._returned(now)
            if self._joining:
                self._begin_warming(now)
        elif self._away_since is None:
            self._away_since = now
        self._end_idle_stall(now)
        self._settle()

    def probe_failed(self, refused: bool, now: float) -> Change | None:
        """A probe got no answer. `refused`: there is no process to give one, which is as hard as evidence gets.

        Anything else (a time-out, a broken answer) is counted, and only while nothing else shows that it lives:
        a sign of life since the first of them starts the count anew.
        """
        if refused:
            return self._refused(now)
        if self._probe_failures and self._last_life() >= self._probe_failed_since:
            self._probe_failures = 0
        if not self._probe_failures:
            self._probe_failed_since = now
        self._probe_failures += 1
        self._settle()
        return None

    def forget_probes(self) -> None:
        """Nobody probes it any more, so that nothing could take back what the last probes showed."""
        self._probe_failures = 0
        self._joining = False
        if self._not_ready:
            self._not_ready = False
            self._away_since = None
        self._settle()

    def _unresponsive(self, now: float) -> bool:
        if self._probe_failures < self.rules.probe_failures:
            return False
        life = self._last_life()
        return life < self._probe_failed_since and now - life >= ALIVE_S

    def silent(self, now: float) -> bool:
        """Whether it has been unresponsive for so long that what waits there waits in vain: `stall_s` without a sign of
        life, three probes unanswered among it. A whole answer shows no progress by itself."""
        return self._unresponsive(now) and now - self._last_life() >= self.rules.stall_s

    def _last_life(self) -> float:
        return max(self.progressed_at, self._alive_at, self._engine_progressed_at)

    # What the watchdog sees.

    def checked_progress(self, in_flight: int, engine_progressed: bool, now: float) -> None:
        """Look for progress; to be called about once a second.

        `in_flight`: requests whose silence would mean something. A whole answer (no stream) is silent until it is
        there, so on an engine whose counters cannot be read, count streams only.
        `engine_progressed`: its own token counters have moved since the last call, as they do in a long prefill.
        """
        if engine_progressed:
            self._engine_progressed_at = now
        if in_flight <= 0:
            self._busy_since = None
            if self._idle_since is None:
                self._idle_since = now
            self._end_idle_stall(now)
        else:
            self._idle_since = None
            if self._busy_since is None:
                self._busy_since = now
            quiet_since = max(self._busy_since, self.progressed_at, self._engine_progressed_at)
            if now - quiet_since < self.rules.stall_s:
                self._stalled_at = None
            elif self._stalled_at is None:
                self._stalled_at = now
        self._settle()

    def _stalled(self) -> bool:
        if self._stalled_at is None:
            return False
        return max(self.progressed_at, self._engine_progressed_at) < self._stalled_at

    def _end_idle_stall(self, now: float) -> None:
        """What stalled is gone: a probe that was answered since, or as much time again, gives it another chance."""
        if self._stalled_at is None or self._idle_since is None:
            return
        if self._probed_at > self._stalled_at or now - self._idle_since >= self.rules.stall_s:
            self._stalled_at = None

    # What other workers, and the store between them, say.

    def begin_trial(self, now: float) -> None:
        """This worker is the one that may try an ejected replica. Harmless when there is nothing to try."""
        self.ejection.begin_trial(self.rules, now)

    def hint_ejected(self, observer: str, until: float, now: float) -> bool:
        """Another worker (never this one) has ejected it; True when this one should too, see `heed_ejection`."""
        cooldown = self.cooldown
        suspected = cooldown.failures > 0 and now < cooldown.until + self.rules.window_s
        return self.ejection.hinted(self.rules, observer, until, suspected, now)

    def hint_recovered(self, now: float) -> None:
        """Another worker's trial went well: in again, with slow start."""
        self.ejection.forget_hints()
        if self.ejection.out:
            self.ejection.recover(now)
            self.warm_from = now
            self._settle()

    def adopt_ejection(self, until: float, now: float) -> None:
        """Be out until then, because others say so."""
        self.ejection.adopt(self.rules, until, now)
        self.warm_from = None
        self._settle()

    # Requests of a trial, counted by `Reservation`.

    def enter_trial(self) -> int:
        """A request begins; the trial it belongs to, to be handed back to `leave_trial`, or 0."""
        if self.calm or not self.ejection.out:
            return 0
        self.ejection.trial_in_flight += 1
        return self.ejection.trial

    def leave_trial(self, trial: int) -> None:
        """The request is over, however it ended."""
        if trial == self.ejection.trial and self.ejection.trial_in_flight:
            self.ejection.trial_in_flight -= 1

    def _returned(self, now: float) -> None:
        if self._away_since is None:
            return
        if now - self._away_since >= LONG_AWAY_S and not self.ejection.out:
            self.warm_from = now
        self._away_since = None

    def _settle(self) -> None:
        self.calm = not (
            self.ejection.out
            or self.ejection.consecutive
            or self._not_ready
            or self._probe_failures
            or self._stalled_at is not None
            or self._joining
            or self._warm_until > _NEVER
            or self.cordoned
        )
