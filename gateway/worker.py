"""The life of one worker: start, serve, reload, drain, stop. Who tells it to, signals or a supervisor, is in `serve`.

A graceful stop: `/readyz` fails at once, so that load balancers turn away; requests are still served for `grace_s`;
then nothing new is accepted, and streams may finish for up to `drain_s`; what is left is ended with an error event.
`hurry` skips whatever is being waited for.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random

from starlette.types import ASGIApp

from gateway.admission.opening import Admission
from gateway.admission.records import AdmissionError
from gateway.api import build_app
from gateway.config import Settings
from gateway.errors import Draining
from gateway.fleet import Fleet
from gateway.ledger import Ledger
from gateway.listener import Listener, admin_listener, inference_listener
from gateway.logs import handler_in_use
from gateway.metrics import Metrics
from gateway.overload.descriptors import PER_REPLICA, SPARE, make_room, open_now
from gateway.request_log import RequestLog
from gateway.runtime import Runtime
from gateway.scaling.teller import DemandTeller
from gateway.sharing.service import Sharing
from gateway.sources import Source
from gateway.state import LocalSource
from gateway.store import Store
from gateway.watch.notes import forget_orders
from gateway.watch.watcher import Watcher

logger = logging.getLogger("tidegate")

LAST_WORDS_S = 2.0
"""How long clients get to receive the error event that ends their stream."""
FIRST_LOOK_S = 0.5
"""How long the start waits to hear from the replicas. One that hangs is found out about later."""
_POLL_S = 0.05


class StartError(Exception):
    """The worker cannot serve; the message says which setting is to blame and why."""


class Worker:
    """Serves on sockets that are bound already, until it is told to stop. Create it inside its event loop.

    `store` is what it shares with the other workers where there is no Redis; `workers` says how many there are. It
    closes its store at its end. Raises `StartError` for settings that cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        sockets: Sequence[socket.socket],
        admin_sockets: Sequence[socket.socket],
        build_admin: Callable[[Source, Admission], ASGIApp],
        index: int = 0,
        store: Store | None = None,
        workers: int = 1,
        trial_secret: str = "",
    ) -> None:
        path = settings.usage_log.path
        self._workers = workers
        self._sockets = sockets
        self._admin_sockets = admin_sockets
        self._ledger = Ledger(None if path is None else Path(path))
        try:
            self._admission = Admission(settings, store=store, workers=workers)
        except AdmissionError as error:
            raise StartError(str(error)) from error
        self._runtime = Runtime(settings, None, Metrics(), self._ledger, admission=self._admission, worker=index)
        self._request_log: RequestLog | None = None
        self._log_requests()
        self._runtime.trial_secret = trial_secret
        self._watcher = Watcher(self._runtime, Random())
        self._demand = DemandTeller(self._runtime)
        self._sharing: Sharing | None = None
        if workers > 1 or self._admission.far is not None:
            self._sharing = Sharing(self._runtime.store, lambda: self._runtime.fleet.pools)
        self._source = LocalSource(self._runtime, index)
        self._admin_app = build_admin(self._source, self._admission)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._graceful = True
        self._watching = False

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self, *, graceful: bool) -> None:
        """Begin to stop; without grace, requests under way may still finish. Only the first call counts."""
        if not self.stopping:
            self._graceful = graceful
            self._stop.set()
            self._admission.stop_waiting()

    def hurry(self) -> None:
        """Skip what the stop is waiting for."""
        self._hurry.set()

    def reload(self, settings: Settings) -> None:
        """Serve new requests by these settings. A defect in doing so is logged and ends nothing that works."""
        before = self._runtime.fleet
        try:
            self._runtime.reload(settings)
            self._forget_orders(before)
            if self._watching:  # else its start will find what there is then
                self._watcher.refresh()
                self._demand.refresh()
                if self._sharing is not None:
                    self._sharing.refresh()
            self._log_requests()
            self._runtime.reloads.applied()
        except Exception:
            logger.exception("reload failed")
            self._runtime.reloads.refused()

    def _forget_orders(self, before: Fleet) -> None:
        """What was ordered about replicas that came and went by themselves goes with them: another one that gets the
        address later must not be born drained. What is written down comes back as it was left."""
        now = set(self._runtime.fleet.upstreams())
        gone = [
            replica
            for pool in before.pools.values()
            if pool.settings.discovery is not None or pool.settings.launch is not None
            for replica, upstream in pool.upstreams.items()
            if upstream not in now
        ]
        if gone:
            self._runtime.spawn(forget_orders(self._runtime.store, gone))

    def reload_refused(self) -> None:
        """The configuration was read again, and cannot be used."""
        self._runtime.reloads.refused()

    def _log_requests(self) -> None:
        """Have requests logged as the settings say, where `gateway.logs` has set up a place for that."""
        wanted, handler = self._runtime.settings.logging.requests, handler_in_use()
        if wanted == "false" or handler is None:
            self._runtime.request_log = None
            return
        if self._request_log is None:
            self._request_log = RequestLog("all", handler.style)
            handler.writer.follow(self._request_log)
        self._request_log.mode = "errors" if wanted == "errors" else "all"
        self._runtime.request_log = self._request_log

    def keys_changed(self) -> None:
        """Read the changes of keys now, not at the next turn."""
        if self._admission.sync is not None:
            self._admission.sync.nudge()

    async def run(self, on_ready: Callable[[], None], on_served: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until stopped; `on_ready` is called once connections are accepted, `on_served` once there are none any
        more, and questions are answered until it is over. Raises `StartError`."""
        runtime = self._runtime
        try:
            self._ledger.start()
        except OSError as error:
            raise StartError(f"usage_log.path: cannot write {self._ledger.path}: {error.strerror or error}.") from error
        try:
            await self._admission.start()
        except AdmissionError as error:
            raise StartError(str(error)) from error
        self._watcher.start()
        if runtime.telemetry is not None:
            runtime.telemetry.start(self._source.metrics)
        await runtime.learn_prompts()
        await self._watcher.first_look(FIRST_LOOK_S)
        if self._sharing is not None:
            self._sharing.start()
        self._watching = True
        if self._sharing is not None:
            await self._sharing.first_look(FIRST_LOOK_S)
        self._demand.start()
        listener, sweep = inference_listener(build_app(runtime), runtime)
        runtime.ticker.add(sweep)
        runtime.overload.start(
            descriptors=self._make_room(),
            unsent=lambda: sweep.unsent_bytes,
            largest_bytes=runtime.settings.server.max_body_bytes,
            workers=self._workers,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(listener.serve(list(self._sockets)))
            admin: Listener | None = None
            if self._admin_sockets:
                admin = admin_listener(self._admin_app)
                tasks.create_task(admin.serve(list(self._admin_sockets)))
            await listener.ready.wait()
            on_ready()
            await self._stop.wait()
            await self._drain(runtime, listener)
            if on_served is not None:
                await on_served()
            listener.should_exit = True
            if admin is not None:
                admin.should_exit = True
                admin.cut()
        if self._sharing is not None:
            await self._sharing.aclose()
        await self._demand.aclose()
        await self._watcher.aclose()
        await runtime.aclose()

    def _make_room(self) -> int:
        """Have fewer clients than there are descriptors; returns how many there are."""
        server = self._runtime.settings.server
        pools = self._runtime.fleet.pools.values()
        found = make_room(
            wanted=server.max_connections,
            upstream=sum(pool.settings.connections.max * len(pool.replicas) for pool in pools),
            other=open_now() + SPARE + PER_REPLICA * sum(len(pool.replicas) for pool in pools),
            asked_for="max_connections" in server.model_fields_set,
        )
        if found.max_connections < server.max_connections:
            self._runtime.overload.max_connections = found.max_connections
        return found.limit

    async def _drain(self, runtime: Runtime, listener: Listener) -> None:
        shutdown = runtime.settings.shutdown
        runtime.draining = True
        if self._graceful and shutdown.grace_s > 0:
            logger.info("stopping: not ready any more, serving for another %g s", shutdown.grace_s)
            await self._wait(shutdown.grace_s, until_closed=None)
        listener.stop_accepting()
        # What waits for a first replica may do so at another gateway; here it would only keep this one from ending.
        gate = runtime.gate
        gate.holding.interrupt(gate.in_line(), Draining("This gateway is shutting down.", retry_after_s=1.0))
        await asyncio.sleep(_POLL_S)  # the idle connections are gone then
        if listener.open_connections:
            logger.info("stopping: %d requests may finish within %g s", listener.open_connections, shutdown.drain_s)
        await self._wait(shutdown.drain_s, until_closed=listener)
        if listener.open_connections:
            logger.warning("stopping: ending %d requests that did not finish", listener.open_connections)
            runtime.interrupt_all(Draining("This gateway is shutting down.", retry_after_s=1.0))
            self._hurry.clear()
            await self._wait(LAST_WORDS_S, until_closed=listener)
        listener.cut()

    async def _wait(self, limit_s: float, *, until_closed: Listener | None) -> None:
        """Until the limit, a second signal, or (if asked) every connection is closed.

        Connections, not exchanges: a request may still be on its way in, or its answer still on its way out.
        """
        end = time.monotonic() + limit_s
        while time.monotonic() < end and not self._hurry.is_set():
            if until_closed is not None and not until_closed.open_connections:
                return
            await asyncio.sleep(_POLL_S)
