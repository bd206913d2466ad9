"""What the gateway workers of one pool tell each other: their work at each replica, and what they know of its cache.

Decisions are made from local state alone; this keeps that state alike in all workers. Each tells the others, in
messages of about a hundred bytes, the absolute `Totals` of the replicas at which its own work has changed, and which
digests it has come to believe at which replica. A lost message is repaired: totals by the next one or the next
heartbeat, digests by a snapshot or by the next request with the same prefix. A worker that falls silent is forgotten
with its work, for what it did not finish is gone with it; what it knew of caches stays true and is kept.

    message   version, flags, worker, number, records
    record    replica, flags [, totals] [, epoch, digests added with their tokens, digests dropped]

All numbers are little-endian. A message of another version is passed over, so that versions can run side by side.
`routing.snapshot` has the form of a whole index, for workers that come late.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from routing.prefix import Digest
from routing.router import Change, PoolState
from routing.types import Replica
from routing.work import AT_ONCE_TOKENS, NOTHING, Totals, Work

VERSION = 1
WORKER_BYTES = 8
FLUSH_S = 0.01
"""What changed is told at most this much later, and at most so often."""
HEARTBEAT_S = 0.5
"""Work that does not change is told again this often."""
DEAD_AFTER_S = 2.0
"""Work of a peer of which nothing was heard for so long is no longer counted."""
MAX_MESSAGE_BYTES = 32_768
MAX_UNTOLD = 20_000
"""Changes of the index kept while nobody takes them. The oldest half goes beyond that; a snapshot may repair it."""
MAX_PEERS = 1_024
"""Names of peers that are remembered: what they told last, so that gaps are noticed."""

_HEAD = struct.Struct(f"<BB{WORKER_BYTES}sIH")
_RECORD = struct.Struct("<8sB")
_TOTALS = struct.Struct("<HIHI")
_INDEX = struct.Struct("<IHH")
_MAX_DIGESTS = 1_000
"""Of one record; more take several."""
_FAREWELL = 1
_HAS_TOTALS, _HAS_INDEX = 1, 2


@dataclass(slots=True)
class _News:
    """What became of one replica's index within one message."""

    epoch: str | None
    added: dict[Digest, int] = field(default_factory=dict)
    dropped: dict[Digest, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Peer:
    heard_at: float
    number: int
    at: dict[Replica, float] = field(default_factory=dict)
    """Where it has work, and when it said so last."""


class Peerage:
    """One worker's part of what the workers of a pool know together. Belongs to whoever owns the `PoolState`.

    `worker`: eight random bytes, new for every life of a worker. `wake` is called when there is something to `pack`,
    with True when that should happen at once; it must not call back from within. On the way of requests this appends to
    a list and no more. Ends with `leave`.
    """

    def __init__(
        self, worker: bytes, state: PoolState, replicas: Iterable[Replica], wake: Callable[[bool], None]
    ) -> None:
        if len(worker) != WORKER_BYTES:
            raise ValueError(f"a worker's name has {WORKER_BYTES} bytes, got {len(worker)}")
        self.state = state
        self._worker = worker
        self._wake = wake
        self._awake = False
        """`wake` was called, `pack` was not yet."""
        self._number = 0
        self._works: list[Work] = []
        """Those that changed since the last `pack`."""
        self._changes: list[tuple[Change, str | None]] = []
        """With the replica's epoch at that time."""
        self._busy: dict[Replica, None] = {}
        """Where the own work that was told last is not nothing."""
        self._by_work: dict[Work, Replica] = {}
        self._by_identity: dict[bytes, Replica] = {}
        self._identities: dict[Replica, bytes] = {}
        self._peers: dict[bytes, _Peer] = {}
        self._assumed: dict[Replica, int] = {}
        """Epochs under which peers' keys were believed while the own epoch was not known."""
        self.gaps = 0
        """Messages of peers that were missed."""
        self.unreadable = 0
        """Messages that could not be read, of other versions for instance."""
        state.on_change = self._learned
        self.refresh(replicas)

    @property
    def peers(self) -> int:
        """Peers that have work now."""
        return sum(bool(peer.at) for peer in self._peers.values())

    def refresh(self, replicas: Iterable[Replica]) -> None:
        """The pool has these replicas from now on."""
        identities = {replica: bytes.fromhex(replica.identity) for replica in replicas}
        for replica in self._identities.keys() - identities.keys():
            self._part(replica)
        for replica in identities.keys() - self._identities.keys():
            work = replica.work
            work.on_change = self._worked
            if work.changed:
                self._worked(work, 0)
            self._by_work[work] = replica
        self._identities = identities
        self._by_identity = {identity: replica for replica, identity in identities.items()}

    def leave(self) -> bytes:
        """End this; returns what to tell the peers, so that they need not wait for this worker's silence."""
        for replica in tuple(self._identities):
            self._part(replica)
        self._identities = {}
        self._by_identity = {}
        if self.state.on_change == self._learned:
            self.state.on_change = None
        return self._message([], 0, _FAREWELL)

    # -- what this worker tells

    def pack(self, *, heartbeat: bool = False) -> list[bytes]:
        """The messages that tell what has changed; with `heartbeat` all work, changed or not. Empty: none has."""
        self._awake = False
        totals: dict[Replica, Totals] = {}
        works, self._works = self._works, []
        for work in works:
            work.changed = False
            replica = self._by_work.get(work)
            if replica is not None:
                totals[replica] = work.own
        if heartbeat:
            self._check_assumed()
            for replica in self._busy:
                totals.setdefault(replica, replica.work.own)
        for replica, own in totals.items():
            if own != NOTHING:
                self._busy[replica] = None
            else:
                self._busy.pop(replica, None)
        return list(self._messages(totals, self._news()))

    def _worked(self, work: Work, uncached_tokens: int) -> None:
        """Told by a `Work` whose own part was not changed before, or was changed by much."""
        self._works.append(work)
        if not self._awake or uncached_tokens >= AT_ONCE_TOKENS:
            self._awake = True
            self._wake(uncached_tokens >= AT_ONCE_TOKENS)

    def _learned(self, change: Change) -> None:
        """Told by the `PoolState`."""
        changes = self._changes
        changes.append((change, change.replica.epoch))
        if not self._awake:
            self._awake = True
            self._wake(False)
        if len(changes) > MAX_UNTOLD:
            del changes[: MAX_UNTOLD // 2]

    def _news(self) -> dict[Replica, _News]:
        """What all changes since the last message come to."""
        changes, self._changes = self._changes, []
        news: dict[Replica, _News] = {}
        for change, epoch in changes:
            replica = change.replica
            if epoch != replica.epoch or replica not in self._identities:
                continue  # true of a cache that is gone
            each = news.get(replica)
            if each is None:
                each = news[replica] = _News(epoch)
            for digest, tokens in zip(change.added, change.added_tokens, strict=True):
                each.dropped.pop(digest, None)
                each.added[digest] = tokens
            for digest in change.dropped:
                each.added.pop(digest, None)
                each.dropped[digest] = None
        return news

    def _messages(self, totals: dict[Replica, Totals], news: dict[Replica, _News]) -> Iterator[bytes]:
        records: list[bytes] = []
        size_bytes = 0
        for replica in {**totals, **news}:
            for record in _records(self._identities[replica], totals.get(replica), news.get(replica)):
                if size_bytes + len(record) > MAX_MESSAGE_BYTES - _HEAD.size:
                    yield self._message(records, len(records))
                    records, size_bytes = [], 0
                records.append(record)
                size_bytes += len(record)
        if records:
            yield self._message(records, len(records))

    def _message(self, records: list[bytes], count: int, flags: int = 0) -> bytes:
        self._number += 1
        return _HEAD.pack(VERSION, flags, self._worker, self._number & 0xFFFFFFFF, count) + b"".join(records)

    # -- what peers tell

    def absorb(self, message: bytes, now: float, *, old: bool = False) -> bool:
        """Take in what a peer says; `now` in seconds of the router's clock. False when messages before it were missed.

        `old`: it was said some time ago, so only what it says of caches is still of use. The own messages, those of
        replicas that are not in this pool, and what cannot be read are passed over.
        """
        try:
            version, flags, worker, number, count = _HEAD.unpack_from(message)
            if version != VERSION:
                raise ValueError(f"version {version}")
            records = () if worker == self._worker else tuple(_parsed(message, count))
        except (struct.error, ValueError):
            self.unreadable += 1
            return True
        if worker == self._worker:
            return True
        peer = self._peers.get(worker)
        if peer is None:
            peer = self._acquaint(worker, number - 1, now)
        if number <= peer.number:
            return True  # told twice
        missed = number - peer.number - 1
        self.gaps += missed
        peer.number = number
        peer.heard_at = now
        if flags & _FAREWELL:
            self._drop_work(worker, peer, now)
        for identity, totals, epoch, added, added_tokens, dropped in records:
            replica = self._by_identity.get(identity)
            if replica is None:
                continue
            if totals is not None and not old:
                replica.work.peer(worker.hex(), totals, now)
                if totals == NOTHING:
                    peer.at.pop(replica, None)
                else:
                    peer.at[replica] = now
            if (added or dropped) and self.believes(replica, epoch):
                slot = self.state.slot(replica)
                if dropped:
                    self.state.index.drop(slot, dropped)
                if added:
                    self.state.index.add(slot, added, added_tokens)
        return not missed

    def expire(self, now: float) -> int:
        """No longer count the work of peers that have fallen silent; returns at how many replicas.

        Call this a few times a second.
        """
        count = 0
        for worker, peer in self._peers.items():
            if peer.at:
                for replica in [each for each, heard_at in peer.at.items() if now - heard_at > DEAD_AFTER_S]:
                    replica.work.peer(worker.hex(), None, now)
                    del peer.at[replica]
                    count += 1
        return count

    def believes(self, replica: Replica, epoch: int) -> bool:
        """Whether what was said of a cache in this epoch (of `epoch_tag`) holds for the cache as it is now."""
        own = epoch_tag(replica.epoch)
        if epoch == 0:
            return True  # of a worker that has only just begun
        if own == 0:
            if self._assumed.setdefault(replica, epoch) != epoch:
                self._assumed[replica] = epoch
                self.state.index.reset(self.state.slot(replica))
            return True
        self._check_assumed()
        return own == epoch

    @property
    def replicas(self) -> Iterable[Replica]:
        return tuple(self._identities)

    def knows(self, replica: Replica) -> bool:
        """Whether it is in this pool now."""
        return replica in self._identities

    def identity(self, replica: Replica) -> bytes:
        """How this replica is called in messages."""
        return self._identities[replica]

    def replica(self, identity: bytes) -> Replica | None:
        """None: it is not in this pool."""
        return self._by_identity.get(identity)

    def _check_assumed(self) -> None:
        """Forget what was believed of caches that turned out to be gone."""
        for replica in [each for each in self._assumed if each.epoch is not None]:
            if self._assumed.pop(replica) != epoch_tag(replica.epoch):
                self.state.index.reset(self.state.slot(replica))

    def _acquaint(self, worker: bytes, number: int, now: float) -> _Peer:
        if len(self._peers) >= MAX_PEERS:
            longest = min(self._peers, key=lambda each: self._peers[each].heard_at)
            self._drop_work(longest, self._peers.pop(longest), now)
        peer = self._peers[worker] = _Peer(now, number)
        return peer

    def _drop_work(self, worker: bytes, peer: _Peer, now: float) -> None:
        for replica in peer.at:
            replica.work.peer(worker.hex(), None, now)
        peer.at.clear()

    def _part(self, replica: Replica) -> None:
        """This replica is no longer in the pool, or this worker shares no more."""
        work = replica.work
        work.on_change = None
        self._by_work.pop(work, None)
        self._busy.pop(replica, None)
        self._assumed.pop(replica, None)
        for worker, peer in self._peers.items():
            if peer.at.pop(replica, None) is not None:
                work.peer(worker.hex(), None, work.since)


def epoch_tag(epoch: str | None) -> int:
    """An epoch in 32 bits; 0: not known."""
    return 0 if epoch is None else zlib.crc32(epoch.encode()) or 1


def _records(identity: bytes, totals: Totals | None, news: _News | None) -> Iterator[bytes]:
    """One record, or several where there is much to say."""
    head = b"" if totals is None else _TOTALS.pack(*_fitting(totals))
    flags = 0 if totals is None else _HAS_TOTALS
    if news is None:
        yield _RECORD.pack(identity, flags) + head
        return
    added, dropped = list(news.added.items()), list(news.dropped)
    epoch = epoch_tag(news.epoch)
    while added or dropped or flags & _HAS_TOTALS:
        some, gone = added[:_MAX_DIGESTS], dropped[:_MAX_DIGESTS]
        yield b"".join(
            (
                _RECORD.pack(identity, flags | _HAS_INDEX),
                head,
                _INDEX.pack(epoch, len(some), len(gone)),
                struct.pack(f"<{len(some)}Q", *(digest for digest, _ in some)),
                struct.pack(f"<{len(some)}I", *(min(tokens, 0xFFFFFFFF) for _, tokens in some)),
                struct.pack(f"<{len(gone)}Q", *gone),
            )
        )
        added, dropped = added[_MAX_DIGESTS:], dropped[_MAX_DIGESTS:]
        head, flags = b"", 0


def _fitting(totals: Totals) -> Totals:
    """As far as a message has room for it. Below nothing there is only a defect."""
    return Totals(
        min(max(totals.queued, 0), 0xFFFF),
        min(max(totals.queued_tokens, 0), 0xFFFFFFFF),
        min(max(totals.running, 0), 0xFFFF),
        min(max(totals.running_tokens, 0), 0xFFFFFFFF),
    )


def _parsed(
    message: bytes, count: int
) -> Iterator[tuple[bytes, Totals | None, int, Sequence[Digest], Sequence[int], Sequence[Digest]]]:
    """Of each record: replica, totals, epoch, digests added, their tokens, digests dropped. Raises `struct.error`."""
    at = _HEAD.size
    for _ in range(count):
        identity, flags = _RECORD.unpack_from(message, at)
        at += _RECORD.size
        totals, epoch = None, 0
        added: Sequence[Digest] = ()
        tokens: Sequence[int] = ()
        dropped: Sequence[Digest] = ()
        if flags & _HAS_TOTALS:
            totals = Totals(*_TOTALS.unpack_from(message, at))
            at += _TOTALS.size
        if flags & _HAS_INDEX:
            epoch, new, gone = _INDEX.unpack_from(message, at)
            at += _INDEX.size
            added = struct.unpack_from(f"<{new}Q", message, at)
            tokens = struct.unpack_from(f"<{new}I", message, at + 8 * new)
            dropped = struct.unpack_from(f"<{gone}Q", message, at + 12 * new)
            at += 12 * new + 8 * gone
        yield identity, totals, epoch, added, tokens, dropped
