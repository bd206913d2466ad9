from __future__ import annotations

from backends.kvevents.decode import BlockRemoved, BlockStored
from backends.kvevents.stream import EventStream
from backends.kvevents.view import MAX_SPACES, KvView


def block(*hashes: int, medium: str | None = None, group: int | None = None, size: int = 16) -> BlockStored:
    return BlockStored(hashes, None, (), size, medium=medium, group=group)


def test_blocks_and_tokens_by_medium() -> None:
    rank = KvView().rank(0)
    rank.stored(block(1, 2))
    rank.stored(block(2, 3, medium="GPU"))  # 2 is there already, and no medium means the GPU
    rank.stored(block(1, medium="CPU", size=32))
    rank.removed(BlockRemoved((1, 99)))
    summary = rank.summary()
    assert (summary.blocks, summary.tokens) == ({"GPU": 2, "CPU": 1}, {"GPU": 32, "CPU": 32})
    rank.cleared()
    assert rank.summary().blocks == {}


def test_groups_hold_the_same_hash_each_for_itself() -> None:
    rank = KvView().rank(0)
    rank.stored(block(1, group=0))
    rank.stored(block(1, group=1))
    rank.removed(BlockRemoved((1,), group=0))
    assert rank.summary().blocks == {"GPU": 1}


def test_it_stays_within_its_bounds_and_says_so() -> None:
    view = KvView(max_blocks=3)
    rank = view.rank(0)
    rank.stored(block(1, 2, 3, 4))
    assert (rank.summary().blocks, rank.summary().truncated) == ({"GPU": 3}, True)
    rank.removed(BlockRemoved((1, 4)))
    rank.stored(block(5))
    assert rank.summary().blocks == {"GPU": 3}
    rank.cleared()
    assert not rank.summary().truncated
    for n in range(MAX_SPACES + 5):
        view.rank(1).stored(BlockStored((), None, (), 16, medium=f"m{n}"))
    assert len(view.rank(1).summary().blocks) == MAX_SPACES
    assert view.rank(1).summary().truncated


def test_a_replica_is_trusted_when_all_its_ranks_are() -> None:
    view = KvView()
    assert not view.summary().trusted
    view.rank(0).trust(True, "complete")
    view.rank(1).stored(block(7))
    assert not view.summary().trusted
    view.rank(1).trust(True, "complete")
    view.rank(0).stored(block(7, 8))
    stream = EventStream(view.rank(0), replay=False)
    summary = view.summary({0: stream.report()})
    assert (summary.trusted, summary.blocks, summary.tokens) == (True, {"GPU": 3}, {"GPU": 48})
    assert summary.ranks[0].stream is not None
    assert summary.ranks[1].stream is None
