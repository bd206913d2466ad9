"""A publisher over real ZeroMQ sockets that does what the engines' does, and loses batches when it is told to.

Written after `ZmqEventPublisher` of SGLang 0.5.23 (`disaggregation/kv_events.py`) and vLLM 0.32.0
(`distributed/kv_events.py`): one thread that publishes, numbers from 0, and answers replays between two publications.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from types import TracebackType

import msgspec
import zmq

from backends.kvevents.decode import BlockRemoved, BlockStored

END = b"\xff" * 8


def stored(*hashes: object, tokens: int = 4, **more: object) -> dict[str, object]:
    """A `BlockStored` in today's form."""
    token_ids = list(range(tokens * len(hashes)))
    fields = {"block_hashes": list(hashes), "parent_block_hash": None, "token_ids": token_ids, "block_size": tokens}
    return {"type": "BlockStored", **fields, **more}


def removed(*hashes: object, **more: object) -> dict[str, object]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), **more}


CLEARED: dict[str, object] = {"type": "AllBlocksCleared"}


def packed(*events: object, at: float = 1.5) -> bytes:
    """A payload as engines make it."""
    return msgspec.msgpack.encode([at, list(events), 0])


class Diary:
    """A sink that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.trusted = False
        self.reasons: list[str] = []

    @property
    def blocks(self) -> list[object]:
        """Hashes in the order in which they were stored."""
        return [entry for entry in self.told if not isinstance(entry, str)]

    def stored(self, event: BlockStored) -> None:
        self.told += event.block_hashes

    def removed(self, event: BlockRemoved) -> None:
        self.told += [f"-{block!r}" for block in event.block_hashes]

    def cleared(self) -> None:
        self.told.append("cleared")

    def trust(self, trusted: bool, reason: str) -> None:
        self.trusted = trusted
        self.reasons.append(reason)


class Publisher:
    """Bound to `ipc://{path}` and, for replays, `ipc://{path}r`. To be used as a context manager."""

    def __init__(self, path: str, *, memory: int = 10_000, replay: bool = True, old_frames: bool = False) -> None:
        self.path = path
        self.sequence = 0
        self.asked: list[int] = []
        """The starts of the replays that were asked for."""
        self._old_frames = old_frames
        self._work: queue.Queue[tuple[bytes, bool, threading.Event] | None] = queue.Queue()
        self._memory: deque[tuple[int, bytes]] = deque(maxlen=memory)
        self._replay = replay
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-publisher")

    def __enter__(self) -> Publisher:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.put(None)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def publish(self, *events: object, lost: bool = False, payload: bytes | None = None) -> None:
        """Number and send a batch; a lost one is kept for replays, and not sent."""
        done = threading.Event()
        self._work.put((packed(*events) if payload is None else payload, lost, done))
        assert done.wait(10)

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.PUB) as pub, context.socket(zmq.ROUTER) as router:
            for socket in (pub, router):
                socket.linger = 0
            pub.set_hwm(100_000)
            pub.bind(f"ipc://{self.path}")
            if self._replay:
                router.bind(f"ipc://{self.path}r")
            self._ready.set()
            while True:
                if self._replay and router.poll(0):
                    self._answer(router)
                try:
                    work = self._work.get(timeout=0.01)
                except queue.Empty:
                    continue
                if work is None:
                    return
                payload, lost, done = work
                number = self.sequence
                self.sequence += 1
                if not lost:
                    pub.send_multipart([b"kv", number.to_bytes(8, "big"), payload])
                self._memory.append((number, payload))
                done.set()

    def _answer(self, router: zmq.Socket[bytes]) -> None:
        client, empty, start = router.recv_multipart()
        topic = [] if self._old_frames else [b"kv"]
        self.asked.append(int.from_bytes(start, "big"))
        for number, payload in self._memory:
            if number >= self.asked[-1]:
                router.send_multipart([client, empty, *topic, number.to_bytes(8, "big"), payload])
        router.send_multipart([client, empty, *([b""] if topic else []), END, b""])
