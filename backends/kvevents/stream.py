"""What a stream of numbered KV-event batches proves: order, gaps, restarts, and whether it may be trusted.

An engine numbers its batches from 0 and publishes them over a socket that may drop any of them. With a replay endpoint
it also keeps the last ones (10,000 in SGLang and vLLM) to be asked for again. This is the half that decides; sockets
are in `subscriber.py`.

Trust. `TRUSTED` means that every batch since the engine started, or since it last emptied its cache, was applied in
order: then the absence of a block is evidence as well. Otherwise a `Doubt` says why not. A sink that is told of a doubt
keeps what it has and falls back to its own knowledge; it never takes the stream's silence for an empty cache.

How trust comes back:

* with replay, when a gap, a lost connection or a late start was filled without a hole. That the publisher is still the
  same one is proven by asking for the last batch we had too, and comparing it: numbers alone begin again at 0 and may
  have passed ours unseen.
* without, at the next `AllBlocksCleared`, or when a new publisher is heard from its batch 0 on.

Who joins late and can't replay back to batch 0 is in `LATE_JOIN`: what it was told is right, what it wasn't is unknown.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from backends.kvevents.decode import BlockRemoved, BlockStored, Undecodable, decode_batch

RECENT = 256
"""Batches that a repetition is recognised among."""


class Doubt(StrEnum):
    """Why a stream isn't trusted."""

    CONNECTING = "connecting"
    """Nothing was heard yet."""
    LATE_JOIN = "late_join"
    """Older blocks are unknown: what was told is right, absence proves nothing."""
    DISCONNECTED = "disconnected"
    """What happened meanwhile, and whether it is still the same engine, is unknown."""
    GAP = "gap"
    """Batches are missing: blocks may be there that we don't know, or be gone."""
    UNDECODABLE = "undecodable"
    """A batch could not be read; the same as a gap, but asking again would not help."""
    RESTART = "restart"
    """The engine began anew, and its new history isn't read yet."""


class KvSink(Protocol):
    """Who is told. Called synchronously and in order; must not raise."""

    def stored(self, event: BlockStored) -> None: ...

    def removed(self, event: BlockRemoved) -> None: ...

    def cleared(self) -> None:
        """All that was told before is void: the engine emptied its cache, or has restarted."""
        ...

    def trust(self, trusted: bool, reason: str) -> None:
        """Whether absence is evidence from now on; the reason is a `Doubt`, or `complete`."""
        ...


@dataclass(slots=True)
class Counters:
    """What a stream has seen since it was made."""

    batches: int = 0
    """Applied, replayed ones included."""
    replayed: int = 0
    stored: int = 0
    """Events; one may hold many blocks."""
    removed: int = 0
    cleared: int = 0
    unknown: int = 0
    """Events of types we don't know, skipped."""
    undecodable: int = 0
    duplicates: int = 0
    gaps: int = 0
    lost_batches: int = 0
    """Batches that no replay brought back."""
    restarts: int = 0
    disconnects: int = 0
    replay_failures: int = 0
    overflows: int = 0
    """Times that too much arrived while a replay was awaited; it is asked for again afterwards."""


@dataclass(frozen=True, slots=True)
class StreamReport:
    """A stream at one moment, for people and pages."""

    doubt: str | None
    """None: trusted."""
    next_sequence: int | None
    counters: Counters


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """A replay that the stream wants: all batches from `start` on. A new object is a new request."""

    start: int
    number: int


class EventStream:
    """The state of one rank's stream. Pure; whoever does the I/O calls it in the order of events."""

    def __init__(
        self,
        sink: KvSink,
        *,
        replay: bool,
        max_waiting: int = 10_000,
        max_waiting_bytes: int = 64 << 20,
    ) -> None:
        """`replay`: there is an endpoint to ask. The limits bound what is held back while an answer is awaited."""
        self.counters = Counters()
        self.request: ReplayRequest | None = None
        """The replay that is awaited now."""
        self._sink = sink
        self._replay = replay
        self._online = False
        self._next: int | None = None
        """Number of the batch to apply next; None: anything is a beginning."""
        self._recent: dict[int, int] = {}
        """Number and hash of the last batches applied."""
        self._standing: Doubt | None = None
        """What no replay that is under way will mend."""
        self._passing: Doubt | None = Doubt.CONNECTING
        self._told: Doubt | None = Doubt.CONNECTING
        self._proven = False
        """The publisher that answers the request is the one we know."""
        self._asked_at: int | None = None
        """Where we stood when the last request was made: standing there still, asking again would not help."""
        self._barren = False
        """A request for everything was answered with nothing, although something had been published."""
        self._requests = 0
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._max_waiting = max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._overflowed = False

    @property
    def doubt(self) -> Doubt | None:
        """Why it isn't trusted; None when it is."""
        return self._passing or self._standing

    def report(self) -> StreamReport:
        """A copy of what is known about it now."""
        return StreamReport(self.doubt and str(self.doubt), self._next, replace(self.counters))

    # What happens to the connection.

    def connected(self) -> None:
        """The subscription stands, on a new connection."""
        if self._online:
            return
        self._online = True
        if self._replay:
            self._ask(self._passing)
        elif self._next is not None:
            self._passing = None
        self._tell()

    def disconnected(self) -> None:
        """The connection is lost. What was received on it is to be handed over before."""
        if not self._online:
            return
        self._online = False
        self.counters.disconnects += 1
        self._stop_waiting()
        self._passing = Doubt.DISCONNECTED
        if not self._replay and self._next is not None:
            self._standing = Doubt.DISCONNECTED
        self._tell()

    def restarted(self) -> None:
        """Somebody knows that the engine began anew (its epoch changed), or that the sink lost what it had."""
        self.counters.restarts += 1
        self._next = self._asked_at = None
        self._barren = False
        self._recent.clear()
        self._standing = None
        self._passing = Doubt.RESTART
        self._tell()
        self._sink.cleared()
        if self._replay and self._online:
            self._ask(Doubt.RESTART)

    # What arrives.

    def batch(self, sequence: int, payload: bytes) -> None:
        """A live batch."""
        self.connected()  # news of the connection may come a moment later than what it carries
        if self.request is None and self._next is not None:
            if sequence == self._next:
                self._apply(sequence, payload)
                self._tell()
                return
            if sequence > self._next:
                self.counters.gaps += 1
            elif self._recent.get(sequence) == hash(payload):
                self.counters.duplicates += 1
                return
            else:
                self.restarted()
        self._wait(sequence, payload)
        self._release()
        self._tell()

    def malformed(self) -> None:
        """Something arrived that is no numbered batch at all."""
        self.counters.undecodable += 1
        self._standing = Doubt.UNDECODABLE
        self._tell()

    def replayed(self, sequence: int, payload: bytes) -> None:
        """A batch that answers the present `request`."""
        request = self.request
        if request is None or sequence < request.start:
            return
        if not self._proven:
            if sequence == request.start:
                if self._recent.get(sequence) == hash(payload):
                    self._proven = True
                else:
                    self.restarted()
                return
            # The publisher's memory does not reach back to what we had.
            self._proven = True
            self._jump(sequence)
        if self._next is None:
            self._standing = Doubt.LATE_JOIN if sequence > 0 else None
            self._next = sequence
        elif sequence > self._next:
            # Dropped on the way, see `replay_failed`.
            if self._next != self._asked_at:
                self._ask(self._passing or Doubt.GAP)
                self._tell()
                return
            self._jump(sequence)
        if sequence == self._next:
            self.counters.replayed += 1
            self._apply(sequence, payload)
        self._tell()

    def replay_ended(self) -> None:
        """The publisher says that there is no more."""
        if self.request is None:
            return
        if not self._proven:
            self.restarted()  # it has less than we had
            return
        self.request = None
        if self._passing is not Doubt.GAP:
            self._asked_at = None  # it did not look for anything missing
        if self._next is not None:
            self._passing = None
        self._release()
        self._tell()

    def replay_failed(self) -> None:
        """There was no answer, or it broke off.

        One that brought something is asked to go on: engines send replays over a socket that drops what its queue
        can't hold, the end included. Else what waits is applied, behind a gap.
        """
        if self.request is None:
            return
        self.counters.replay_failures += 1
        if self._next != self._asked_at:
            self._ask(self._passing or Doubt.GAP)
            self._tell()
            return
        self.request = None
        if self._next is not None and self._passing is not None:
            self._standing = self._passing if self._passing is Doubt.DISCONNECTED else Doubt.GAP
            self._passing = None
        if self._waiting:
            sequence, payload = self._pop()
            if self._next is None:
                self._start_at(sequence)
            elif sequence > self._next:
                self._jump(sequence)
            if sequence == self._next:
                self._apply(sequence, payload)
        self._release()
        self._tell()

    def check(self) -> None:
        """Ask whether batches were lost that nothing after them has betrayed. Trust stays meanwhile."""
        if self._replay and self._online and self.request is None:
            self._ask(self._passing)

    # How.

    def _ask(self, meanwhile: Doubt | None) -> None:
        """Request a replay of what follows the last batch we had, that one included."""
        self._requests += 1
        self.request = ReplayRequest(0 if self._next is None else self._next - 1, self._requests)
        self._proven = self._next is None  # nothing is known that another publisher could contradict
        self._asked_at = self._next
        self._passing = meanwhile

    def _start_at(self, sequence: int) -> None:
        """Take a live batch for the beginning of what we know."""
        self._standing = Doubt.LATE_JOIN if sequence > 0 else None
        self._passing = None
        self._next = sequence

    def _jump(self, sequence: int) -> None:
        """Give up what lies before `sequence`."""
        if self._next is not None:
            self.counters.lost_batches += max(0, sequence - self._next)
        self._standing = Doubt.GAP
        self._next = sequence

    def _apply(self, sequence: int, payload: bytes) -> None:
        self._next = sequence + 1
        self._recent[sequence] = hash(payload)
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        self._barren = False
        counters = self.counters
        counters.batches += 1
        try:
            batch = decode_batch(payload)
        except Undecodable:
            counters.undecodable += 1
            self._standing = Doubt.UNDECODABLE
            return
        counters.unknown += batch.unknown
        for event in batch.events:
            if isinstance(event, BlockStored):
                counters.stored += 1
                self._sink.stored(event)
            elif isinstance(event, BlockRemoved):
                counters.removed += 1
                self._sink.removed(event)
            else:
                counters.cleared += 1
                self._standing = None  # whatever was missed, it is gone
                self._sink.cleared()

    def _wait(self, sequence: int, payload: bytes) -> None:
        """Hold a live batch back until the replay has ended."""
        full = len(self._waiting) >= self._max_waiting or self._waiting_bytes + len(payload) > self._max_waiting_bytes
        if self._overflowed or (full and self._waiting):
            self.counters.overflows += not self._overflowed
            self._overflowed = True
            return
        self._waiting.append((sequence, payload))
        self._waiting_bytes += len(payload)

    def _release(self) -> None:
        """Apply what waited, as far as it continues what we have."""
        while self._waiting and self.request is None:
            sequence, payload = self._waiting[0]
            if self._next is None:
                if sequence > 0 and self._replay and not self._barren:
                    self._barren = True
                    self._ask(self._passing)
                else:
                    self._start_at(sequence)
            elif sequence <= self._next:
                self._pop()
                if sequence == self._next:
                    self._apply(sequence, payload)
            elif self._replay and self._next != self._asked_at:
                self._ask(Doubt.GAP)
            else:
                self._jump(sequence)
        if self._overflowed and self.request is None:
            self._overflowed = False
            if self._replay and self._online:
                self._ask(Doubt.GAP)

    def _pop(self) -> tuple[int, bytes]:
        sequence, payload = self._waiting.popleft()
        self._waiting_bytes -= len(payload)
        return sequence, payload

    def _stop_waiting(self) -> None:
        self.request = None
        self._waiting.clear()
        self._waiting_bytes = 0
        self._overflowed = False

    def _tell(self) -> None:
        doubt = self.doubt
        if doubt is not self._told:
            self._told = doubt
            self._sink.trust(doubt is None, "complete" if doubt is None else str(doubt))
