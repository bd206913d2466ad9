"""The KV cache of one engine: a tree of prompt segments with LRU eviction, leaves first.

A segment is a stretch of tokens that is only ever used whole or from its beginning: the part of a prompt that no other
prompt branches off from. A node holds the first `held` tokens of its segment, so blocks need no objects of their own
and a prompt of 100,000 tokens costs as much as one of 100. Equal to a tree of blocks (vLLM's prefix caching, SGLang's
radix tree), except that eviction takes whole blocks off the end of the oldest leaf, however many it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import TypeAlias

BLOCK = 16
"""Tokens that are found or evicted together."""

Path: TypeAlias = Sequence[tuple[int, int]]
"""Segments of a prompt in order: number and length in tokens. A number stands for all that comes before it as well."""


class Node:
    __slots__ = ("children", "held", "locks", "parent", "segment", "stamp")

    def __init__(self, segment: int, parent: Node | None) -> None:
        self.segment = segment
        self.parent = parent
        self.held = 0
        self.locks = 0
        self.stamp = 0
        self.children = 0


class Cache:
    """`tokens` are all it holds, `locked` those in nodes that running requests use."""

    __slots__ = ("_leaves", "_nodes", "_tick", "evicted", "locked", "tokens")

    def __init__(self) -> None:
        self._nodes: dict[int, Node] = {}
        self._leaves: list[tuple[int, int]] = []
        self._tick = 0
        self.tokens = 0
        self.locked = 0
        self.evicted = 0
        """Tokens, since the beginning."""

    @property
    def evictable(self) -> int:
        return self.tokens - self.locked

    def match(self, path: Path) -> tuple[int, int]:
        """Tokens of the path that are held, in whole blocks; and how many nodes they are in."""
        nodes = self._nodes
        found = depth = 0
        for segment, length in path:
            node = nodes.get(segment)
            if node is None or not node.held:
                break
            depth += 1
            if node.held < length:
                found += node.held
                break
            found += length
        return found - found % BLOCK, depth

    def lock(self, path: Path, begin: int, end: int) -> None:
        """Keep the nodes of the segments from number `begin` to before `end`."""
        nodes = self._nodes
        for segment, _ in path[begin:end]:
            node = nodes[segment]
            if not node.locks:
                self.locked += node.held
            node.locks += 1

    def unlock(self, path: Path, depth: int) -> None:
        """Let go of the first `depth` nodes, which were used just now."""
        self._tick = tick = self._tick + 1
        nodes = self._nodes
        node = None
        for segment, _ in path[:depth]:
            node = nodes[segment]
            node.locks -= 1
            node.stamp = tick
            if not node.locks:
                self.locked -= node.held
        if node is not None and not node.locks and not node.children:
            heappush(self._leaves, (tick, node.segment))

    def extend(self, segment: int, parent: int | None, held: int) -> int:
        """Have the node, which its caller has locked or locks next, hold at least `held`; how many are new."""
        node = self._nodes.get(segment)
        if node is None:
            above = None if parent is None else self._nodes[parent]
            node = self._nodes[segment] = Node(segment, above)
            if above is not None:
                above.children += 1
        added = held - node.held
        if added <= 0:
            return 0
        node.held = held
        self.tokens += added
        if node.locks:
            self.locked += added
        return added

    def evict(self, wanted: int) -> None:
        """Free `wanted` tokens at least, or all that nobody uses."""
        nodes, leaves = self._nodes, self._leaves
        while wanted > 0 and leaves:
            stamp, segment = leaves[0]
            node = nodes.get(segment)
            # One that has got a child since was used again: its stamp is another.
            if node is None or node.locks or node.stamp != stamp:
                heappop(leaves)
                continue
            kept = max(0, node.held - wanted)
            kept -= kept % BLOCK
            freed = node.held - kept
            wanted -= freed
            self.tokens -= freed
            self.evicted += freed
            node.held = kept
            if kept:
                break
            heappop(leaves)
            del nodes[segment]
            above = node.parent
            if above is not None:
                above.children -= 1
                if not above.children and not above.locks:
                    heappush(leaves, (above.stamp, above.segment))

    def flush(self) -> None:
        """Forget everything that nobody uses."""
        self.evict(self.tokens)
