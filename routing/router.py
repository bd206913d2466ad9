"""Drives a policy: applies the hard rules, looks up what is cached where, asks the policy, and keeps the books.

    decide       filters, then the policy, among those that are left
    dispatched   counts the request's work at the replica and believes its prompt to be cached there
    first_token  its prefill is done; what was predicted is compared with what was observed
    finished     its work is gone; what the engine says of its cache is learned
    failed       its work is gone, and so is what was believed only because of it

`PoolState` is what the policies of one pool share: one set of books and one index, however many models and policies use
the pool. Everything here is plain synchronous code; `now` is an argument, in seconds of any one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from routing.adapters import NO_SLOT, stay_where_loaded
from routing.calibration import Calibration
from routing.filters import HELD_BACK, SOFT, TOO_LONG, exclusion_reason, fits
from routing.health import CORDONED
from routing.index import PrefixIndex
from routing.prefix import Digest, Prefix
from routing.types import Chooser, Decision, Exclusion, InferenceRequest, Replica, View

ALL_COOLING_DOWN = "all_cooling_down"
ALL_UNHEALTHY = "all_unhealthy"
OVER_CAPACITY = "over_capacity"
"""Reason of decisions for a replica that has as much as it runs at once; its limit is not reached."""
NEW_OR_CORDONED = "new_or_cordoned"
"""Reason of decisions for a replica that is being warmed, or takes no new prompts: nobody else may be used."""
NONE_AVAILABLE = "none_available"
PANIC = frozenset({ALL_COOLING_DOWN, ALL_UNHEALTHY})
"""Reasons of decisions for want of any replica that looks well."""

DEFAULT_KV_TOKENS = 500_000
"""What a replica's cache is taken to hold while it has not said. Rather too much: what is not there is soon learned
from the engine's own counts, what is there and not believed never is."""
MAX_SESSIONS = 100_000
HEADROOM = 1.5
"""An index may believe this much more than the cache holds: common prefixes are stored once there, and the books count
requests that share one block by block."""


@dataclass(slots=True)
class Flight:
    """One request at one replica."""

    replica: Replica
    tokens: int
    """Of the prompt."""
    cached: int
    """Of these, believed to be cached there."""
    output_tokens: float
    dispatched_at: float
    new: Sequence[Digest]
    """What was believed because of this request."""
    queued_tokens: int
    """Prefill work that was ahead of it."""
    running: int
    """Requests that were running."""
    running_tokens: int
    predicted_ttft_ms: float | None
    first_token_at: float | None = None
    marks: tuple[float, float, float] | None = None
    """The calibration's sums at the first token."""
    counted: bool = False
    """The calibration has learned from its first token already."""


@dataclass(slots=True)
class Change:
    """What peers have to be told about the index."""

    replica: Replica
    added: Sequence[Digest] = ()
    added_tokens: Sequence[int] = ()
    """What each stands for: tokens between it and the one before."""
    dropped: Sequence[Digest] = ()


@dataclass(slots=True)
class PoolState:
    """What is known about a pool and shared by everything that decides about it."""

    index: PrefixIndex = field(default_factory=PrefixIndex)
    calibration: Calibration = field(default_factory=Calibration)
    flights: dict[tuple[str, Replica], Flight] = field(default_factory=dict)
    sessions: dict[str, Replica] = field(default_factory=dict)
    """Where the last request of each session went, the longest unused first; at most `MAX_SESSIONS`."""
    slots: dict[Replica, int] = field(default_factory=dict)
    """Each replica's number in the index."""
    by_slot: dict[int, Replica] = field(default_factory=dict)
    _epochs: dict[Replica, str | None] = field(default_factory=dict)
    on_change: Callable[[Change], None] | None = None
    """Told of what peers should learn; None where there are none."""

    def slot(self, replica: Replica) -> int:
        """The replica's number in the index, a new one when it was never seen."""
        slot = self.slots.get(replica)
        if slot is None:
            slot = self.index.add_target(self._budget(replica))
            self.slots[replica] = slot
            self.by_slot[slot] = replica
            self._epochs[replica] = replica.epoch
        elif replica.epoch is not self._epochs[replica] and replica.epoch != self._epochs[replica]:
            if self._epochs[replica] is None:
                self._epochs[replica] = replica.epoch  # it has become known
            else:
                self.begin_anew(replica)
        return slot

    def sent(self, request: InferenceRequest, replica: Replica, now: float) -> None:
        """A request that was dispatched earlier is sent only now: its adapter had to be loaded first.

        That time must not be taken for the replica's slowness.
        """
        flight = self.flights.get((request.id, replica))
        if flight is not None:
            flight.dispatched_at = now

    def warmed(self, prefix: Prefix, replica: Replica) -> None:
        """The replica was made to read this prompt, beside all requests: it is believed to be cached there."""
        slot = self.slot(replica)
        new = self.index.insert(slot, prefix)
        if new and self.on_change is not None:
            self.on_change(Change(replica, new, self.index.weights(slot, new)))

    def begin_anew(self, replica: Replica) -> None:
        """The replica's cache is empty: it has restarted, was flushed, or has other weights."""
        slot = self.slots.get(replica)
        if slot is not None:
            self._epochs[replica] = replica.epoch
            self.index.reset(slot)

    def resize(self, replica: Replica) -> None:
        """Its capacity has become known, or has changed."""
        slot = self.slots.get(replica)
        if slot is not None:
            self.index.resize(slot, self._budget(replica))

    def forget(self, replica: Replica) -> None:
        """It is no longer in the pool, and does not come back. Requests that still end there leave nothing behind."""
        replica.retired = True
        self.calibration.forget(replica)
        slot = self.slots.pop(replica, None)
        if slot is not None:
            self.index.remove_target(slot)
            del self.by_slot[slot]
            del self._epochs[replica]

    def note_session(self, session: str, replica: Replica) -> None:
        sessions = self.sessions
        sessions.pop(session, None)
        if len(sessions) >= MAX_SESSIONS:
            # In one go: looking for the first of a dict that lost its first many times walks over their graves.
            for old in list(islice(sessions, MAX_SESSIONS // 16)):
                del sessions[old]
        sessions[session] = replica

    @staticmethod
    def _budget(replica: Replica) -> int:
        return int((replica.meter.capacity.tokens or DEFAULT_KV_TOKENS) * HEADROOM)


class Router:
    """A `Policy` made of a `Chooser` and the state of its pool."""

    def __init__(
        self,
        chooser: Chooser,
        state: PoolState | None = None,
        rng: Random | None = None,
        *,
        stay_where_loaded: bool = False,
        quiet: bool = False,
    ) -> None:
        """`stay_where_loaded`: requests for an adapter go to replicas that have it as long as one may be used; for
        policies that do not know what loading costs. `quiet`: for decisions that nobody acts on, so that nothing of
        the pool's state is touched."""
        self.chooser = chooser
        self.wants_prefix = chooser.wants_prefix
        self.state = state or PoolState()
        self._rng = rng or Random()
        self.stay_where_loaded = stay_where_loaded
        self._quiet = quiet

    @property
    def name(self) -> str:
        return self.chooser.name

    def index_for_others(self, needed: bool) -> None:
        """Whether somebody beside the policy needs to know what is cached where (`routing.shadow`)."""
        self.wants_prefix = self.chooser.wants_prefix or needed

    def decide(
        self,
        request: InferenceRequest,
        replicas: Sequence[Replica],
        now: float,
        tried: Sequence[Replica] = (),
    ) -> Decision:
        candidates, excluded, forced = _candidates(request, replicas, now, tried)
        if not candidates:
            return Decision(None, NONE_AVAILABLE, excluded)
        view = self.view(request, now)
        if excluded and not forced:
            candidates, excluded = _with_holders(request, candidates, excluded, view)
        if self.stay_where_loaded and request.adapter is not None:
            candidates = list(stay_where_loaded(request.adapter, candidates))
        if not self._quiet:
            self.state.calibration.pool = replicas
        chosen = self.chooser(request, candidates, view)
        if forced and forced in (OVER_CAPACITY, NO_SLOT):
            excluded = [each for each in excluded if each.replica is not chosen]
        return Decision(
            chosen,
            forced or view.reason or self.chooser.name,
            excluded,
            view.matches.get(chosen, 0),
            view.predicted_ttft_ms,
            view.output_tokens,
        )

    def fits(
        self, request: InferenceRequest, replicas: Sequence[Replica], now: float, tried: Sequence[Replica] = ()
    ) -> bool:
        """Whether `decide` would find a replica. The policy is not asked: it may count its decisions."""
        return bool(_candidates(request, replicas, now, tried)[0])

    def view(self, request: InferenceRequest, now: float) -> View:
        """What the policy may look at for this request."""
        state = self.state
        matches: dict[Replica, int] = {}
        prefix = request.prefix
        if prefix is not None and self.chooser.wants_prefix:
            by_slot, scale = state.by_slot, prefix.unit_tokens
            for slot, count in state.index.match(prefix).items():
                matches[by_slot[slot]] = int(count * scale)
        session = None if request.session is None else state.sessions.get(request.session)
        return View(now, self._rng, matches, state.calibration.output_tokens(request), session)

    def dispatched(
        self, request: InferenceRequest, replica: Replica, now: float, decision: Decision | None = None
    ) -> None:
        state = self.state
        work = replica.work
        prefix = request.prefix
        key = (request.id, replica)
        if key in state.flights:  # somebody forgot to say how it ended
            self._land(request, replica, now)
        new: Sequence[Digest] = ()
        cached = 0
        if prefix is not None and not replica.retired and self.wants_prefix:
            slot = state.slot(replica)
            if decision is not None and decision.replica is replica and self.chooser.wants_prefix:
                cached = decision.cached_tokens
            else:
                cached = int(state.index.match(prefix).get(slot, 0) * prefix.unit_tokens)
            index = state.index
            new = index.insert(slot, prefix)
            if state.on_change is not None:
                # Peers forget what is not used, too, and see no use but what they are told of.
                told = (*new, *index.renewed)
                if told:
                    state.on_change(Change(replica, told, index.weights(slot, told)))
        tokens = request.prompt_tokens
        if cached > tokens:
            cached = tokens
        ahead = work.queued_tokens
        if work.queued > 0:  # of the first one in the queue a part is done already
            done = (now - work.since) * 1000.0 / replica.speed.prefill_ms
            ahead -= int(max(0.0, min(done, 0.9 * ahead / work.queued)))
        output_tokens = None if decision is None else decision.output_tokens
        state.flights[key] = Flight(
            replica,
            tokens,
            cached,
            state.calibration.output_tokens(request) if output_tokens is None else output_tokens,
            now,
            new,
            ahead,
            work.running,
            work.running_tokens,
            None if decision is None else decision.predicted_ttft_ms,
        )
        work.queue(tokens - cached, now)
        if request.session is not None and not replica.retired:
            state.note_session(request.session, replica)
        if request.adapter is not None:
            use = replica.adapter_use
            use[request.adapter] = use.get(request.adapter, 0) + 1
            replica.shelf.used[request.adapter] = now

    def first_token(self, request: InferenceRequest, replica: Replica, now: float) -> None:
        flight = self.state.flights.get((request.id, replica))
        if flight is None or flight.first_token_at is not None:
            return
        flight.first_token_at = now
        replica.work.begin(flight.tokens - flight.cached, flight.tokens, now)
        learned = replica.meter.learned
        if learned is not None:
            speed = replica.speed
            alone_ms = speed.rtt_ms + speed.step_ms + speed.prefill_ms * (flight.tokens - flight.cached)
            learned.first_token((now - flight.dispatched_at) * 1000.0, max(1.0, alone_ms))
        self.state.calibration.first_token(flight, now)

    def finished(
        self,
        request: InferenceRequest,
        replica: Replica,
        now: float,
        *,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        state = self.state
        flight = self._land(request, replica, now)
        if flight is None:
            return
        state.calibration.finished(request, flight, now, prompt_tokens, cached_tokens, output_tokens)
        if cached_tokens is not None and request.prefix is not None and self.wants_prefix:
            # In this request's own measure, which is an estimate where no tokeniser counted it.
            scale = flight.tokens / prompt_tokens if prompt_tokens else 1.0
            slot = state.slots.get(replica)
            if slot is not None:
                state.index.learn(slot, request.prefix, flight.cached, int(cached_tokens * scale))

    def failed(self, request: InferenceRequest, replica: Replica, now: float, *, blamed: bool = True) -> None:
        state = self.state
        flight = self._land(request, replica, now)
        if flight is None:
            return
        if blamed:
            state.calibration.failed(flight, now)
        if flight.first_token_at is None and flight.new:
            slot = state.slots.get(replica)
            if slot is not None:
                state.index.drop(slot, flight.new)
                if state.on_change is not None:
                    state.on_change(Change(replica, dropped=flight.new))

    def _land(self, request: InferenceRequest, replica: Replica, now: float) -> Flight | None:
        flight = self.state.flights.pop((request.id, replica), None)
        if flight is None:
            return None
        if flight.first_token_at is None:
            replica.work.unqueue(flight.tokens - flight.cached, now)
        else:
            replica.work.end(flight.tokens)
        if request.adapter is not None:
            use = replica.adapter_use
            left = use.get(request.adapter, 0) - 1
            if left > 0:
                use[request.adapter] = left
            else:
                use.pop(request.adapter, None)
        return flight


def _candidates(
    request: InferenceRequest, replicas: Sequence[Replica], now: float, tried: Sequence[Replica]
) -> tuple[list[Replica], list[Exclusion], str]:
    """Who may be asked; who not, and why; and the reason to give where only the second best are left."""
    candidates: list[Replica] = []
    excluded: list[Exclusion] = []
    for replica in replicas:
        reason = exclusion_reason(request, replica, now, tried)
        if reason is None:
            candidates.append(replica)
        else:
            excluded.append(Exclusion(replica, reason))
    return (candidates, excluded, "") if candidates else _second_best(request, excluded)


def _with_holders(
    request: InferenceRequest, candidates: list[Replica], excluded: list[Exclusion], view: View
) -> tuple[list[Replica], list[Exclusion]]:
    """With those among the candidates that are cordoned and hold this prompt: its session was there last, or they are
    believed to have more of it than anybody who takes new ones, and more than the first block, which is often shared
    by prompts that have nothing else in common."""
    cordoned = [each.replica for each in excluded if each.reason == CORDONED]
    if not cordoned:
        return candidates, excluded
    matches, prefix = view.matches, request.prefix
    most = max(matches.get(each, 0) for each in candidates)
    if prefix is not None and prefix.ends:
        most = max(most, int(prefix.ends[0] * prefix.unit_tokens))
    holders = [
        each
        for each in cordoned
        if (each is view.session or matches.get(each, 0) > most)
        and (each.ceiling is None or each.in_flight < each.ceiling)
        and fits(request, each)
    ]
    if not holders:
        return candidates, excluded
    return [*candidates, *holders], [each for each in excluded if each.replica not in holders]


def _second_best(request: InferenceRequest, excluded: list[Exclusion]) -> tuple[list[Replica], list[Exclusion], str]:
    """Who may be asked when all are excluded: those that merely have enough to do, else those where an adapter has to
    wait for a slot, else those that are held back, else those under suspicion, else those whose context is too short as
    far as one can tell.

    With what remains excluded, and the reason to give.
    """
    busy = [each.replica for each in excluded if each.reason == "full" and not each.replica.at_limit]
    if busy:
        # Of those that are merely busy or under suspicion nobody has asked yet whether the prompt fits.
        return [each for each in busy if fits(request, each)] or busy, excluded, OVER_CAPACITY
    behind = [each.replica for each in excluded if each.reason == NO_SLOT]
    if behind:
        return behind, excluded, NO_SLOT
    held_back = [each.replica for each in excluded if each.reason in HELD_BACK and fits(request, each.replica)]
    if held_back:
        used = set(held_back)
        return held_back, [each for each in excluded if each.replica not in used], NEW_OR_CORDONED
    suspects = [each for each in excluded if each.reason in SOFT]
    fitting = [each for each in suspects if fits(request, each.replica)]
    short = [each.replica for each in excluded if each.reason == TOO_LONG]
    if short and not fitting:
        return short, [each for each in excluded if each.reason != TOO_LONG], TOO_LONG
    if not suspects:
        return [], excluded, NONE_AVAILABLE
    suspects = fitting or suspects
    resting = all(each.reason == "cooling_down" for each in suspects)
    asked = {each.replica: None for each in suspects}
    return (
        list(asked),
        [each for each in excluded if each.replica not in asked],
        ALL_COOLING_DOWN if resting else ALL_UNHEALTHY,
    )
