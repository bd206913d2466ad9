"""A whole prefix index in bytes, for workers that come late: what is believed to be cached where.

    snapshot  version, length of cursor, cursor, then replica, epoch, count, digests, tokens for each replica

Rows stand in the order in which an index takes them, the oldest first. Both ways work in steps, since a large index
takes a second: whoever drives them lets others run in between.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator

from routing.prefix import Digest
from routing.sharing import Peerage, epoch_tag

VERSION = 1
STEP_KEYS = 2_000
"""About a millisecond's work."""
_HEAD = struct.Struct("<BH")
_REPLICA = struct.Struct("<8sII")
_ROW_BYTES = 12


class SnapshotError(ValueError):
    """It cannot be read: of another version, or cut short."""


def pack(peerage: Peerage, cursor: str, max_bytes: int) -> Generator[None, None, bytes]:
    """The index of a pool as of `cursor`, in at most `max_bytes`: what was used longest ago is left out.

    Each step yields; the generator returns the bytes (`yield from`, or `StopIteration.value`).
    """
    state = peerage.state
    said = cursor.encode()
    parts = [_HEAD.pack(VERSION, len(said)), said]
    replicas = [replica for replica in peerage.replicas if replica in state.slots]
    left_bytes = max_bytes - sum(map(len, parts))
    for place, replica in enumerate(replicas):
        # An equal share of what is left for each: what one does not need is there for the next ones.
        most = (left_bytes // (len(replicas) - place) - _REPLICA.size) // _ROW_BYTES
        if replica not in state.slots or not peerage.knows(replica):
            continue  # it has left since
        digests, tokens = state.index.held(state.slot(replica))
        digests, tokens = digests[-most:] if most > 0 else [], tokens[-most:] if most > 0 else []
        # Before the others' turn: they may see it begin anew, or leave.
        packed = [_REPLICA.pack(peerage.identity(replica), epoch_tag(replica.epoch), len(digests))]
        yield
        for kind, numbers in (("Q", digests), ("I", tokens)):
            for begin in range(0, len(numbers), STEP_KEYS):
                some = numbers[begin : begin + STEP_KEYS]
                packed.append(struct.pack(f"<{len(some)}{kind}", *some))
                yield
        left_bytes -= sum(map(len, packed))
        parts += packed
    return b"".join(parts)


def cursor_of(blob: bytes) -> str:
    """Of the last message that the snapshot covers. Raises `SnapshotError`."""
    try:
        version, length = _HEAD.unpack_from(blob)
        if version != VERSION:
            raise SnapshotError(f"version {version}")
        return blob[_HEAD.size : _HEAD.size + length].decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise SnapshotError(str(error)) from error


def restore(peerage: Peerage, blob: bytes) -> Iterator[None]:
    """Believe what the snapshot says of replicas that are in the pool and whose cache is still the same, step by step.

    Raises `SnapshotError`; what came before the defect is believed then.
    """
    at = _HEAD.size + len(cursor_of(blob).encode())
    state = peerage.state
    while at < len(blob):
        try:
            identity, epoch, count = _REPLICA.unpack_from(blob, at)
        except struct.error as error:
            raise SnapshotError(str(error)) from error
        at += _REPLICA.size
        if at + _ROW_BYTES * count > len(blob):
            raise SnapshotError("it is cut short")
        for begin in range(0, count, STEP_KEYS):
            # Looked up anew at each step: the pool may have changed in between.
            replica = peerage.replica(identity)
            if replica is None or not peerage.believes(replica, epoch):
                break
            size = min(STEP_KEYS, count - begin)
            digests: tuple[Digest, ...] = struct.unpack_from(f"<{size}Q", blob, at + 8 * begin)
            tokens: tuple[int, ...] = struct.unpack_from(f"<{size}I", blob, at + 8 * count + 4 * begin)
            # Whoever brought them there has long been answered.
            state.index.add(state.slot(replica), digests, tokens, confirmed=True)
            yield
        at += _ROW_BYTES * count
