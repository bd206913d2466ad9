"""What an engine's KV-cache events change in what routing believes."""

from __future__ import annotations

import msgspec
import pytest

from backends.kvevents.decode import BlockHash, BlockRemoved, BlockStored, decode_batch
from backends.kvevents.stream import EventStream
from backends.kvevents.view import KvView
from gateway.watch.kv_index import KvBridge, Seeds, Sinks
from routing.keys import seed_of, token_prefix
from routing.prefix import Prefix
from routing.router import PoolState
from routing.types import Replica
from tests.backends.kvevents.publisher import CLEARED, packed, removed, stored
from tests.backends.kvevents.test_decode import recorded

SEED = seed_of("m")
SALTED = seed_of("m", scope="salt")


def seeds(adapter: str | None, salt: str | None) -> int | None:
    if adapter is not None:
        return None
    return SALTED if salt else SEED


def prompt(number: int, tokens: int = 1024) -> Prefix:
    return token_prefix([number] * tokens, SEED)


class Engine:
    """A stream of one rank and all that listens to it."""

    def __init__(self, seeds: Seeds | None = None, replay: bool = False) -> None:
        self.state = PoolState()
        self.replica = Replica("r", "pool", "http://r", "vllm")
        self.view = KvView()
        self.news = 0
        self.bridge = KvBridge(self.state, self.replica, self.view, seeds=seeds, on_trust=self._told)
        self.stream = EventStream(Sinks(self.view.rank(0), self.bridge), replay=replay)
        self.sequence = 0

    def _told(self) -> None:
        self.news += 1

    def says(self, *events: object) -> None:
        self.stream.batch(self.sequence, packed(*events))
        self.sequence += 1

    def dispatch(self, *prompts: Prefix) -> None:
        for each in prompts:
            self.state.index.insert(self.slot, each)

    def finish(self, each: Prefix) -> None:
        self.state.index.learn(self.slot, each, 0, 0)

    @property
    def slot(self) -> int:
        return self.state.slot(self.replica)

    def match(self, asked: Prefix) -> int:
        return self.state.index.match(asked).get(self.slot, 0)

    def stores(self, first: int, number: int, tokens: int = 1024) -> None:
        """A prompt of blocks of 128 tokens, named from `first` on."""
        names = range(first, first + tokens // 128)
        self.says(stored(*names, tokens=128, token_ids=[number] * tokens))


def test_a_flush_empties_what_is_believed() -> None:
    engine = Engine()
    engine.stores(0, 1)
    engine.dispatch(prompt(1))
    engine.says(CLEARED)
    assert engine.match(prompt(1)) == 0
    engine.dispatch(prompt(1))
    engine.stream.restarted()
    assert engine.match(prompt(1)) == 0


def test_a_flush_that_is_read_in_the_past_of_a_stream_does_not() -> None:
    engine = Engine(replay=True)
    engine.dispatch(prompt(1))
    engine.stream.connected()
    engine.stream.replayed(0, packed(CLEARED))
    engine.stream.replay_ended()
    assert engine.match(prompt(1)) == 1024


def test_of_what_an_engine_drops_the_same_part_is_given_up_the_oldest_first() -> None:
    engine = Engine()
    for number in range(4):
        engine.stores(100 * number, number)
    engine.dispatch(*map(prompt, range(4)))
    # Half of what it holds are others' prompts.
    engine.says(stored(*range(1000, 1032), tokens=128))
    engine.says(removed(*range(1000, 1016)))
    assert engine.match(prompt(0)) < 1024
    assert engine.match(prompt(3)) == 1024
    believed = engine.state.index.tokens(engine.slot)
    assert 2500 <= believed <= 3300
    engine.says(removed(*range(1016, 1032), *range(200, 208), *range(300, 308)))
    assert engine.state.index.tokens(engine.slot) <= engine.view.held_tokens == 2048
    assert engine.match(prompt(3)) == 1024


def test_removals_token_by_token_take_no_more_than_their_sum() -> None:
    engine = Engine()
    engine.says(stored(*range(4096), tokens=1, token_ids=[0] * 4096))
    engine.dispatch(*map(prompt, range(4)))
    for block in range(1024):
        engine.says(removed(block))
    assert 2600 <= engine.state.index.tokens(engine.slot) <= 3300


def test_a_stream_that_is_not_trusted_takes_nothing_away() -> None:
    engine = Engine()
    engine.sequence = 5  # joined late
    for number in range(4):
        engine.stores(100 * number, number)
    engine.dispatch(*map(prompt, range(4)))
    believed = engine.state.index.tokens(engine.slot)
    engine.says(removed(*range(0, 8), *range(100, 108)))
    assert engine.state.index.tokens(engine.slot) == believed
    assert engine.view.doubts == ["late_join"]
    assert engine.news == 1


def test_prompts_that_came_another_way_are_known_by_their_tokens() -> None:
    engine = Engine(seeds)
    engine.stores(0, 1)
    assert engine.match(prompt(1)) == 1024
    engine.says(stored(50, tokens=128, parent_block_hash=7, token_ids=[9] * 128))
    assert engine.match(token_prefix([1] * 1024 + [9] * 128, SEED)) == 1152
    engine.says(removed(50, 7))
    assert engine.match(prompt(1, 1024)) == 896
    engine.says(removed(*range(7)))
    assert engine.match(prompt(1)) == 0


def test_what_a_request_is_bringing_there_is_not_taken_away() -> None:
    engine = Engine(seeds)
    engine.dispatch(prompt(1))
    engine.stores(0, 2)
    engine.says(removed(*range(8)))
    assert engine.match(prompt(1)) == 1024
    assert engine.match(prompt(2)) == 0
    engine.stores(0, 1)
    engine.finish(prompt(1))
    engine.says(removed(4, 5, 6, 7))
    assert engine.match(prompt(1)) == 512


def test_other_adapters_salts_contents_and_groups_are_kept_apart() -> None:
    engine = Engine(seeds)
    engine.says(stored(1, tokens=128, lora_name="other"))
    engine.says(stored(2, tokens=128, extra_keys=[[["image", 0]]]))
    engine.says(stored(3, tokens=128, group_idx=1))
    assert engine.state.index.tokens(engine.slot) == 0
    engine.says(stored(4, tokens=128, token_ids=[1] * 128, extra_keys=[["pepper"]]))
    assert engine.match(prompt(1, 128)) == 0
    assert engine.match(token_prefix([1] * 128, SALTED)) == 128
    engine.says(stored(5, tokens=128, token_ids=[1] * 128, parent_block_hash=4))
    assert engine.match(token_prefix([1] * 256, SALTED)) == 256


def test_a_view_that_can_not_follow_all_takes_nothing_away() -> None:
    engine = Engine()
    engine.view = KvView(max_blocks=8)
    engine.bridge = KvBridge(engine.state, engine.replica, engine.view)
    engine.stream = EventStream(Sinks(engine.view.rank(0), engine.bridge), replay=False)
    engine.stores(0, 1)
    engine.stores(100, 2)
    engine.dispatch(prompt(1), prompt(2))
    believed = engine.state.index.tokens(engine.slot)
    engine.says(removed(0, 1, 2, 3))
    assert engine.state.index.tokens(engine.slot) == believed


def test_a_replica_that_has_left_is_not_taken_up_again() -> None:
    engine = Engine(seeds)
    engine.state.forget(engine.replica)
    engine.stores(0, 1)
    engine.says(removed(0))
    engine.says(CLEARED)
    assert engine.state.slots == {}


@pytest.mark.parametrize("form", ["maps", "arrays"])
def test_both_forms_of_events_are_understood(form: str) -> None:
    engine = Engine(seeds)
    event = BlockStored(tuple(range(8)), None, (1,) * 1024, 128)
    gone = BlockRemoved((7,))
    raw: list[object]
    if form == "arrays":
        raw = [["BlockStored", list(range(8)), None, [1] * 1024, 128], ["BlockRemoved", [7]]]
    else:
        raw = [
            {"type": "BlockStored", **msgspec.to_builtins(event)},
            {"type": "BlockRemoved", **msgspec.to_builtins(gone)},
        ]
    engine.says(raw[0])
    assert engine.match(prompt(1)) == 1024
    engine.says(raw[1])
    assert engine.match(prompt(1)) == 896


@pytest.mark.parametrize("recording", ["sglang_0.5.23.json", "vllm_0.32.0.json"])
def test_what_real_engines_told_is_what_is_believed(recording: str) -> None:
    """Their blocks, followed by hand: token lists by name."""
    engine = Engine(seeds)
    lists: dict[BlockHash, list[int]] = {}
    most = 0
    for step in ("store", "store_shared_prefix", "evict", "clear", "store_after_clear"):
        for frames in recorded(recording, step):
            for event in decode_batch(frames[-1]).events:
                if isinstance(event, BlockStored):
                    tokens = [] if event.parent_hash is None else list(lists[event.parent_hash])
                    for number, name in enumerate(event.block_hashes):
                        begin = number * event.block_size
                        tokens += event.token_ids[begin : begin + event.block_size]
                        lists[name] = list(tokens)
                elif isinstance(event, BlockRemoved):
                    for name in event.block_hashes:
                        lists.pop(name, None)
                else:
                    lists.clear()
            engine.stream.batch(engine.sequence, frames[-1])
            engine.sequence += 1
            most = max([most, *map(len, lists.values())])
            # The first checkpoint is the only one in these, and lies at the end of a block.
            expected = {token_prefix(tokens, SEED).digests[-1] for tokens in lists.values() if len(tokens) == 128}
            assert set(engine.state.index.held(engine.slot)[0]) == expected
    assert most >= 192
