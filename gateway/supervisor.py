"""The parent of several workers: binds what they listen on, keeps them running, tells them to reload and to stop.

It serves nobody but the operators, who see all workers through its admin listener, and the workers, whose shared store
it keeps: the store outlives each of them, and they do not outlive the supervisor. A worker that ends without having
been told to is replaced; workers that cannot even start, while none is serving, end the supervisor, since whatever
started it should hear of that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from gateway import control
from gateway.admin.app import admin_app
from gateway.admin.desk import Desk
from gateway.admission.records import admin_routes, operators_records
from gateway.config import Settings, require_shared_store
from gateway.endings import how_it_ended
from gateway.inspection.door import door_to
from gateway.listener import Listener, admin_listener, bind_uds, listen
from gateway.reload import Reloader
from gateway.sources import RemoteSource
from gateway.store import MemoryStore
from gateway.store.server import StoreServer

logger = logging.getLogger("tidegate")

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 10.0
STABLE_AFTER_S = 30.0
"""A worker that ran this long starts its next failure with the first delay again."""
START_ATTEMPTS = 3
"""Failed starts in a row after which a worker is a reason to give up, if no other one serves."""
KILL_AFTER_S = 10.0
"""How much longer than its own limits a worker may take to stop."""


def next_delay_s(previous_s: float, ran_for_s: float) -> float:
    """How long to wait before replacing a worker: doubled each time, from the start again after a stable run.

    >>> next_delay_s(0.0, ran_for_s=1), next_delay_s(2.0, ran_for_s=1), next_delay_s(8.0, ran_for_s=1)
    (0.5, 4.0, 10.0)
    """
    if previous_s <= 0 or ran_for_s >= STABLE_AFTER_S:
        return FIRST_DELAY_S
    return min(previous_s * 2, LONGEST_DELAY_S)


class _Slot:
    """One worker's place: what stays when the process in it is replaced."""

    def __init__(self, index: int, folder: Path) -> None:
        self.index = index
        self.socket_path = str(folder / f"worker-{index}.sock")
        self.admin_socket = bind_uds(self.socket_path, "the worker's admin socket")
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.ready = False
        self.reason = ""
        """Why the last start failed, in the worker's own words."""

    def tell(self, message: control.Message) -> None:
        """Send, if a worker is there to hear it."""
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(control.encode(message))

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()


class Supervisor:
    """Runs `count` workers on `sockets` until a signal ends it. Raises `AdmissionError`."""

    def __init__(
        self,
        settings: Settings,
        *,
        count: int,
        read: Callable[[], Settings],
        sockets: Sequence[socket.socket],
        admin_sockets: Sequence[socket.socket],
        admin_token: SecretStr | None,
        worker_options: Sequence[str],
        on_ready: Callable[[], None],
        state_dir: Path | None = None,
    ) -> None:
        self._settings = settings
        self._count = count
        self._sockets = list(sockets)
        self._admin_sockets = list(admin_sockets)
        self._admin_token = admin_token
        self._worker_options = worker_options
        self._on_ready = on_ready
        self._slots: list[_Slot] = []
        self._store_path: str | None = None
        self._stopping = asyncio.Event()
        self._gave_up = False
        self._announced = False
        self._deadline: asyncio.TimerHandle | None = None
        self._state_dir = state_dir
        self._door = door_to(sockets)
        self._desk: Desk | None = None
        """Once it is there."""
        self._records = operators_records(settings)
        self._read = read
        # New limits may come with a Redis for them, which does not take effect before a restart.
        self._reloader = Reloader(
            settings,
            read,
            self._apply,
            lambda kept: require_shared_store(kept, "configuration", count),
            self._reload_refused,
        )

    async def run(self) -> int:
        """Returns the exit code: 0 when stopped by a signal, 1 when the workers do not start."""
        with tempfile.TemporaryDirectory(prefix="tidegate-", dir=_short_folder()) as folder:  # mode 0700
            self._slots = [_Slot(index, Path(folder)) for index in range(self._count)]
            listen([slot.admin_socket for slot in self._slots])
            store: StoreServer | None = None
            if self._settings.store == "memory":
                self._store_path = str(Path(folder, "store.sock"))
                store = StoreServer(MemoryStore(), bind_uds(self._store_path, "the workers' store"))
                await store.start()
            self._handle_signals()
            async with asyncio.TaskGroup() as tasks:
                desk = self._desk = self._make_desk()
                await desk.find()
                admin = self._admin(desk)
                if admin is not None:
                    tasks.create_task(admin.serve(self._admin_sockets))
                    await desk.start()
                async with asyncio.TaskGroup() as keepers:
                    for slot in self._slots:
                        keepers.create_task(self._keep(slot))
                for slot in self._slots:  # whoever asks a worker now is refused at once
                    slot.admin_socket.close()
                await desk.lose()
                if admin is not None:
                    await desk.aclose()
                    admin.should_exit = True
                    admin.cut()
            if store is not None:
                await store.aclose()
            if self._records is not None:
                await asyncio.to_thread(self._records.close)
        if self._deadline is not None:
            self._deadline.cancel()
        logger.info("stopped")
        return 1 if self._gave_up else 0

    def _make_desk(self) -> Desk:
        return Desk(
            [RemoteSource(slot.index, slot.socket_path) for slot in self._slots],
            lambda: self._reloader.settings,
            reload=self._reloader.now,
            read=self._read,
            database=lambda: None if self._records is None else self._records.database(),
            state_dir=self._state_dir,
            door=self._door,
        )

    def _admin(self, desk: Desk) -> Listener | None:
        if not self._admin_sockets:
            return None
        settings = self._settings.admin
        app = admin_app(
            desk.sources,
            host=settings.host,
            token=self._admin_token,
            routes=admin_routes(self._settings, self._keys_changed, self._records),
            allowed_hosts=settings.allowed_hosts,
            desk=desk,
        )
        return admin_listener(app)

    async def _keys_changed(self) -> None:
        for slot in self._slots:
            slot.tell(control.KeysChanged())

    def _reload_refused(self) -> None:
        for slot in self._slots:
            slot.tell(control.ReloadRefused())

    # -- keeping workers

    async def _keep(self, slot: _Slot) -> None:
        """Have a worker in this place until everything stops."""
        delay_s = 0.0
        failed_starts = 0
        while not self._stopping.is_set():
            started_at = time.monotonic()
            how = await self._run_worker(slot)
            if self._stopping.is_set():
                return
            failed_starts = 0 if slot.ready else failed_starts + 1
            slot.ready = False
            if failed_starts >= START_ATTEMPTS and not any(each.ready for each in self._slots):
                logger.error("giving up: worker %d does not start: %s", slot.index, slot.reason or how)
                self._gave_up = True
                self._stop(graceful=False)
                return
            delay_s = next_delay_s(delay_s, time.monotonic() - started_at)
            logger.error("worker %d %s; starting another in %g s", slot.index, how, delay_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)

    async def _run_worker(self, slot: _Slot) -> str:
        """Start a worker, wait for its end; returns how it ended."""
        slot.ready, slot.reason = False, ""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            fds = [sock.fileno() for sock in (theirs, slot.admin_socket, *self._sockets)]
            command = [sys.executable, "-m", "gateway", "serve", *self._worker_options]
            command += ["--worker-index", str(slot.index), "--worker-fds", ",".join(map(str, fds))]
            try:
                # A session of its own: Ctrl-C in a terminal is the parent's to pass on.
                slot.process = await asyncio.create_subprocess_exec(
                    *command, stdin=asyncio.subprocess.DEVNULL, pass_fds=fds, start_new_session=True
                )
            except OSError as error:
                ours.close()
                slot.reason = f"cannot run {sys.executable}: {error.strerror or error}"
                return "could not be started"
        reader, slot.writer = await asyncio.open_connection(sock=ours)
        secret = "" if self._door is None else self._door.secret
        slot.tell(control.Begin(os.getpid(), self._settings, self._count, self._store_path, secret))
        if self._stopping.is_set():  # since the process was asked for
            slot.tell(control.Stop(graceful=False))
        try:
            await self._listen_to(slot, reader)
            code = await slot.process.wait()
        finally:
            slot.writer.close()
            slot.writer = None
        how = how_it_ended(code)
        return f"(pid {slot.process.pid}) {how}"

    async def _listen_to(self, slot: _Slot, reader: asyncio.StreamReader) -> None:
        """Take in what the worker says, until it ends."""
        try:
            while line := (await reader.readline()).decode(errors="replace").rstrip("\n"):
                if line == control.READY:
                    slot.ready = True
                    self._announce()
                elif line.startswith(control.FAILED):
                    slot.reason = line.removeprefix(control.FAILED)
                elif line == control.SERVED:
                    await self._read_counts()
                    slot.tell(control.Read())
        except (ConnectionError, ValueError):  # reset by its death; or a line without end
            pass

    async def _read_counts(self) -> None:
        """A worker ends: what it has counted would end with it."""
        if self._desk is not None and self._admin_sockets:
            try:
                await self._desk.count()
            except Exception:
                logger.exception("the last counts of a worker could not be read")

    def _announce(self) -> None:
        if not self._announced and all(slot.ready for slot in self._slots):
            self._announced = True
            self._on_ready()

    # -- signals

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop, True)
        loop.add_signal_handler(signal.SIGINT, self._on_stop, False)
        loop.add_signal_handler(signal.SIGHUP, self._reloader.request)

    def _on_stop(self, graceful: bool) -> None:
        if not self._stopping.is_set():
            self._stop(graceful)
            return
        for slot in self._slots:
            slot.tell(control.Hurry())
        self._kill_in(KILL_AFTER_S)

    def _stop(self, graceful: bool) -> None:
        """Have every worker stop, and wait for that no longer than they may take."""
        self._stopping.set()
        # Workers go on accepting for their grace. Our copy must not outlast theirs: it would keep a queue open that
        # nobody takes from.
        for sock in self._sockets:
            sock.close()
        for slot in self._slots:
            slot.tell(control.Stop(graceful))
        shutdown = self._settings.shutdown
        self._kill_in(shutdown.grace_s * graceful + shutdown.drain_s + KILL_AFTER_S)

    def _kill_in(self, delay_s: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(delay_s, self._kill_all)

    def _kill_all(self) -> None:
        logger.error("stopping: workers that did not end in time are killed")
        for slot in self._slots:
            slot.kill()

    def _apply(self, settings: Settings) -> None:
        """Hand a new configuration to all workers, and to those that will be started later."""
        self._settings = settings
        for slot in self._slots:
            slot.tell(control.Reload(settings))
        if self._desk is not None:
            self._desk.follow()


def _short_folder() -> str | None:
    """Where the sockets' folder is made: a socket's path can have about 100 bytes."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"
