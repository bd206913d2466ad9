"""SGLang's `cache_aware` as it really behaves, with the tree that it keeps for itself.

Sources: sgl-project/sglang `sgl-model-gateway/src/policies/{cache_aware,tree,mod}.rs`, and its successor
lightseekorg/smg `model_gateway/src/policies/cache_aware.rs`, from which the order among equals comes (load, requests so
far, place).

What differs: the tree is over the checkpoints of the prompt instead of its characters, so a match may be up to an
eighth short where a prompt leaves the path between two; the ends of former prompts are in it, so a conversation's next
turn is matched whole. Load is of all gateways. A replica that was no candidate for an hour is forgotten (SMG never
forgets one whose part of the tree fits). Sizes are in the prefix's own units: characters of text, or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from random import Random

from routing.policies.balanced import outstanding
from routing.prefix import Digest, Prefix
from routing.types import InferenceRequest, Replica, View

FORGET_S = 3600.0


@dataclass(frozen=True, slots=True)
class Settings:
    cache_threshold: float = 0.5
    """Part of the prompt that must be matched, and more, for the match to decide."""
    balance_abs_threshold: int = 32
    balance_rel_threshold: float = 1.1
    """Both must be exceeded, by the difference and by the ratio of most to least load, for the match to be ignored."""
    eviction_interval_s: float = 30.0
    max_tree_size: int = 10_000
    """Of one replica's part of the tree; larger ones are cut down at the next eviction."""


LIBRARY = Settings()
"""`CacheAwareConfig::default()` in `policies/mod.rs`."""
COMMAND_LINE = Settings(0.3, 64, 1.5, 120.0, 2**26)
"""Those of `sgl-model-gateway/src/main.rs` and the Python launcher's `router_args.py`."""


class _Node:
    __slots__ = ("children", "digest", "length", "owner", "parent", "tenants")

    def __init__(self, digest: Digest, parent: _Node | None, length: int, owner: Replica | None) -> None:
        self.digest = digest
        self.parent = parent
        self.length = length
        self.owner = owner
        """The one tenant that a match here names: whoever made the node, as long as it holds it."""
        self.tenants: dict[Replica, int] = {}
        """When each last ended a prompt here, or was matched; 0 where it only passed."""
        self.children: set[_Node] = set()

    def leaf_of(self, tenant: Replica) -> bool:
        return tenant in self.tenants and not any(tenant in child.tenants for child in self.children)


class Tree:
    """Which replicas were sent which prefixes. Every node knows all of its tenants, but names only one of them."""

    def __init__(self) -> None:
        self._root = _Node(0, None, 0, None)
        self._nodes: dict[Digest, _Node] = {}
        self._clock = 0
        self.sizes: dict[Replica, int] = {}
        """Units of prefix by tenant."""

    def match(self, prefix: Prefix) -> tuple[int, Replica | None]:
        """Units matched, whoever holds them, and the one tenant of the deepest node."""
        node, matched = self._find(prefix)
        if node.owner not in node.tenants:
            node.owner = next(iter(node.tenants), None)
        self._clock += 1
        if self._clock % 8 == 0 and node.owner is not None:  # one in eight, to save them writes
            node.tenants[node.owner] = self._clock
        return matched, node.owner

    def _find(self, prefix: Prefix) -> tuple[_Node, int]:
        """The deepest node on the prompt's way, and units up to it."""
        node, matched = self._root, 0
        for digest, end in zip(prefix.digests, prefix.ends, strict=True):
            found = self._nodes.get(digest)
            if found is None:
                break
            node, matched = found, end
        for digest, end in prefix.tails:
            if end <= matched:
                break
            found = self._nodes.get(digest)
            if found is not None:
                node, matched = found, end
                break
        return node, matched

    def insert(self, prefix: Prefix, tenant: Replica) -> None:
        parent, before = self._root, 0
        for digest, end in self._path(prefix):
            node = self._nodes.get(digest)
            if node is None:
                node = self._nodes[digest] = _Node(digest, parent, end - before, tenant)
                parent.children.add(node)
            if tenant not in node.tenants:
                node.tenants[tenant] = 0
                self.sizes[tenant] = self.sizes.get(tenant, 0) + node.length
            parent, before = node, end
        if parent is not self._root:
            self._clock += 1
            parent.tenants[tenant] = self._clock

    def _path(self, prefix: Prefix) -> Iterator[tuple[Digest, int]]:
        """The nodes that the prompt goes through: its checkpoints, ends of former prompts, and its own end."""
        ends = dict(zip(prefix.ends, prefix.digests, strict=True))
        for number, (digest, end) in enumerate(prefix.tails):
            if end not in ends and (number == 0 or digest in self._nodes):
                ends[end] = digest
        for end in sorted(ends):
            yield ends[end], end

    def evict(self, max_size: int, gone: Sequence[Replica] = ()) -> None:
        """Cut each tenant's part down to `max_size`, those of `gone` to nothing: leaves first, longest unused first.

        A node that becomes a leaf by that is as old as its own last use, so branches go whole.
        """
        limits = {tenant: 0 if tenant in gone else max_size for tenant in self.sizes}
        large = {tenant for tenant, size in self.sizes.items() if size > limits[tenant]}
        if not large:
            return
        heap = [
            (node.tenants[tenant], number, tenant, node)
            for number, (node, tenant) in enumerate(
                (node, tenant) for node in self._nodes.values() for tenant in large & node.tenants.keys()
            )
            if node.leaf_of(tenant)
        ]
        number = len(self._nodes) * len(large)  # two of one age must not be compared any further
        heapify(heap)
        while heap:
            _, _, tenant, node = heappop(heap)
            if self.sizes[tenant] <= limits[tenant] or not node.leaf_of(tenant):
                continue
            self.sizes[tenant] -= node.length
            del node.tenants[tenant]
            parent = node.parent
            assert parent is not None
            if not node.tenants and not node.children:
                parent.children.discard(node)
                del self._nodes[node.digest]
            if parent.leaf_of(tenant):
                number += 1
                heappush(heap, (parent.tenants[tenant], number, tenant, parent))
        for tenant in gone:
            self.sizes.pop(tenant, None)


class _Glance(Tree):
    """A look into a tree that leaves no trace there."""

    def __init__(self, tree: Tree) -> None:
        self._root, self._nodes, self.sizes = tree._root, tree._nodes, tree.sizes

    def match(self, prefix: Prefix) -> tuple[int, Replica | None]:
        node, matched = self._find(prefix)
        return matched, node.owner if node.owner in node.tenants else next(iter(node.tenants), None)

    def insert(self, prefix: Prefix, tenant: Replica) -> None: ...

    def evict(self, max_size: int, gone: Sequence[Replica] = ()) -> None: ...


class CacheAware:
    """To the tenant of the longest match when that is more than a threshold of the prompt, else the least loaded; and
    without regard to any match when loads are out of balance.

    Out of balance is when max - min > `balance_abs_threshold` and max > `balance_rel_threshold` x min, in requests.
    When the tenant may not be used, the first candidate gets the request, and the tree does not learn of it.
    """

    wants_prefix = True

    def __init__(self, name: str, settings: Settings, rng: Random) -> None:
        self.name = name
        self.settings = settings
        self.tree = Tree()
        self._processed: dict[Replica, int] = {}
        self._seen: dict[Replica, float] = {}
        self._evict_at = 0.0

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        settings, prefix = self.settings, request.prefix
        self._seen.update(dict.fromkeys(candidates, view.now))
        if view.now >= self._evict_at:
            self._evict(view.now)
        loads = [outstanding(replica) for replica in candidates]
        least, most = min(loads), max(loads)
        imbalanced = most - least > settings.balance_abs_threshold and most > settings.balance_rel_threshold * least
        chosen: Replica | None = None
        if prefix is not None and not imbalanced:
            matched, tenant = self.tree.match(prefix)
            if prefix.total and matched / prefix.total > settings.cache_threshold:
                if tenant is None or tenant not in candidates:
                    return candidates[0]
                chosen = tenant
        if chosen is None:
            processed = self._processed
            _, _, place = min(
                (load, processed.get(replica, 0), place)
                for place, (replica, load) in enumerate(zip(candidates, loads, strict=True))
            )
            chosen = candidates[place]
        if prefix is not None:
            self.tree.insert(prefix, chosen)
        self._processed[chosen] = self._processed.get(chosen, 0) + 1
        return chosen

    def rehearsal(self) -> CacheAware:
        """One that chooses as this one would, and learns nothing; a copy of the tree could take seconds."""
        twin = copy(self)
        twin.tree = _Glance(self.tree)
        twin._processed, twin._seen = dict(self._processed), dict(self._seen)
        return twin

    def _evict(self, now: float) -> None:
        self._evict_at = now + self.settings.eviction_interval_s
        gone = [replica for replica, at in self._seen.items() if now - at > FORGET_S]
        self.tree.evict(self.settings.max_tree_size, gone)
        for replica in gone:
            del self._seen[replica]
            self._processed.pop(replica, None)
