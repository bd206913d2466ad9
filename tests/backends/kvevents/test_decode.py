from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kvevents import decode
from backends.kvevents.decode import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Undecodable, decode_batch
from backends.kvevents.view import RankView
from tests.backends.kvevents.publisher import packed, removed, stored

RECORDINGS = Path(__file__).parent / "recordings"


def recorded(name: str, step: str) -> list[list[bytes]]:
    tree = json.loads((RECORDINGS / name).read_text())
    found = next(entry for entry in tree["steps"] if entry["name"] == step)
    return [[base64.b64decode(frame) for frame in frames] for frames in found["frames"]]


def batches(name: str, step: str) -> Iterator[Batch]:
    for frames in recorded(name, step):
        yield decode_batch(frames[-1])


def test_recorded_store_of_sglang() -> None:
    (batch,) = batches("sglang_0.5.23.json", "store")
    (event,) = batch.events
    assert isinstance(event, BlockStored)
    assert event.token_ids == tuple(range(10, 58))  # of 50 tokens, the full pages
    assert (event.block_size, len(event.block_hashes), event.parent_hash, event.medium) == (16, 3, None, "GPU")
    (continued,) = next(batches("sglang_0.5.23.json", "store_shared_prefix")).events
    assert isinstance(continued, BlockStored)
    assert continued.parent_hash == event.block_hashes[-1]
    assert batch.dp_rank == 0
    assert batch.timestamp_unix_s == pytest.approx(1.7953e9, rel=1e-3)


def test_recorded_store_of_vllm() -> None:
    (batch,) = batches("vllm_0.32.0.json", "store")
    (event,) = batch.events
    assert isinstance(event, BlockStored)
    assert event.token_ids == tuple(range(10, 42))
    assert (event.block_size, len(event.block_hashes), event.group, event.medium) == (32, 1, 0, "GPU")


@pytest.mark.parametrize("name", ["sglang_0.5.23.json", "vllm_0.32.0.json"])
def test_recorded_salt_is_read_from_where_each_engine_says_it(name: str) -> None:
    (plain,) = next(batches(name, "store")).events
    (salted,) = next(batches(name, "store_salted")).events
    assert isinstance(plain, BlockStored)
    assert isinstance(salted, BlockStored)
    assert (plain.cache_salt, salted.cache_salt) == (None, "tenant-a")
    assert salted.token_ids == plain.token_ids
    assert salted.block_hashes != plain.block_hashes
    assert (salted.adapter, salted.opaque_content) == (None, False)


@pytest.mark.parametrize(
    ("name", "capacity_tokens", "left_tokens"), [("sglang_0.5.23.json", 1024, 32), ("vllm_0.32.0.json", 40 * 32, 32)]
)
def test_recorded_eviction_and_clearing_balance(name: str, capacity_tokens: int, left_tokens: int) -> None:
    view = RankView(max_blocks=10_000)
    known: set[object] = set()
    removals = 0
    for step in ("replay_at_start", "store", "store_shared_prefix", "store_salted", "evict", "clear"):
        for frames in recorded(name, step):
            if frames[-2] == b"\xff" * 8:
                continue
            for event in decode_batch(frames[-1]).events:
                if isinstance(event, BlockStored):
                    known.update(event.block_hashes)
                    view.stored(event)
                elif isinstance(event, BlockRemoved):
                    assert known.issuperset(event.block_hashes)  # nothing goes that did not come
                    removals += 1
                    view.removed(event)
                else:
                    view.cleared()
                # Engines announce a store before they are done; never more than fits.
                assert view.summary().tokens.get("GPU", 0) <= capacity_tokens
    assert removals > 0
    for batch in batches(name, "store_after_clear"):
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                view.cleared()
            elif isinstance(event, BlockStored):
                view.stored(event)
    assert view.summary().tokens == {"GPU": left_tokens}


OLD_STORED = ["BlockStored", [7, 8], 6, [1, 2, 3, 4], 2, None, "GPU"]


@pytest.mark.parametrize(
    "event",
    [
        # After `BlockStored` of vLLM v0.9.2 and SGLang of 2025 (`array_like=True, tag=True`), which had no medium yet.
        OLD_STORED[:6],
        # After vLLM v0.23.0: medium, lora_name, extra_keys, group_idx, kind of cache, sliding window.
        [*OLD_STORED, None, None, 0, "full_attention", None],
        {"type": "BlockStored", "block_hashes": [7, 8], "parent_block_hash": 6, "token_ids": [1, 2, 3, 4]}
        | {"block_size": 2, "field_of_tomorrow": {"a": [1]}},
        ["BlockStored", {"block_hashes": [7, 8], "parent_block_hash": 6, "token_ids": [1, 2, 3, 4], "block_size": 2}],
    ],
)
def test_arrays_and_maps_say_the_same(event: Any) -> None:
    (read,) = decode_batch(packed(event)).events
    assert isinstance(read, BlockStored)
    assert (read.block_hashes, read.parent_hash, read.token_ids, read.block_size) == ((7, 8), 6, (1, 2, 3, 4), 2)
    assert (read.adapter, read.cache_salt, read.opaque_content) == (None, None, False)


def test_array_of_a_removal_and_of_a_clearing() -> None:
    batch = decode_batch(packed(["BlockRemoved", [7, b"\x01" * 32], "CPU", 1], ["AllBlocksCleared"]))
    assert batch.events == (BlockRemoved((7, b"\x01" * 32), "CPU", 1), AllBlocksCleared())


def test_payload_without_a_rank_as_vllm_0_9_sent_it() -> None:
    assert decode_batch(msgspec.msgpack.encode([3, [["AllBlocksCleared"]]])) == Batch(3.0, (AllBlocksCleared(),))


def test_adapter_by_name_else_by_number() -> None:
    named, numbered, both = decode_batch(
        packed(
            stored(1, lora_name="sql"),
            stored(1, lora_id=4),
            [*OLD_STORED[:5], 4, "GPU", "sql", [["sql", "salt"], None]],
        )
    ).events
    assert isinstance(named, BlockStored)
    assert isinstance(numbered, BlockStored)
    assert isinstance(both, BlockStored)
    assert (named.adapter, numbered.adapter) == ("sql", "4")
    assert (both.adapter, both.cache_salt) == ("sql", "salt")


def test_text_in_the_place_of_an_adapter_that_has_no_number_is_a_salt() -> None:
    (event,) = decode_batch(packed([*OLD_STORED, "tenant-a"])).events
    assert isinstance(event, BlockStored)
    assert (event.adapter, event.cache_salt) == (None, "tenant-a")


@pytest.mark.parametrize("keys", [[[["image-1", 0]], None], [[b"digest"], None]])
def test_blocks_of_images_and_embeddings_are_marked(keys: Any) -> None:
    (event,) = decode_batch(packed(stored(1, 2, extra_keys=keys))).events
    assert isinstance(event, BlockStored)
    assert event.opaque_content


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([[5, 6], [6, 7]], (5, 6)), (None, ()), (["a"], ()), ([1, True], ()), ([[1], 2], ()), ([[]], ())],
)
def test_tokens_in_pairs_or_missing(tokens: Any, expected: tuple[int, ...]) -> None:
    (event,) = decode_batch(packed({**stored(1), "token_ids": tokens})).events
    assert isinstance(event, BlockStored)
    assert event.token_ids == expected


def test_unknown_events_are_counted_and_skipped() -> None:
    batch = decode_batch(packed({"type": "BlockMoved", "to": 3}, ["BlockPinned", 4], removed(1)))
    assert (batch.events, batch.unknown) == ((BlockRemoved((1,)),), 2)


@pytest.mark.parametrize(
    "tree",
    [
        None, 1, [], [1.0], [None, []], [True, []], [float("nan"), []], [1.0, {}], [1.0, [3]], [1.0, [[]]],
        [1.0, [[5, []]]], [1.0, [{}]], [1.0, [], "0"], [1.0, [stored(True)]], [1.0, [stored("x")]],
        [1.0, [stored(b"")]], [1.0, [stored(b"x" * 65)]], [1.0, [stored(1.5)]],
        [1.0, [{**stored(1), "block_size": 0}]], [1.0, [{**stored(1), "block_size": None}]],
        [1.0, [{**stored(1), "parent_block_hash": []}]], [1.0, [stored(1, medium=3)]],
        [1.0, [stored(1, lora_name="x" * 2000)]], [1.0, [stored(1, extra_keys=5)]],
        [1.0, [{"type": "BlockRemoved"}]], [1.0, [{"type": "BlockRemoved", "block_hashes": {}}]],
    ],
)  # fmt: skip
def test_what_is_no_batch_is_undecodable(tree: Any) -> None:
    with pytest.raises(Undecodable):
        decode_batch(msgspec.msgpack.encode(tree))


@pytest.mark.parametrize(
    "payload", [b"", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 100_000, b"\x92\x01\xc4", b"\xc1"]
)
def test_bombs_are_undecodable_at_once(payload: bytes) -> None:
    began = time.perf_counter()
    with pytest.raises(Undecodable):
        decode_batch(payload)
    assert time.perf_counter() - began < 1.0


def test_payload_over_the_limit_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PAYLOAD_BYTES", 10)
    with pytest.raises(Undecodable, match="over the limit"):
        decode_batch(packed(stored(1)))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_batch_or_undecodable(payload: bytes) -> None:
    _must_read_or_refuse(payload)


_leaf = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.binary()
_names = st.sampled_from(
    ["type", "block_hashes", "token_ids", "block_size", "extra_keys", "medium", "lora_id", "lora_name", "group_idx"]
)
_kinds = st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "Else"])
_tree = st.recursive(
    _leaf | _kinds,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(_names | st.integers(0, 3), inner, max_size=6),
    max_leaves=20,
)
_map_event = st.builds(lambda kind, fields: {**fields, "type": kind}, _kinds, st.dictionaries(_names, _tree))
_array_event = st.builds(lambda kind, rest: [kind, *rest], _kinds, st.lists(_tree, max_size=10))


@settings(max_examples=300, deadline=None)
@given(st.tuples(st.floats(), st.lists(_map_event | _array_event | _tree, max_size=4), _leaf))
def test_any_tree_is_a_batch_or_undecodable(tree: Any) -> None:
    _must_read_or_refuse(msgspec.msgpack.encode(tree))


@settings(deadline=None)
@given(st.data())
def test_damaged_recordings_are_a_batch_or_undecodable(data: st.DataObject) -> None:
    payload = bytearray(recorded("vllm_0.32.0.json", "evict")[-1][-1])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    _must_read_or_refuse(bytes(payload[: data.draw(st.integers(0, len(payload)))]))


def _must_read_or_refuse(payload: bytes) -> None:
    try:
        batch = decode_batch(payload)
    except Undecodable:
        return
    assert isinstance(batch, Batch)
    hash(batch)  # frozen down to the last field: an index may use events as keys


def test_a_batch_of_countless_events_is_refused_before_they_are_read() -> None:
    many = decode.MAX_EVENTS
    head = b"\x92\x01\xdd"
    assert decode_batch(head + many.to_bytes(4, "big") + b"\x91\xa1x" * many).unknown == many
    with pytest.raises(Undecodable, match="events is over the limit"):
        decode_batch(head + (many + 1).to_bytes(4, "big") + b"\x91\xa1x" * (many + 1))
