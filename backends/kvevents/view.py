"""What a replica's KV cache holds, as far as its events tell: sizes for the admin page, no index for routing.

Bounded: beyond `max_blocks` on a rank further blocks are not followed, and the figures are lower bounds.

A block stored twice counts once, and is gone with its first removal. vLLM may hold copies of a block, and can be told
to report hits as stores again; so counting copies would sometimes keep blocks for ever that are gone. What is shown
here is rather too little than too much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backends.kvevents.decode import BlockHash, BlockRemoved, BlockStored
from backends.kvevents.stream import Doubt, StreamReport

DEFAULT_MEDIUM = "GPU"
"""What engines mean that name none."""
MAX_SPACES = 64
"""Pairs of a medium and a KV cache group; real engines have a handful."""


@dataclass(frozen=True, slots=True)
class RankSummary:
    """One rank of a replica."""

    trusted: bool
    reason: str
    blocks: Mapping[str, int]
    """By medium."""
    tokens: Mapping[str, int]
    """By medium; a token that is held by several groups of layers counts in each."""
    truncated: bool
    """There was more than is followed: the figures are lower bounds."""
    stream: StreamReport | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A replica, all its ranks."""

    trusted: bool
    """Every rank is; False without ranks."""
    blocks: Mapping[str, int]
    tokens: Mapping[str, int]
    ranks: Mapping[int, RankSummary]


class RankView:
    """The sink of one rank's stream, see `KvSink`."""

    def __init__(self, max_blocks: int) -> None:
        self.trusted = False
        self.reason = str(Doubt.CONNECTING)
        self._max_blocks = max_blocks
        self._total = 0
        self._truncated = False
        self._spaces: dict[tuple[str, int | None], dict[BlockHash, int]] = {}

    def stored(self, event: BlockStored) -> None:
        key = (event.medium or DEFAULT_MEDIUM, event.group)
        space = self._spaces.get(key)
        if space is None:
            if len(self._spaces) >= MAX_SPACES:
                self._truncated = True
                return
            space = self._spaces[key] = {}
        for block in event.block_hashes:
            if block not in space:
                if self._total >= self._max_blocks:
                    self._truncated = True
                    return
                self._total += 1
            space[block] = event.block_size

    def removed(self, event: BlockRemoved) -> None:
        key = (event.medium or DEFAULT_MEDIUM, event.group)
        space = self._spaces.get(key, {})
        for block in event.block_hashes:
            if space.pop(block, None) is not None:
                self._total -= 1
        if not space:
            self._spaces.pop(key, None)

    def cleared(self) -> None:
        self._spaces.clear()
        self._total = 0
        self._truncated = False

    def trust(self, trusted: bool, reason: str) -> None:
        self.trusted = trusted
        self.reason = reason

    def summary(self, stream: StreamReport | None = None) -> RankSummary:
        """What it holds now. Walks over all blocks: for pages, not for the way of a request."""
        blocks: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for (medium, _), space in self._spaces.items():
            blocks[medium] = blocks.get(medium, 0) + len(space)
            tokens[medium] = tokens.get(medium, 0) + sum(space.values())
        return RankSummary(self.trusted, self.reason, blocks, tokens, self._truncated, stream)


class KvView:
    """One replica: a sink for each of its ranks, and their sum."""

    def __init__(self, max_blocks: int = 250_000) -> None:
        """`max_blocks` bounds each rank; one costs about 100 bytes."""
        self._max_blocks = max_blocks
        self._ranks: dict[int, RankView] = {}

    def rank(self, number: int) -> RankView:
        """The sink of a data-parallel rank, made when it is first asked for."""
        return self._ranks.setdefault(number, RankView(self._max_blocks))

    def summary(self, streams: Mapping[int, StreamReport] | None = None) -> Summary:
        """All ranks now; `streams`: what their subscribers report."""
        reports = streams or {}
        ranks = {number: view.summary(reports.get(number)) for number, view in sorted(self._ranks.items())}
        blocks: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for rank in ranks.values():
            for medium, count in rank.blocks.items():
                blocks[medium] = blocks.get(medium, 0) + count
            for medium, count in rank.tokens.items():
                tokens[medium] = tokens.get(medium, 0) + count
        return Summary(bool(ranks) and all(rank.trusted for rank in ranks.values()), blocks, tokens, ranks)
