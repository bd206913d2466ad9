"""When a replica that fails is taken out of rotation, for how long, and how it is let back in.

Three ideas, each with its origin:

- Ejection is Envoy's outlier detection (`envoyproxy.io`, architecture overview, "Outlier detection"): so many
  failures in a row, or too large a share of failures in a window; out for a base time multiplied by the number of
  ejections in a row; never more than a share of the pool. Envoy wants 5 hosts and 100 requests per interval before it
  looks at a ratio, which a pool of four GPUs never reaches: here 10 samples in 30 s will do. Envoy adds no jitter by
  default; ejections of one cause would then end together, so here it is 20 %.
- Counting failures *in a row* beside the ratio is Finagle's failure accrual (`ConsecutiveFailuresPolicy`, 5).
- The way back is a circuit breaker's half-open state with TCP's slow start: one real request at a time, then two,
  then four, doubling with each success.

Worked example with the defaults: five failures eject for 8 to 12 s. A trial fails: 16 to 24 s. The next one succeeds
three times: back, at a tenth of its share (`routing.health`). It fails again 25 s later: two healthy intervals of 10 s
have passed, so the row of 2 has shrunk to 0, and it is out for 8 to 12 s again.

This module knows one replica; the ceiling over the pool is applied by `routing.health.observe`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import floor
from random import Random

ALONE_AFTER_S = 60.0
"""How long after its ejection a worker waits to be given the trial before it tries the replica itself.

Without this, a replica would stay out for every worker while the one that holds the trial sees no traffic.
"""
_BUCKETS = 6
_MAX_DOUBLINGS = 10


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers behind a replica's health. Durations in seconds, shares 0 to 1."""

    consecutive: int = 5
    """Failures in a row that eject (Envoy `consecutive_5xx`, Finagle failure accrual: both 5)."""
    ratio: float = 0.5
    """Share of failures in the window that ejects."""
    ratio_samples: int = 10
    """Samples in the window below which the share says nothing."""
    window_s: float = 30.0
    """Nothing older counts; measured in sixths, so it is between 5/6 of this and this."""
    ejection_s: float = 10.0
    """Time out, times the number of ejections in a row; so much health takes one off that number again. Above 0."""
    max_ejection_s: float = 300.0
    """Most that the product may become, before jitter (Envoy `max_ejection_time`: 300)."""
    jitter: float = 0.2
    """The time out is drawn from 1 ± this."""
    ejected_share: float = 0.5
    """Most of the pool, rounded down, that may be out at once; never the last one whatever it says."""
    trial_successes: int = 3
    """Answers that end the half-open state."""
    slow_start_s: float = 60.0
    """How long the share of a returned replica climbs to its full value; 0 turns slow start off."""
    slow_start_floor: float = 0.1
    """The share it starts with (Envoy `min_weight_percent`: 10 %)."""
    stall_s: float = 30.0
    """Silence with work in flight after which a replica counts as stalled."""
    probe_failures: int = 3
    """Unanswered probes in a row after which a silent replica counts as unresponsive."""

    def ceiling(self, replicas: int) -> int:
        """How many of so many replicas may be out at once. 1 → 0, 2 → 1, 3 → 1, 4 → 2 with a share of a half."""
        return max(0, min(floor(self.ejected_share * replicas), replicas - 1))


class Window:
    """Answers and failures of the last `window_s` seconds, in buckets: its size does not depend on the traffic."""

    __slots__ = ("_past", "answered", "ends", "failed")

    def __init__(self) -> None:
        self.answered = 0
        """In the current bucket."""
        self.failed = 0
        self.ends = float("-inf")
        """When the current bucket is over; whoever counts calls `roll` first when that has passed."""
        self._past: deque[tuple[float, int, int]] = deque(maxlen=_BUCKETS)

    def roll(self, now: float, window_s: float) -> None:
        """Make the current bucket the one that `now` lies in."""
        if now < self.ends:
            return
        if self.answered or self.failed:
            self._past.append((self.ends, self.answered, self.failed))
        width_s = window_s / _BUCKETS
        self.answered = self.failed = 0
        self.ends = (floor(now / width_s) + 1) * width_s

    def totals(self, now: float, window_s: float) -> tuple[int, int]:
        """Answers and failures, none of them older than the window."""
        self.roll(now, window_s)
        answered, failed = self.answered, self.failed
        oldest_end = now - window_s + window_s / _BUCKETS
        for ends, past_answered, past_failed in self._past:
            if ends >= oldest_end:
                answered += past_answered
                failed += past_failed
        return answered, failed

    def clear(self) -> None:
        self.answered = self.failed = 0
        self._past.clear()


class Ejection:
    """One replica's record of failures, and whether it is out because of it.

    `out` covers both halves: ejected until `until`, half-open afterwards. In the half-open state it is closed to
    traffic until this worker is given the trial (`begin_trial`), or for `ALONE_AFTER_S` at most.
    """

    __slots__ = (
        "_healthy_since",
        "_hints",
        "_moved_at",
        "_opens_at",
        "_rng",
        "_successes",
        "consecutive",
        "failed_at",
        "in_a_row",
        "out",
        "spared",
        "trial",
        "trial_in_flight",
        "until",
        "window",
    )

    def __init__(self, rng: Random | None) -> None:
        self._rng = rng
        self.window = Window()
        self.consecutive = 0
        """Failures since the last answer."""
        self.failed_at = float("-inf")
        self.out = False
        self.until = 0.0
        """End of the last ejection."""
        self.in_a_row = 0
        """Ejections without enough health in between; see `_eject`."""
        self.spared = False
        """The rules say eject, the ceiling forbade it, and that was reported."""
        self.trial = 0
        """Changes whenever the places of a trial are freed, so that a request gives back only one it still holds."""
        self.trial_in_flight = 0
        self._healthy_since = float("-inf")
        self._opens_at = 0.0
        self._moved_at = 0.0
        self._successes = 0
        self._hints: dict[str, float] = {}

    def reason(self, now: float) -> str | None:
        """`ejected` or `half_open`; None when it is in, or when the trial has room for one more request."""
        if not self.out:
            return None
        if now < self.until:
            return "ejected"
        if now >= self._opens_at and self.trial_in_flight < 2 ** min(self._successes, _MAX_DOUBLINGS):
            return None
        return "half_open"

    def answered(self, rules: Rules, now: float) -> bool:
        """Count an answer; True when it completes the trial.

        An answer counts towards the way back as soon as the time is over, also one to a request that was sent in
        panic or before the ejection: what it shows is the same. Before that time it changes nothing.
        """
        self.consecutive = 0
        if not self.out:
            self.window.roll(now, rules.window_s)
            self.window.answered += 1
            return False
        if now < self.until:
            return False
        self._successes += 1
        self._moved_at = now
        if self._successes < rules.trial_successes:
            return False
        self.recover(now)
        return True

    def failed(self, rules: Rules, now: float) -> bool:
        """Count a failure; True when it should be ejected for it, which `eject` or `spare` then settles.

        While it is out and no trial is open, failures are those of requests that were already under way, or sent
        in panic: one dead process is one event, and they do not lengthen the time.
        """
        if self.out:
            return now >= self._opens_at
        self.consecutive += 1
        self.failed_at = now
        answered, failed = self.window.totals(now, rules.window_s)
        self.window.failed += 1
        samples = answered + failed + 1
        due = (
            self.consecutive >= rules.consecutive
            or (samples >= rules.ratio_samples and failed + 1 >= rules.ratio * samples)
            or bool(self._live_hints(now))
        )
        if not due:
            self.spared = False
        return due

    def eject(self, rules: Rules, now: float) -> None:
        """Take it out: for its own time, or for as long as others have said when their word tipped the balance."""
        hints = self._live_hints(now)
        if hints and self.consecutive < rules.consecutive and not self.out:
            self.adopt(rules, max(hints.values()), now)
            return
        self._count_ejection(rules, now)
        time_s = min(rules.max_ejection_s, rules.ejection_s * self.in_a_row)
        jitter = 0.0 if self._rng is None else rules.jitter * (2.0 * self._rng.random() - 1.0)
        self._leave(now + time_s * (1.0 + jitter))

    def adopt(self, rules: Rules, until: float, now: float) -> None:
        """Take it out until the time somebody else named, within what the own rules could have come to."""
        self._count_ejection(rules, now)
        self._leave(min(until, now + rules.max_ejection_s * (1.0 + rules.jitter)))

    def _count_ejection(self, rules: Rules, now: float) -> None:
        """One more in a row. As in Envoy, each healthy interval since the last return takes one off first.

        A trial that fails was no return, so the row grows by one each time.
        """
        if not self.out:
            healthy_intervals = (now - self._healthy_since) / rules.ejection_s
            self.in_a_row = max(0, self.in_a_row - int(min(healthy_intervals, self.in_a_row)))
        self.in_a_row += 1

    def _leave(self, until: float) -> None:
        self.out = True
        self.until = until
        self._opens_at = self._moved_at = until + ALONE_AFTER_S
        self.spared = False
        self._hints.clear()
        self._successes = 0
        self._free_places()

    def _free_places(self) -> None:
        self.trial += 1
        self.trial_in_flight = 0

    def begin_trial(self, rules: Rules, now: float) -> None:
        """Let this worker try the replica, if its time is over. May be repeated as often as one likes.

        A trial that has shown nothing for `stall_s` (its requests hang, or are long) forgets those that are under
        way and lets in as many again, so that no request can hold it up; what succeeded still counts.
        """
        if not self.out or now < self.until:
            return
        if now < self._opens_at:
            self._opens_at = self._moved_at = now
        elif now - self._moved_at >= rules.stall_s:
            self._free_places()
            self._moved_at = now

    def recover(self, now: float) -> None:
        """Back in, with a clean record except for the number of ejections in a row."""
        self.out = False
        self.trial_in_flight = 0
        self.consecutive = 0
        self.window.clear()
        self._hints.clear()
        self._healthy_since = now

    def hinted(self, rules: Rules, observer: str, until: float, suspected: bool, now: float) -> bool:
        """Note that another worker has ejected it; True when this one should follow.

        It follows two different observers, or one when it has itself seen a failure and no answer since
        (`suspected`): a worker with a broken network must not empty the pool for all. When it is out already, only
        the end is moved, and not under a trial that runs here.
        """
        if self.out:
            if self.until < until and now < self._opens_at:
                self.until = min(until, now + rules.max_ejection_s * (1.0 + rules.jitter))
                self._opens_at = self._moved_at = self.until + ALONE_AFTER_S
            return False
        if until <= now:
            self._hints.pop(observer, None)
            return False
        self._hints[observer] = until
        live = self._live_hints(now)
        recently_failed = self.consecutive > 0 and now - self.failed_at <= rules.window_s
        return len(live) >= 2 or suspected or recently_failed

    def forget_hints(self) -> None:
        self._hints.clear()

    def _live_hints(self, now: float) -> dict[str, float]:
        if self._hints:
            self._hints = {observer: until for observer, until in self._hints.items() if now < until}
        return self._hints
