"""A process with one worker in it: alone, led by signals; or one of several, led by the supervisor's messages."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import uvloop
from pydantic import SecretStr
from starlette.types import ASGIApp

from backends.launch.tether import tie_to
from gateway import control
from gateway.accounts.worker_routes import worker_routes
from gateway.admin.app import admin_app, private_app
from gateway.admin.desk import Desk
from gateway.admission.opening import Admission
from gateway.config import Settings
from gateway.fleet_view.private import glance_routes
from gateway.inspection.door import door_to
from gateway.inspection.private import request_routes
from gateway.logs import log_loop_problem
from gateway.notices import notice_routes
from gateway.reload import Reloader
from gateway.rollups.private import private_routes as pulse_routes
from gateway.sources import Source
from gateway.steering.at_worker import steered_routes
from gateway.store.remote import RemoteStore
from gateway.worker import StartError, Worker

logger = logging.getLogger("tidegate")

LAST_LOOK_S = 3.0
"""How long a worker that has served its last request waits for the supervisor to read what it has counted."""


def serve_alone(
    settings: Settings,
    read: Callable[[], Settings],
    sockets: Sequence[socket.socket],
    admin_sockets: Sequence[socket.socket],
    admin_token: SecretStr | None,
    on_ready: Callable[[], None],
    state_dir: Path | None = None,
) -> int:
    """The only worker: SIGTERM stops it, a second one hurries, SIGINT (Ctrl-C) stops without grace, SIGHUP reloads.

    SIGINT has no grace because nobody balances load on a terminal. Returns the exit code.
    """

    async def serve() -> int:
        desks: list[Desk] = []
        door = door_to(sockets)

        def build_admin(source: Source, admission: Admission) -> ASGIApp:
            desk = Desk(
                [source],
                lambda: reloader.settings,
                reload=lambda by=None: reloader.now(by),
                read=read,
                database=lambda: None if admission.records is None else admission.records.database(),
                state_dir=state_dir,
                door=door,
            )
            desks.append(desk)
            return admin_app(
                [source],
                host=settings.admin.host,
                token=admin_token,
                routes=admission.admin_routes(),
                allowed_hosts=settings.admin.allowed_hosts,
                desk=desk,
            )

        worker = Worker(
            settings,
            sockets=sockets,
            admin_sockets=admin_sockets,
            build_admin=build_admin,
            trial_secret="" if door is None else door.secret,
        )

        def apply(settings: Settings) -> None:
            worker.reload(settings)
            for desk in desks:
                desk.follow()

        reloader = Reloader(settings, read, apply, refused=worker.reload_refused)

        def stop(graceful: bool) -> None:
            if worker.stopping:
                worker.hurry()
            worker.stop(graceful=graceful)

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop, True)
        loop.add_signal_handler(signal.SIGINT, stop, False)
        loop.add_signal_handler(signal.SIGHUP, reloader.request)
        async with AsyncExitStack() as at_end:
            for desk in desks:
                await desk.find()
                at_end.push_async_callback(desk.lose)
                await desk.start()
                at_end.push_async_callback(desk.aclose)
            await worker.run(on_ready)
        logger.info("stopped")
        return 0

    try:
        return _run(serve())
    except StartError as error:
        logger.error("%s", error)
        return 1


def serve_supervised(index: int, fds: Sequence[int]) -> int:
    """One of several workers; `fds` are the supervisor's socket, the one for admin, and those for clients.

    Signals only count as a wish to stop this worker in order: the supervisor gets them too, and decides for all.
    """
    told, admin, *sockets = [_adopt(fd) for fd in fds]

    async def serve() -> int:
        reader, writer = await asyncio.open_connection(sock=told)
        begin = await control.receive(reader)
        if not isinstance(begin, control.Begin):
            return 1
        tie_to(begin.parent_pid)
        worker = Worker(
            begin.settings,
            sockets=sockets,
            admin_sockets=[admin],
            build_admin=lambda source, _: private_app(
                [source],
                [
                    *worker_routes(source),
                    *glance_routes(source),
                    *request_routes(source),
                    *steered_routes(source),
                    *pulse_routes(source),
                    *notice_routes(source),
                ],
            ),
            index=index,
            store=None if begin.store_path is None else RemoteStore(begin.store_path),
            workers=begin.workers,
            trial_secret=begin.trial_secret,
        )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: worker.stop(graceful=True))
        loop.add_signal_handler(signal.SIGINT, lambda: worker.stop(graceful=False))
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        read = asyncio.Event()
        obeying = loop.create_task(_obey(worker, reader, read), name="control")

        async def tell_counts() -> None:
            writer.write(f"{control.SERVED}\n".encode())
            with suppress(TimeoutError):
                await asyncio.wait_for(read.wait(), LAST_LOOK_S)

        try:
            await worker.run(lambda: writer.write(f"{control.READY}\n".encode()), tell_counts)
        except StartError as error:
            writer.write(f"{control.FAILED}{error}\n".encode())
            await writer.drain()
            raise
        finally:
            obeying.cancel()
            writer.close()
        return 0

    try:
        return _run(serve())
    except (StartError, ProcessLookupError):  # the supervisor was told, or is gone
        return 1


async def _obey(worker: Worker, reader: asyncio.StreamReader, read: asyncio.Event) -> None:
    """Do what the supervisor says; `read` is set when it has read the last counts. When it is gone, end as quickly as
    an orderly end allows."""
    while True:
        match await control.receive(reader):
            case control.Stop(graceful):
                worker.stop(graceful=graceful)
            case control.Hurry():
                worker.hurry()
            case control.Reload(settings):
                worker.reload(settings)
            case control.ReloadRefused():
                worker.reload_refused()
            case control.KeysChanged():
                worker.keys_changed()
            case control.Read():
                read.set()
            case None:
                read.set()
                worker.stop(graceful=False)
                worker.hurry()
                return


def _adopt(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _run(work: Coroutine[Any, Any, int]) -> int:
    # A request leaves no cycles behind: looking for some after every 700 objects (the default) finds none, and with a
    # few dozen requests under way walks over all of theirs each time.
    gc.set_threshold(20_000, 20, 20)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_exception_handler(log_loop_problem)
        return runner.run(work)
