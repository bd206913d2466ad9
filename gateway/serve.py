"""`tidegate serve`: binds the sockets, then runs one worker in this process or supervises several."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import SecretStr

from gateway.config import Settings
from gateway.config.values import is_loopback
from gateway.listener import bind_tcp, bind_uds, listen
from gateway.owner import STATE_DIR, StateError, state_directory, stored_token

logger = logging.getLogger("tidegate")


def run(
    settings: Settings,
    read: Callable[[], Settings],
    environ: Mapping[str, str],
    *,
    workers: int,
    worker_options: Sequence[str] = (),
) -> int:
    """Serve until a signal ends it; returns the exit code. Raises `BindError` before anything is started.

    `read` loads the configuration again, for a reload. `worker_options` go on the command line of every worker.
    """
    _no_core_dumps()
    with _bound(settings) as (sockets, admin_sockets):
        listen([*sockets, *admin_sockets])
        token = _owner_token(settings, environ) if admin_sockets else None
        state_dir = _state_dir(environ, admin_sockets[0]) if admin_sockets else None
        for sock in admin_sockets:
            logger.info("admin on %s", _address(sock))
            if not is_loopback(settings.admin.host):
                logger.warning(
                    "admin can be reached from other machines, and is without TLS: put a proxy that has it in front, "
                    "or tokens can be read on the way and browsers keep no session (docs/admin.md)"
                )
        where = ", ".join(_address(sock) for sock in sockets)
        # Imported here, so that the supervising process holds nothing of the request path, and a worker nothing else.
        if workers == 1:
            from gateway.worker_process import serve_alone

            return serve_alone(
                settings,
                read,
                sockets,
                admin_sockets,
                token,
                lambda: logger.info("serving on %s", where),
                state_dir,
            )
        from gateway.supervisor import Supervisor

        async def supervise() -> int:
            supervisor = Supervisor(
                settings,
                count=workers,
                read=read,
                sockets=sockets,
                admin_sockets=admin_sockets,
                admin_token=token,
                worker_options=worker_options,
                on_ready=lambda: logger.info("serving on %s with %d workers", where, workers),
                state_dir=state_dir,
            )
            return await supervisor.run()

        return asyncio.run(supervise())


def _no_core_dumps() -> None:
    """Memory holds prompts, and the keys of engines: a crash must not write it to a disk. Workers inherit this."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def _bound(settings: Settings) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    """The sockets for clients and for operators; closed, and the file of a Unix socket removed, at the end."""
    server, admin = settings.server, settings.admin
    with ExitStack() as at_exit:
        if server.uds is None:
            sock = bind_tcp(server.host, server.port, "server.port")
        else:
            sock = bind_uds(str(server.uds), "server.uds")
            at_exit.callback(_remove, str(server.uds), os.stat(server.uds))
        at_exit.callback(sock.close)
        admin_sockets: list[socket.socket] = []
        if admin.enabled:
            admin_sockets.append(bind_tcp(admin.host, admin.port, "admin.port"))
            at_exit.callback(admin_sockets[0].close)
        yield [sock], admin_sockets


def _remove(path: str, ours: os.stat_result) -> None:
    """Remove our socket's file; not the one that another gateway has put in its place since."""
    try:
        if os.path.samestat(os.stat(path), ours):
            os.unlink(path)
    except OSError as error:
        logger.debug("%s is not removed: %s", path, error.strerror)


def _owner_token(settings: Settings, environ: Mapping[str, str]) -> SecretStr | None:
    """The configured token, else the one in the state directory; None, with the reason in the log, without either."""
    if settings.admin.token is not None:
        return settings.admin.token
    try:
        token, path = stored_token(environ)
    except StateError as error:
        logger.warning(
            "admin stays closed, since no owner token can be kept: %s. Set admin.token, or %s to a directory that can "
            "be written.",
            error,
            STATE_DIR,
        )
        return None
    logger.info("admin: the owner token is in %s", path)
    return token


def _state_dir(environ: Mapping[str, str], admin: socket.socket) -> Path | None:
    """Where this gateway keeps what it has learned and been told: a folder for each address of an admin listener, since
    several gateways of one user may run on a machine. None, with the reason in the log, where there can be none."""
    host, port = admin.getsockname()[:2]
    try:
        folder = state_directory(environ) / f"gateway-{host.replace(':', '_')}-{port}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (StateError, OSError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        logger.warning("history is not kept over restarts, nor an audit without keys: %s. Set %s.", reason, STATE_DIR)
        return None
    return folder


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"
