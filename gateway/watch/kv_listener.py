"""Follows the KV-cache events of one replica, for as long as it is in the fleet.

Every worker listens for itself: the engine publishes once, whoever subscribes gets it, and what is learned is only of
use where decisions are made.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import zmq

from backends.dialects.protocol import KvEventsEndpoint
from backends.kvevents.endpoint import EndpointRefused
from backends.kvevents.stream import KvSink
from backends.kvevents.subscriber import KvSubscriber, Socket
from backends.kvevents.view import KvView, Summary
from backends.signals import KV_EVENTS
from backends.upstream import Upstream
from gateway.config import KvEvents
from gateway.watch.kv_index import KvBridge, Seeds, Sinks
from routing.router import PoolState

logger = logging.getLogger(__name__)

AUTO = "auto"
_ASK_AGAIN_S = 1.0
_REFUSED_AGAIN_S = 30.0
MAX_RANKS = 256
"""Each has sockets and memory of its own. An engine that says it has more is not believed."""


class KvListener:
    """The streams of all data-parallel ranks of a replica, and what they tell."""

    def __init__(
        self,
        upstream: Upstream,
        settings: KvEvents,
        context: zmq.Context[Socket],
        routing: PoolState | None = None,
        seeds: Seeds | None = None,
    ) -> None:
        """`routing`: whose index is corrected by what the streams tell; None: they are only shown. `seeds`: see
        `KvBridge`."""
        self._upstream = upstream
        self._routing = routing
        self._seeds = seeds
        self.settings = settings
        self._context = context
        self._view = KvView()
        self._subscribers: dict[int, KvSubscriber] = {}
        self._listening = False

    def summary(self) -> Summary:
        """What the replica's cache holds, as far as it was told."""
        return self._view.summary({rank: each.report() for rank, each in self._subscribers.items()})

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            endpoint = self._endpoint()
            if endpoint is None:
                await asyncio.sleep(_ASK_AGAIN_S)
                continue
            try:
                self._subscribers = self._make(endpoint)
            except EndpointRefused as error:
                self._upstream.signals.lacks(KV_EVENTS, str(error))
                await asyncio.sleep(_REFUSED_AGAIN_S)
                continue
            self._upstream.signals.has(KV_EVENTS)
            await self._listen(endpoint)

    async def _listen(self, endpoint: KvEventsEndpoint) -> None:
        """Until the engine names another endpoint; a new life of the engine starts the streams anew."""
        epoch = self._upstream.replica.epoch
        seen = self._breaks()
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(each.run()) for each in self._subscribers.values()]
            self._listening = True
            try:
                while self._endpoint() in (endpoint, None):
                    await asyncio.sleep(_ASK_AGAIN_S)
                    if self._upstream.replica.epoch not in (epoch, None):
                        # A stream that broke off since has found out by itself, and may know the new life from its
                        # start.
                        now = self._breaks()
                        for rank, each in self._subscribers.items():
                            if epoch is not None and now[rank] == seen[rank]:
                                each.engine_restarted()
                        epoch, seen = self._upstream.replica.epoch, now
            finally:
                self._listening = False  # that the streams end now is nobody's fault
            for task in running:
                task.cancel()

    def _breaks(self) -> dict[int, int]:
        """How often each rank's stream has noticed an end of the engine, or of the connection to it."""
        counters = {rank: each.report().counters for rank, each in self._subscribers.items()}
        return {rank: each.restarts + each.disconnects for rank, each in counters.items()}

    def _endpoint(self) -> KvEventsEndpoint | None:
        """Where to listen; None while the engine has not said."""
        settings = self.settings
        info = self._upstream.info
        told = None if info is None else info.kv_events
        if settings.endpoint != AUTO:
            dp_size = 1 if info is None else info.dp_size
            return KvEventsEndpoint(settings.endpoint, settings.replay_endpoint, settings.topic, dp_size=dp_size)
        if info is not None and told is None:
            self._upstream.signals.lacks(KV_EVENTS, "the engine does not say where it publishes them; set the endpoint")
        return None if told is None else replace(told, topic=settings.topic or told.topic)

    def _make(self, endpoint: KvEventsEndpoint) -> dict[int, KvSubscriber]:
        rank = self._upstream.replica.dp_rank
        if rank is None and endpoint.dp_size > MAX_RANKS:
            raise EndpointRefused(f"events of {endpoint.dp_size} ranks are more than the {MAX_RANKS} that are followed")
        ranks = range(endpoint.dp_size) if rank is None else (rank,)
        side = self._upstream.side
        # Not the blocks of another address, nor ranks that are gone: nothing would ever clear them.
        self._view = KvView()
        return {
            rank: KvSubscriber(
                endpoint,
                host=side.host,
                sink=self._sink(rank),
                context=self._context,
                rank=rank,
                configured=self.settings.endpoint != AUTO,
            )
            for rank in ranks
        }

    def _sink(self, rank: int) -> KvSink:
        view = self._view.rank(rank)
        if self._routing is None:
            return view
        replica = self._upstream.replica
        return Sinks(
            view, KvBridge(self._routing, replica, self._view, rank, seeds=self._seeds, on_trust=self._say_doubts)
        )

    def _say_doubts(self) -> None:
        """Say it once when the streams can't be relied upon, and again only after they could be."""
        doubts = self._view.doubts
        if doubts and self._listening:
            reasons = ", ".join(doubts).replace("_", " ")
            text = f"not all of them are known ({reasons}); what it has dropped is learned from its answers instead"
            self._upstream.signals.lacks(KV_EVENTS, text)
        elif self._view.trusted:
            self._upstream.signals.has(KV_EVENTS)
