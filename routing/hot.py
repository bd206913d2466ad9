"""The most used beginnings of prompts, each with a request that has it: what a new replica is to read first.

Counted over a sample of the requests, by the digests of their prefixes (`routing.prefix`): a tree whose nodes are
checkpoints. How often a node came is counted by Space-Saving (Metwally, Agrawal, El Abbadi: Efficient Computation of
Frequent and Top-k Elements in Data Streams, ICDT 2005, https://doi.org/10.1007/978-3-540-30570-5_27): of `MAX_NODES`
counters the least one is given to what is new, with its count, so that what comes often is always among them. Counts
fade by half every `HALF_LIFE_S`; not they are made smaller but what comes later counts more (forward decay: Cormode,
Shkapenyuk, Srivastava, Xu, ICDE 2009, https://doi.org/10.1109/ICDE.2009.65), which leaves their order as it is.

A request is kept for the deepest node of its path that came at least half as often as the one before, or is much used
among all (`MUCH`): of prompts `A B x1`, `A B x2`, `A C y1` in equal numbers that is `A B` or `A C`, and not `A B x1`.
A beginning is not chosen beside a longer one that has at least half of its uses (`hottest`).

Prompts are held in memory, by their requests, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from routing.prefix import Digest

T = TypeVar("T")

MAX_NODES = 1024
NEW_NODES = 4
"""Added for one request at most: what it has beyond is most likely its own, and what is not grows with the next."""
MAX_SAMPLES = 64
MAX_SAMPLES_BYTES = 8 * 1024 * 1024
MAX_SAMPLE_BYTES = 1024 * 1024
"""Of one request. A longer one says little about what others begin with."""
HALF_LIFE_S = 600.0
MUCH = 1 / 32
"""Part of all counted requests that makes a beginning worth knowing, however much more those have that share less of
it: a system prompt of one application of many that begin with the same greeting."""
LEAST = 1.5
"""A beginning that came less often, what faded left out, is nobody's but one caller's."""
_LARGEST = 1e200


@dataclass(slots=True)
class Node:
    """One checkpoint on the way of counted prompts."""

    digest: Digest
    parent: Digest | None
    count: float
    """In the weights of the time when it was counted, see `HotPrefixes`."""
    inherited: float = 0.0
    """Of that, what the counter held when it was given to this one: by so much it may be too high."""


@dataclass(slots=True)
class Sample(Generic[T]):
    """One request that begins so."""

    digest: Digest
    regions: tuple[str, ...]
    """The only ones it may be sent to; empty: any."""
    request: T
    size_bytes: int
    noted_at: float


@dataclass(slots=True)
class Hot(Generic[T]):
    """A beginning that is much used."""

    sample: Sample[T]
    uses: float
    """How many of the counted requests began so, of which one counts half after `HALF_LIFE_S`."""


@dataclass(slots=True)
class HotPrefixes(Generic[T]):
    """Of one model. `now` is in seconds of any one monotonic clock."""

    _nodes: dict[Digest, Node] = field(default_factory=dict)
    _least: list[tuple[float, Digest]] = field(default_factory=list)
    """A heap; an entry whose node has come again since is put right when it comes to the top."""
    _samples: dict[tuple[Digest, tuple[str, ...]], Sample[T]] = field(default_factory=dict)
    _bytes: int = 0
    _begun: float | None = None
    """When a request counted 1."""
    _total: float = 0.0

    @property
    def sample_count(self) -> int:
        return len(self._samples)

    @property
    def sample_bytes(self) -> int:
        return self._bytes

    def count(self, digests: Sequence[Digest], now: float) -> Digest | None:
        """Count one request by its checkpoints, the shortest first. Returns the one that it would be kept for; None
        when it has no beginning that others share."""
        weight = self._weight(now)
        self._total += weight
        least, much = LEAST * weight, MUCH * self._total
        nodes = self._nodes
        parent: Digest | None = None
        kept: Digest | None = None
        before = 0.0
        shared, added = True, 0
        for digest in digests:
            node = nodes.get(digest)
            if node is not None:
                node.count += weight
            elif added < NEW_NODES:
                node = self._add(digest, parent, weight)
                added += 1
            else:
                break
            if shared:
                surely = node.count - node.inherited
                shared = surely >= least and (2.0 * surely >= before or surely >= much)
                if shared:
                    kept, before = digest, surely
            parent = digest
        return kept

    def wants(self, digest: Digest, regions: tuple[str, ...], size_bytes: int, now: float) -> bool:
        """Whether a request of that size should be kept for this checkpoint: there is none, or a longer one (what
        comes after the common part is read for nothing), or one that has grown old."""
        if size_bytes > MAX_SAMPLE_BYTES or digest not in self._nodes:
            return False
        held = self._samples.get((digest, regions))
        return held is None or size_bytes < held.size_bytes or now - held.noted_at > HALF_LIFE_S

    def keep(self, digest: Digest, regions: tuple[str, ...], request: T, size_bytes: int, now: float) -> None:
        """Keep a request that is wanted; the least used ones make room."""
        self._drop((digest, regions))
        self._samples[digest, regions] = Sample(digest, regions, request, size_bytes, now)
        self._bytes += size_bytes
        while len(self._samples) > MAX_SAMPLES or self._bytes > MAX_SAMPLES_BYTES:
            self._drop(min(self._samples, key=lambda key: self._nodes[key[0]].count))

    def hottest(self, most: int, now: float, region: str | None = None) -> list[Hot[T]]:
        """The most used beginnings that may be sent to a region, the hottest first.

        One that is the beginning of another one with at least half of its uses is left out: reading the longer one is
        reading both.
        """
        floor = LEAST * self._weight(now)
        usable = [each for each in self._samples.values() if not each.regions or region in each.regions]
        # Without a region lock first: of two for one beginning, that one may go anywhere.
        usable.sort(key=lambda each: (-self._nodes[each.digest].count, len(each.regions) > 0))
        chosen: list[Sample[T]] = []
        covered: set[Digest] = set()
        for each in usable:
            if each.digest in covered or self._nodes[each.digest].count < floor:
                continue
            path = self._path(each.digest)
            most_of = 2.0 * self._nodes[each.digest].count
            standing = next(
                (
                    place
                    for place, other in enumerate(chosen)
                    if other.digest in path and most_of >= self._nodes[other.digest].count
                ),
                None,
            )
            if standing is not None:
                chosen[standing] = each  # the longer one takes the place of its beginning
            elif len(chosen) < most:
                chosen.append(each)
            else:
                continue
            covered |= path
        weight = self._weight(now)
        return [Hot(each, self._nodes[each.digest].count / weight) for each in chosen]

    def _path(self, digest: Digest) -> set[Digest]:
        """The checkpoint and those before it."""
        found = {digest}
        node = self._nodes.get(digest)
        while node is not None and node.parent is not None and node.parent not in found:
            found.add(node.parent)
            node = self._nodes.get(node.parent)
        return found

    def _weight(self, now: float) -> float:
        """What a request counts now: twice as much as one `HALF_LIFE_S` ago."""
        if self._begun is None:
            self._begun = now
        weight: float = 2.0 ** ((now - self._begun) / HALF_LIFE_S)
        if weight > _LARGEST:
            self._renew(weight)
            self._begun, weight = now, 1.0
        return weight

    def _renew(self, by: float) -> None:
        """Count as if this were the beginning, before the numbers grow too large: after some days."""
        for node in self._nodes.values():
            node.count /= by
            node.inherited /= by
        self._total /= by
        self._least = [(node.count, node.digest) for node in self._nodes.values()]
        heapify(self._least)

    def _add(self, digest: Digest, parent: Digest | None, weight: float) -> Node:
        inherited = self._replace_least() if len(self._nodes) >= MAX_NODES else 0.0
        node = Node(digest, parent, inherited + weight, inherited)
        self._nodes[digest] = node
        heappush(self._least, (node.count, digest))
        return node

    def _replace_least(self) -> float:
        """Take the least node out; returns its count."""
        while True:
            queued, digest = heappop(self._least)
            node = self._nodes[digest]
            if node.count > queued:
                heappush(self._least, (node.count, digest))
                continue
            del self._nodes[digest]
            for key in [key for key in self._samples if key[0] == digest]:
                self._drop(key)
            return node.count

    def _drop(self, key: tuple[Digest, tuple[str, ...]]) -> None:
        sample = self._samples.pop(key, None)
        if sample is not None:
            self._bytes -= sample.size_bytes
