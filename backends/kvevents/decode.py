"""Reads what SGLang and vLLM publish about their KV caches: one msgpack payload, a batch of events.

A batch is the array `[timestamp, events, dp_rank]`. Its events are maps with a `type` key (SGLang 0.5.23
`disaggregation/kv_events.py`, vLLM 0.32.0 `distributed/kv_events.py`), and were positional arrays with the type first
in older builds of both (vLLM up to 0.23.0). Both forms are read here, and both may be mixed. Fields and types of
events that we don't know are skipped: engines add some with every release.

Block hashes are opaque: engines compute them in many ways that depend on their version and flags, so nothing here or
behind it recomputes one. Who wants keys of his own hashes `token_ids` himself and maps engine hash to own key.

Pure: no clock, no I/O. What it costs is in proportion to the payload, whose size is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

MAX_PAYLOAD_BYTES = 32 << 20
"""A page of one token costs about 160 bytes, so a prompt of 128,000 tokens at page size 1 has 20 MB in one batch."""
MAX_EVENTS = 131_072
"""In one batch. A second's work for a busy engine; without a bound, six megabytes of tiny ones take seconds to read."""
MAX_HASH_BYTES = 64
"""vLLM's longest is a SHA-256 (32 bytes)."""
MAX_TEXT = 1024
"""Characters in a name of an adapter, a medium or a cache salt."""

BlockHash: TypeAlias = int | bytes
"""An engine's name for a block; compare it, never compute it."""


class Undecodable(ValueError):
    """The payload is no batch of KV events. What it held is lost: the stream it came on can't be trusted."""


class BlockStored(msgspec.Struct, frozen=True):
    """Blocks that an engine now holds, each the continuation of the one before."""

    block_hashes: tuple[BlockHash, ...]
    parent_hash: BlockHash | None
    """The block before the first; None at the start of a prompt."""
    token_ids: tuple[int, ...]
    """Tokens of all the blocks together; empty where the engine didn't say, or not in numbers.

    Speculative decoding in SGLang caches pairs of neighbours; of each pair this is the first token.
    """
    block_size: int
    """Tokens in one block, at least 1."""
    adapter: str | None = None
    """Name of the LoRA adapter, or its number as text where the engine sends no name."""
    medium: str | None = None
    """`GPU`, `CPU`, `CPU_PINNED`, `DISK`, `STORAGE`, `EXTERNAL`, …; None: not said, which means the GPU."""
    cache_salt: str | None = None
    """Blocks with different salts are never shared. vLLM says it at the first block of a prompt only."""
    group: int | None = None
    """KV cache group of hybrid-attention models (vLLM): the same hash is held once in each group."""
    opaque_content: bool = False
    """There is more than tokens in these blocks (images, prompt embeddings): equal tokens prove nothing."""


class BlockRemoved(msgspec.Struct, frozen=True):
    """Blocks that an engine has dropped."""

    block_hashes: tuple[BlockHash, ...]
    medium: str | None = None
    group: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True):
    """The cache is empty."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, frozen=True):
    """Events that an engine published together, in their order."""

    timestamp_unix_s: float
    """By the engine's clock."""
    events: tuple[Event, ...]
    dp_rank: int | None = None
    unknown: int = 0
    """Events of types we don't know; they are not among `events`."""


# The fields of positional arrays, in the order of the engines' structs when they were `array_like`.
_STORED_ORDER = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
    "group_idx",
)  # fmt: skip
_REMOVED_ORDER = ("block_hashes", "medium", "group_idx")

_CLEARED = AllBlocksCleared()
_INT = {int}
"""What the types of a list are compared to, in one pass in C: a prompt has thousands of tokens and hashes."""


def decode_batch(payload: bytes) -> Batch:
    """The batch in a payload. Raises `Undecodable`, and nothing else, for whatever else the bytes are."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Undecodable(f"a batch of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    try:
        tree = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, RecursionError, ValueError, OverflowError) as error:
        raise Undecodable(f"not MessagePack: {error}") from error
    timestamp, events, rank = _parts(tree)
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
        raise Undecodable("the batch has no time stamp")
    # Engines send a float. An integer of 64 bits fits one as well.
    timestamp_s = float(timestamp)
    if not math.isfinite(timestamp_s):
        raise Undecodable("the batch's time stamp is not finite")
    if not isinstance(events, list):
        raise Undecodable("the batch has no list of events")
    if len(events) > MAX_EVENTS:
        raise Undecodable(f"a batch of {len(events)} events is over the limit of {MAX_EVENTS}")
    known = []
    for raw in events:
        event = _event(raw)
        if event is not None:
            known.append(event)
    return Batch(timestamp_s, tuple(known), _optional_int(rank, "dp_rank"), len(events) - len(known))


def _parts(tree: Any) -> tuple[Any, Any, Any]:
    if isinstance(tree, list):
        if len(tree) < 2:
            raise Undecodable("the batch is an array of less than two elements")
        return tree[0], tree[1], tree[2] if len(tree) > 2 else None
    if isinstance(tree, dict):
        return tree.get("ts"), tree.get("events"), tree.get("data_parallel_rank", tree.get("attn_dp_rank"))
    raise Undecodable("the batch is neither an array nor a map")


def _event(raw: Any) -> Event | None:
    """One event; None for a type we don't know."""
    fields: dict[Any, Any]
    if isinstance(raw, dict):
        kind = raw.get("type")
        fields = raw
    elif isinstance(raw, list) and raw:
        kind = raw[0]
        if len(raw) == 2 and isinstance(raw[1], dict):
            fields = raw[1]
        else:
            order = _STORED_ORDER if kind == "BlockStored" else _REMOVED_ORDER
            fields = dict(zip(order, raw[1:], strict=False))
            if fields.get("lora_id") is None and "lora_name" in fields:
                # vLLM names no adapter without its number. SGLang numbers none: there it can only be a salt.
                fields["cache_salt"] = fields.pop("lora_name")
    else:
        raise Undecodable("an event is neither a map nor an array that names its type")
    if not isinstance(kind, str):
        raise Undecodable("an event does not name its type")
    if kind == "BlockStored":
        return _stored(fields)
    if kind == "BlockRemoved":
        return BlockRemoved(
            _hashes(fields.get("block_hashes")),
            _optional_text(fields.get("medium"), "medium"),
            _optional_int(fields.get("group_idx"), "group_idx"),
        )
    return _CLEARED if kind == "AllBlocksCleared" else None


def _stored(fields: Mapping[Any, Any]) -> BlockStored:
    block_size = fields.get("block_size")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise Undecodable("stored blocks have no size")
    parent = fields.get("parent_block_hash")
    adapter, salt, opaque = _adapter_and_salt(fields)
    return BlockStored(
        block_hashes=_hashes(fields.get("block_hashes")),
        parent_hash=None if parent is None else _hash(parent),
        token_ids=_tokens(fields.get("token_ids")),
        block_size=block_size,
        adapter=adapter,
        medium=_optional_text(fields.get("medium"), "medium"),
        cache_salt=salt,
        group=_optional_int(fields.get("group_idx"), "group_idx"),
        opaque_content=opaque,
    )


def _adapter_and_salt(fields: Mapping[Any, Any]) -> tuple[str | None, str | None, bool]:
    """The adapter, the salt, and whether the blocks hold more than tokens.

    vLLM has no field for the salt; it is the text in a block's `extra_keys` that isn't the adapter's name.
    """
    number = _optional_int(fields.get("lora_id"), "lora_id")
    name = _optional_text(fields.get("lora_name"), "lora_name")
    salt = _optional_text(fields.get("cache_salt"), "cache_salt")
    opaque = False
    extra_keys = fields.get("extra_keys")
    if extra_keys is not None and not isinstance(extra_keys, list):
        raise Undecodable("extra_keys is not a list")
    for keys in extra_keys or ():
        for key in keys if isinstance(keys, list) else ():
            if not isinstance(key, str):
                opaque = True
            elif key != name and salt is None:
                salt = _optional_text(key, "cache_salt")
    if name is None and number is not None:
        name = str(number)
    return name or None, salt or None, opaque


def _hashes(raw: Any) -> tuple[BlockHash, ...]:
    if not isinstance(raw, list):
        raise Undecodable("an event has no list of block hashes")
    if set(map(type, raw)) == _INT:
        return tuple(raw)
    return tuple([_hash(item) for item in raw])


def _hash(raw: Any) -> BlockHash:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, bytes) and 0 < len(raw) <= MAX_HASH_BYTES:
        return raw
    raise Undecodable("a block hash is neither an integer nor a short string of bytes")


def _tokens(raw: Any) -> tuple[int, ...]:
    """Token ids as they are, the first of each where they come in pairs, or nothing."""
    if not isinstance(raw, list):
        return ()
    if raw and isinstance(raw[0], list):
        raw = [item[0] if isinstance(item, list) and item else None for item in raw]
    return tuple(raw) if set(map(type, raw)) == _INT else ()


def _optional_int(raw: Any, name: str) -> int | None:
    if raw is None or (isinstance(raw, int) and not isinstance(raw, bool)):
        return raw
    raise Undecodable(f"{name} is not an integer")


def _optional_text(raw: Any, name: str) -> str | None:
    if raw is None or (isinstance(raw, str) and len(raw) <= MAX_TEXT):
        return raw
    raise Undecodable(f"{name} is not a text of at most {MAX_TEXT} characters")
