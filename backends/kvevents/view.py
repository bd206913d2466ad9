"""What a replica's KV cache holds, as far as its events tell: sizes for the admin page, and for routing to check its
beliefs against; no index.

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
        self.truncated = False
        self._spaces: dict[tuple[str, int | None], dict[BlockHash, int]] = {}
        self._tokens: dict[tuple[str, int | None], int] = {}
        """Of each space, so that nobody has to walk over its blocks."""

    @property
    def held_tokens(self) -> int:
        """Tokens that it holds: of its media and groups the one with most, since others hold the same once more."""
        return max(self._tokens.values(), default=0)

    def stored(self, event: BlockStored) -> None:
        key = (event.medium or DEFAULT_MEDIUM, event.group)
        space = self._spaces.get(key)
        if space is None:
            if len(self._spaces) >= MAX_SPACES:
                self.truncated = True
                return
            space = self._spaces[key] = {}
        for block in event.block_hashes:
            if block not in space:
                if self._total >= self._max_blocks:
                    self.truncated = True
                    return
                self._total += 1
            self._tokens[key] = self._tokens.get(key, 0) + event.block_size - space.get(block, 0)
            space[block] = event.block_size

    def removed(self, event: BlockRemoved) -> None:
        key = (event.medium or DEFAULT_MEDIUM, event.group)
        space = self._spaces.get(key, {})
        for block in event.block_hashes:
            size = space.pop(block, None)
            if size is not None:
                self._total -= 1
                self._tokens[key] -= size
        if not space:
            self._spaces.pop(key, None)
            self._tokens.pop(key, None)

    def cleared(self) -> None:
        self._spaces.clear()
        self._tokens.clear()
        self._total = 0
        self.truncated = False

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
        return RankSummary(self.trusted, self.reason, blocks, tokens, self.truncated, stream)


class KvView:
    """One replica: a sink for each of its ranks, and their sum."""

    def __init__(self, max_blocks: int = 250_000) -> None:
        """`max_blocks` bounds each rank; one costs about 100 bytes."""
        self._max_blocks = max_blocks
        self._ranks: dict[int, RankView] = {}

    def rank(self, number: int) -> RankView:
        """The sink of a data-parallel rank, made when it is first asked for."""
        return self._ranks.setdefault(number, RankView(self._max_blocks))

    @property
    def trusted(self) -> bool:
        """Every rank is; False without ranks."""
        return bool(self._ranks) and all(rank.trusted for rank in self._ranks.values())

    @property
    def held_tokens(self) -> int:
        """Tokens that all ranks hold together."""
        return sum(rank.held_tokens for rank in self._ranks.values())

    @property
    def truncated(self) -> bool:
        """Some rank holds more than is followed."""
        return any(rank.truncated for rank in self._ranks.values())

    @property
    def doubts(self) -> list[str]:
        """Why ranks are not trusted, each reason once; nothing of those that were not heard yet."""
        reasons = {rank.reason for rank in self._ranks.values() if not rank.trusted}
        return sorted(reasons - {str(Doubt.CONNECTING)})

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
        return Summary(self.trusted, blocks, tokens, ranks)
