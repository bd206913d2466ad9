"""Listens to one rank of one engine: the sockets of an `EventStream`.

Plain ZeroMQ sockets, read without waiting until they are empty, and woken through their file descriptors. Such a
descriptor tells that something has happened, not that there is something to read, and tells it once: whoever stops
reading before the socket says "nothing there" is never woken again. So the loop forgets old wake-ups, reads all
sockets until they are empty, and only then sleeps. (A coroutine per message, as in `zmq.asyncio`, would cost more, and
may lose the message when it is cancelled.)

A lost connection ends the session: its sockets are read to the end and closed, and new ones are made. So whatever a
session delivers comes from one publisher.

The replay protocol, the same in SGLang 0.5.23 and vLLM 0.32.0: a DEALER sends `["", start]` to the engine's ROUTER and
is sent `["", topic, sequence, payload]` for each batch it still has, then `["", "", -1, ""]`. Older builds leave out
the topic. Requests are served between two publications: within 0.1 s on an idle engine.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from types import TracebackType

import zmq
from zmq.utils.monitor import parse_monitor_message

from backends.dialects.protocol import KvEventsEndpoint
from backends.kvevents.decode import MAX_PAYLOAD_BYTES
from backends.kvevents.endpoint import resolve
from backends.kvevents.stream import EventStream, KvSink, ReplayRequest, StreamReport

logger = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)
BURST = 64
"""Messages read before other tasks get their turn."""
BURST_BYTES = 128 << 10
"""The same, of their sizes together: so much is decoded in a few milliseconds."""
LIVE_QUEUE = 1000
"""Messages that wait unread at our side; the engine queues the next 100,000, then drops."""
REPLAY_QUEUE = 10_000
"""An engine's ROUTER drops what its own queue of 1,000 can't hold, so ours takes its whole memory."""
HEARTBEAT_MS = 10_000
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

Socket = zmq.Socket[bytes]


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a subscriber is, in seconds."""

    replay_s: float = 10.0
    """Silence after which a replay that was asked for is given up, and a connection that isn't made is logged."""
    stall_s: float = 1.0
    """Silence in the middle of one after which the rest is asked for again."""
    first_check_s: float = 1.0
    """After connecting. A publisher learns of a subscription a moment later than we of the connection."""
    check_s: float = 30.0
    """Quiet time after which the last batch is asked for again, to find out whether any got lost behind it."""
    retry_s: float = 0.2
    """Before a new connection; doubled up to `max_retry_s` while nothing comes of it."""
    max_retry_s: float = 30.0


class KvSubscriber:
    """Keeps one rank's stream connected. Run it as a task; cancelling the task closes everything."""

    def __init__(
        self,
        endpoint: KvEventsEndpoint,
        *,
        host: str | None,
        sink: KvSink,
        context: zmq.Context[Socket],
        rank: int = 0,
        configured: bool = False,
        timing: Timing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`host` and `configured`: see `endpoint.resolve`, whose `EndpointRefused` this raises.

        `context` is shared by all subscribers of a process (it has a thread), made after any fork, and terminated by
        its owner when all of them have ended.
        """
        self.address = resolve(endpoint.endpoint, host, rank, configured=configured)
        replay = endpoint.replay_endpoint
        self.replay_address = None if replay is None else resolve(replay, host, rank, configured=configured)
        self.stream = EventStream(sink, replay=replay is not None)
        self._topic = endpoint.topic.encode()
        self._context = context
        self._timing = timing or Timing()
        self._rng = rng or random.Random()
        self._wake: asyncio.Event | None = None
        self._renew = False
        self._logged: str | None = None

    def report(self) -> StreamReport:
        return self.stream.report()

    def engine_restarted(self) -> None:
        """Somebody knows that the engine began anew: forget what it held, and connect again."""
        self._renew = True
        if self._wake is not None:
            self._wake.set()

    async def run(self) -> None:
        """Listen until cancelled. Trouble is logged when it is new, and tried again."""
        delay_s = self._timing.retry_s
        while True:
            heard = False
            try:
                if self._renew:
                    self._renew = False
                    self.stream.restarted()
                try:
                    heard = await self._session()
                finally:
                    self._wake = None
                    self.stream.disconnected()
            except zmq.ZMQError as error:
                self._complain(f"{self.address}: {error}")
            except Exception as error:
                self._complain(f"{self.address} could not be handled: {error!r}", error)
                # The sink may have taken half a batch: it is told everything again.
                self._renew = True
            delay_s = self._timing.retry_s if heard else min(delay_s * 2, self._timing.max_retry_s)
            await asyncio.sleep(delay_s * self._rng.uniform(0.8, 1.2))

    async def _session(self) -> bool:
        """One connection, from its making to its end. Returns whether anything was read on it."""
        loop = asyncio.get_running_loop()
        with _Session(self, loop) as session:
            self._wake = session.wake
            while True:
                session.wake.clear()
                busy = session.pump()
                if session.lost or self._renew:
                    return session.heard
                if busy:
                    await asyncio.sleep(0)
                    continue
                try:
                    async with asyncio.timeout_at(session.deadline):
                        await session.wake.wait()
                except TimeoutError:
                    session.on_time()

    def _complain(self, text: str, error: Exception | None = None) -> None:
        if text != self._logged:
            self._logged = text
            logger.warning("KV events of %s", text, exc_info=error)


class _Session:
    """The sockets of one connection. Everything in here is synchronous."""

    def __init__(self, owner: KvSubscriber, loop: asyncio.AbstractEventLoop) -> None:
        self.wake = asyncio.Event()
        self.lost = False
        self.heard = False
        self._owner = owner
        self._stream = owner.stream
        self._timing = owner._timing
        self._loop = loop
        self._connected = False
        self._check_at = float("inf")
        self._answer_by = float("inf")
        self._connect_by = loop.time() + self._timing.replay_s
        self._asked: ReplayRequest | None = None
        self._live: Socket | None = None
        self._monitor: Socket | None = None
        self._dealer: Socket | None = None

    def __enter__(self) -> _Session:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def deadline(self) -> float:
        """When `on_time` is due, by the loop's clock."""
        return min(self._check_at, self._answer_by, self._connect_by)

    def on_time(self) -> None:
        """Do what is due."""
        now = self._loop.time()
        if now >= self._connect_by:
            self._connect_by = float("inf")
            self._owner._complain(f"{self._owner.address}: no connection so far")
        if now >= self._answer_by:
            self._stream.replay_failed()
            if self._stream.request is None:
                self._owner._complain(f"{self._owner.replay_address}: no answer to a replay request")
            self._follow_request()
        if now >= self._check_at:
            self._check_at = now + self._timing.check_s
            self._stream.check()
            self._follow_request()

    def pump(self) -> bool:
        """Read what is there, up to a burst from each socket. Returns whether there may be more."""
        live, full = self._receive(self._live, BURST)
        # After the messages: what they came over has then been announced.
        self._read_monitor()
        if self.lost:
            while full:
                more, full = self._receive(self._live, BURST)
                live += more
        for frames in live:
            self._take(frames)
        if live:
            self.heard = True
            self._check_at = self._loop.time() + self._timing.check_s
        self._follow_request()
        busy = self._pump_replay()
        if self._stream.doubt is None:
            self._owner._logged = None  # all is well: the same trouble is news again
        return busy or full

    def close(self) -> None:
        self._close_dealer()
        if self._live is not None:
            if self._monitor is not None:
                self._unwatch(self._monitor)
                self._live.disable_monitor()
                self._monitor.close(0)
            self._unwatch(self._live)
            self._live.close(0)
        self._live = self._monitor = None

    def _open(self) -> None:
        owner = self._owner
        live = self._live = self._socket(zmq.SUB, owner.address, LIVE_QUEUE)
        live.setsockopt(zmq.RECONNECT_IVL, 250)
        live.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
        live.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        live.setsockopt(zmq.SUBSCRIBE, owner._topic)
        self._monitor = live.get_monitor_socket(_EVENTS)
        live.connect(owner.address)
        self._watch(live)
        self._watch(self._monitor)

    def _read_monitor(self) -> None:
        for frames in self._receive(self._monitor, BURST)[0]:
            event = parse_monitor_message(frames)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
                self._connect_by = float("inf")
                self._check_at = self._loop.time() + self._timing.first_check_s
                self._stream.connected()
            elif event == zmq.EVENT_DISCONNECTED and self._connected:
                self.lost = True

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8 or frames[1] == END:
            self._stream.malformed()
            return
        self._stream.batch(int.from_bytes(frames[1], "big"), frames[2])

    def _follow_request(self) -> None:
        """Ask for what the stream wants now, if it is something else than what was asked."""
        request = self._stream.request
        if request is self._asked:
            return
        self._close_dealer()
        self._asked = request
        address = self._owner.replay_address
        if request is None or address is None:
            return
        dealer = self._dealer = self._socket(zmq.DEALER, address, REPLAY_QUEUE)
        dealer.connect(address)
        dealer.send_multipart([b"", request.start.to_bytes(8, "big")], zmq.NOBLOCK)
        self._watch(dealer)
        self._answer_by = self._loop.time() + self._timing.replay_s

    def _pump_replay(self) -> bool:
        answers, full = self._receive(self._dealer, BURST)
        if not answers:
            return False
        self._answer_by = self._loop.time() + self._timing.stall_s
        for frames in answers:
            numbered = frames[-2:]
            if len(frames) not in (3, 4) or frames[0] or len(numbered[0]) != 8:
                self._owner._complain(f"{self._owner.replay_address}: its replays have an unknown form")
                self._stream.replay_failed()
            elif numbered[0] == END:
                self._stream.replay_ended()
            else:
                self._stream.replayed(int.from_bytes(numbered[0], "big"), numbered[1])
            if self._stream.request is not self._asked:
                self._follow_request()
                return True
        return full

    def _close_dealer(self) -> None:
        if self._dealer is not None:
            self._unwatch(self._dealer)
            self._dealer.close(0)
        self._dealer = None
        self._asked = None
        self._answer_by = float("inf")

    def _socket(self, kind: int, address: str, queue: int) -> Socket:
        made: Socket = self._owner._context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.RCVHWM, queue)
        made.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
        if address.startswith("tcp://["):
            made.setsockopt(zmq.IPV6, 1)
        return made

    @staticmethod
    def _receive(socket: Socket | None, limit: int) -> tuple[list[list[bytes]], bool]:
        """Up to `limit` messages or `BURST_BYTES`, and whether it stopped for that rather than for want of messages."""
        messages: list[list[bytes]] = []
        left_bytes = BURST_BYTES
        if socket is None:
            return messages, False
        try:
            while len(messages) < limit and left_bytes > 0:
                frames = socket.recv_multipart(zmq.NOBLOCK)
                messages.append(frames)
                left_bytes -= sum(map(len, frames))
        except zmq.Again:
            return messages, False
        return messages, True

    def _watch(self, socket: Socket) -> None:
        self._loop.add_reader(_descriptor(socket), self.wake.set)

    def _unwatch(self, socket: Socket) -> None:
        self._loop.remove_reader(_descriptor(socket))


def _descriptor(socket: Socket) -> int:
    number = socket.getsockopt(zmq.FD)
    assert isinstance(number, int)
    return number
