"""How many requests and KV-cache tokens a replica takes at once, and a pool of them. Pure: no clock, no I/O.

What the configuration says is believed, then what the engine states of itself, then what its load reports show. The
last can only lower what is stated: an engine started for 256 requests runs 40 of them when its KV cache holds no more
of these prompts, and it is the 41st that should wait here, in fair order, instead of there, in order of arrival.
Where nobody says anything, what the replica refuses is learned from (`routing.concurrency`).

Capacity is the engine's, whoever uses it. Requests of other clients at the same engine count among those it runs, so
an engine that is shared with others needs `max_in_flight`: the gateway's part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from routing.concurrency import FLOOR, Learned

if TYPE_CHECKING:
    from routing.types import Replica

FALL = 1 / 8
"""Part of the difference by which an estimate falls with each report: half of it in five, nine tenths in 17."""
GROWTH = 1.25
"""Factor by which it grows with each report of an engine that runs all of it and has nobody waiting."""

CONFIGURED, STATED, MEASURED, LEARNED = "configured", "stated", "measured", "learned"

UNREACHABLE = frozenset({"cooling_down", "not_ready"})
"""Reasons by which a replica fails at once: it refuses connections, or answers that it takes no work."""
_FACTS = frozenset({"draining", "credential_refused"})


@dataclass(frozen=True, slots=True)
class Measured:
    """What load reports of one engine show of the requests that it can run at once: an estimate, made of reports.

    Evidence is a report with requests waiting whose predecessor had some too. Once is none: what has just arrived at
    an idle engine waits for its next step. Of the two, the larger number of running ones counts, for the same reason.
    An engine that runs more than the estimate raises it at once. One that runs less while others wait lowers it by
    `FALL` of the difference, since a few long prompts pass. Where it runs all of it and nobody waits, in two reports,
    it grows: by `GROWTH` up to the most that the engine was seen to run with others waiting, by one beyond.
    """

    limit: float | None = None
    """The estimate, 1 or more; None before there was any evidence."""
    peak: int = 0
    """The most it was seen to run while others waited; 0 before that was seen in this life of the engine."""
    running_before: int = 0
    waited_before: bool | None = None
    """Whether requests waited at the last report; None where that is not known."""

    @property
    def requests(self) -> int | None:
        """The estimate in whole requests, 1 or more."""
        return None if self.limit is None else max(1, int(self.limit + 0.5))

    def after(self, running: int | None, waiting: int | None) -> Measured:
        """The estimate after one more report."""
        if running is None or waiting is None:
            return self if self.waited_before is None else replace(self, waited_before=None)
        limit, peak = self.limit, self.peak
        if waiting > 0:
            most = max(running, self.running_before)
            if self.waited_before and most > 0:  # with nothing running it is paused, which says nothing
                peak = max(peak, most)
                limit = float(most) if limit is None or most > limit else limit + (most - limit) * FALL
        elif limit is not None and running >= limit and self.waited_before is False:
            limit = max(running + 1.0, running * GROWTH)
            if peak:
                limit = min(limit, max(float(peak), running + 1.0))
        if limit is not None and running > limit:
            limit = float(running)
        return Measured(limit, peak, running, waiting > 0)

    def begun_anew(self) -> Measured:
        """For another life of the engine: a guess, which quickly grows, and falls, to what is true now.

        Not nothing: a pool of which one engine is restarted would be without a limit until that one is overfull.
        """
        return Measured(self.limit)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica takes at once. None: not known, so nothing is limited by it."""

    requests: int | None = None
    tokens: int | None = None
    """KV-cache tokens: prompts and answers of all its requests."""
    source: str | None = None
    """Who says so of the requests: `configured`, `stated` (by the engine), `measured` (its load reports) or `learned`
    (what it refused)."""

    def dispatch(self, headroom: int) -> int | None:
        """Requests to have there at once: a few more than it runs, so that none of its places is ever empty.

        A configured number is not exceeded, nor is a learned one, beyond which requests are refused. A measured one
        always is, by one at least: what the engine makes of one more is the only way to see that it could run more.
        """
        if self.requests is None or self.source in (CONFIGURED, LEARNED):
            return self.requests
        return self.requests + max(headroom, 1 if self.source == MEASURED else 0)


class Meter:
    """Everything known of one replica's capacity. `capacity` is made anew with each change, to be read at any time."""

    __slots__ = ("_configured", "_stated", "capacity", "learned", "measured")

    def __init__(self) -> None:
        self._configured: tuple[int | None, int | None] = (None, None)
        self._stated: tuple[int | None, int | None] = (None, None)
        self.measured = Measured()
        self.learned: Learned | None = None
        """None before the first refusal, and where anybody says how much it takes. Each answer looks at it."""
        self.capacity = Capacity()

    def configure(self, requests: int | None, tokens: int | None) -> None:
        """`max_in_flight` of the replica and `queue.max_tokens` of its pool."""
        self._configured = (requests, tokens)
        self._settle()

    def state(self, requests: int | None, tokens: int | None) -> None:
        """What the engine said last. It cannot run nothing: 0 is taken for not saying."""
        self._stated = (requests or None, tokens or None)
        self._settle()

    def observe(self, running: int | None, waiting: int | None) -> None:
        """One load report."""
        self.measured = self.measured.after(running, waiting)
        if self.measured.waited_before is not None:
            self.learned = None
        self._settle()

    def refused(self, in_flight: int, now: float, *, said: bool = True) -> None:
        """It is too busy for one more beside so many: it said so, or (`said` false) no first token came in time.

        A silence alone begins no limit: a request can hang for reasons of its own. Nor does a refusal beside next to
        nothing, which is about a rate or a quota.
        """
        if self._configured[0] is not None or self._stated[0] is not None or self.measured.waited_before is not None:
            return
        if self.learned is not None and said and in_flight < FLOOR:
            self.learned.refused_by_rate(now)
        elif self.learned is not None:
            self.learned.refused(in_flight, now)
        elif said and in_flight >= FLOOR:
            self.learned = Learned(in_flight, now)
        self._settle()

    def answered(self, in_flight: int, now: float) -> None:
        """It has answered one. Only for a meter that has `learned` something."""
        if self.learned is not None and self.learned.answered(in_flight, now):
            self._settle()

    def begin_anew(self) -> None:
        """The engine has restarted, perhaps with other settings."""
        self.measured = self.measured.begun_anew()
        self._stated = (None, None)
        self._settle()

    def _settle(self) -> None:
        learned = None if self.learned is None else self.learned.requests
        fresh = derive(self._configured, self._stated, self.measured.requests, learned)
        if fresh != self.capacity:
            self.capacity = fresh


def derive(
    configured: tuple[int | None, int | None],
    stated: tuple[int | None, int | None],
    measured: int | None,
    learned: int | None = None,
) -> Capacity:
    """A replica's capacity from what the configuration, the engine, its reports and its refusals say of requests, and
    the first two of tokens."""
    tokens = configured[1] if configured[1] is not None else stated[1]
    if configured[0] is not None:
        return Capacity(configured[0], tokens, CONFIGURED)
    if stated[0] is not None and (measured is None or stated[0] <= measured):
        return Capacity(stated[0], tokens, STATED)
    if measured is not None:
        return Capacity(measured, tokens, MEASURED)
    return Capacity(learned, tokens, None if learned is None else LEARNED)


def pool_capacity(replicas: Sequence[Replica], headroom: int, now: float) -> tuple[int | None, int | None]:
    """Requests and KV tokens that a pool takes at once, over all gateways; None where that is not limited.

    The sum over the replicas that take work, those that are full just now included. One of unknown capacity among them
    makes the sum unknown: it takes what comes, and any number for it would hold back work that it could do. It becomes
    known as soon as its own queue is not empty for two reports.

    Where no replica looks well, routing tries those that are under suspicion, and so these are counted: without a
    limit, all that waits would fall on engines which are ill from too much work perhaps. But where every replica is
    drained, without a key, or fails at once, nothing is to be waited for: unlimited, so that requests go through to
    routing, which answers 503 now. (Such replicas are never counted beside others, and nothing gathers meanwhile that
    could fall on them when they return.)
    """
    serving: list[Replica] = []
    suspects: list[Replica] = []
    for each in replicas:
        reason = each.unavailable_reason(now)
        if reason is None or reason == "full":
            serving.append(each)
        elif reason not in _FACTS and reason not in UNREACHABLE:
            suspects.append(each)
    requests: int | None = 0
    tokens: int | None = 0
    for each in serving or suspects:
        capacity = each.meter.capacity
        dispatch = capacity.dispatch(headroom)
        requests = None if requests is None or dispatch is None else requests + dispatch
        tokens = None if tokens is None or capacity.tokens is None else tokens + capacity.tokens
    # Neither is ever 0: a replica takes one request at least.
    return requests or None, tokens or None


def set_ceilings(replicas: Sequence[Replica], headroom: int | None) -> None:
    """Have each replica be "full" at its own capacity and headroom; without one (no queue) at none but its limit, and
    at what it was seen to refuse."""
    for each in replicas:
        capacity = each.meter.capacity
        each.ceiling = capacity.dispatch(headroom or 0) if headroom is not None or capacity.source == LEARNED else None
