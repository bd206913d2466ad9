"""Policies that send equal keys to equal places: the consistent hash, plain and with bounded loads.

The key is the session where the caller names one, otherwise the beginning of the prompt (its digest at the second
checkpoint, 1 KB or 256 tokens in), with the adapter. A request without either has no place, and any will do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from random import Random

from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from routing.policies.balanced import outstanding
from routing.types import InferenceRequest, Replica, View

MOST_NODES = 16_384
"""Of one replica, however heavy."""
_DIGESTED = "xxh3:"
FORGET_S = 3600.0
"""A replica that was no candidate for so long has its places on the ring taken away, when others come."""


def session_digest(session: str) -> str:
    """What stands for a session where its name is not to be told; of what is one already, the same."""
    if session.startswith(_DIGESTED) and "\0" not in session:  # a session as requests have it names its tenant
        return session
    return _DIGESTED + xxh3_128_hexdigest(session.encode("utf-8", "surrogatepass"))


def key_of(request: InferenceRequest) -> int | None:
    """64 bits that are equal for requests that belong together; None when nothing says which do."""
    prefix = request.prefix
    if request.session is not None:
        named = f"{request.adapter or ''}\0{session_digest(request.session)}".encode()
        return xxh3_64_intdigest(named)
    if prefix is None:
        return None
    if prefix.digests:
        digest = prefix.digests[min(1, len(prefix.digests) - 1)]
    elif prefix.tails:
        digest = prefix.tails[0][0]
    else:
        return None
    # Mixed once more: a ring is only as even as its keys, and a digest may come from a trace.
    return xxh3_64_intdigest(digest.to_bytes(8, "little") + (request.adapter or "").encode())


class Ring:
    """Replicas as points on a circle of 64-bit numbers, in proportion to weight; a key belongs to the next point.

    Replicas that are not candidates are passed over rather than taken out, so a request that may not go to its place
    goes to the next one, and everybody else's stays. Places depend on address and rank only, not on order or on this
    process: all gateways have the same ring.
    """

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._seen: dict[Replica, float] = {}
        self._owners: dict[int, Replica] = {}
        self._points: list[int] = []

    def __deepcopy__(self, memo: object) -> Ring:
        """Itself: what it learns of candidates changes nobody's place, and it can be large."""
        return self

    def walk(self, key: int, candidates: Sequence[Replica], now: float) -> Iterator[Replica]:
        """The candidates, each once, in the order in which they come after the key."""
        self._note(candidates, now)
        points, owners = self._points, self._owners
        left = set(candidates)
        start = bisect_left(points, key)
        for index in range(start, start + len(points)):
            owner = owners[points[index % len(points)]]
            if owner in left:
                left.remove(owner)
                yield owner
                if not left:
                    return
        # Two names for one engine share its points: only the later of them was found.
        yield from (replica for replica in candidates if replica in left)

    def _note(self, candidates: Sequence[Replica], now: float) -> None:
        seen = self._seen
        new = [replica for replica in candidates if replica not in seen]
        seen.update(dict.fromkeys(candidates, now))
        if not new:
            return
        gone = {replica for replica, at in seen.items() if now - at > FORGET_S}
        if gone:
            for replica in gone:
                del seen[replica]
            self._owners = {point: owner for point, owner in self._owners.items() if owner not in gone}
        for replica in new:
            identity = replica.identity
            for number in range(min(MOST_NODES, max(1, round(self._nodes * replica.weight)))):
                self._owners[xxh3_64_intdigest(f"{identity}{number}".encode())] = replica
        self._points = sorted(self._owners)


class ConsistentHash:
    """The replica whose point on the ring comes next (Karger et al., STOC 1997), whatever its load; 160 points per unit
    of weight as in vllm-project/router's `consistent_hash`."""

    name = "consistent_hash"
    wants_prefix = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._ring = Ring(nodes=160)

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        key = key_of(request)
        if key is None:
            return self._rng.choice(candidates)
        return next(self._ring.walk(key, candidates, view.now))


class BoundedHash:
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350) as KubeAI has it
    (`internal/loadbalancer/balance_chwbl.go`, strategy PrefixHash): the first replica after the key's place that with
    this request has at most 125 % of the mean; 256 points per replica. When nobody has so few, the first one all the
    same, which is so whenever there are, this one included, fewer requests than four fifths of the replicas.

    Where weights differ, the mean is shared out by weight (KubeAI has none). KubeAI's key is the adapter and the
    prompt's first 100 characters.
    """

    name = "bounded_hash"
    wants_prefix = True
    LOAD_FACTOR = 1.25

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._ring = Ring(nodes=256)

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        key = key_of(request)
        if key is None:
            key = self._rng.getrandbits(64)
        total = sum(map(outstanding, candidates))
        weights = sum(replica.weight for replica in candidates)
        first: Replica | None = None
        for replica in self._ring.walk(key, candidates, view.now):
            bound = self.LOAD_FACTOR * (total + 1) * replica.weight / weights
            if total == 0 or outstanding(replica) + 1 <= bound:
                return replica
            first = first or replica
        return first or candidates[0]
