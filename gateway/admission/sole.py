"""Keeps a database for one gateway alone while limits are counted in memory: see `gateway.database.sole`.

A start finds out whether another gateway uses the same database, and waits a little for that one to end, as at a
restart. A gateway that was killed on this machine is seen to be gone; one on another machine is when its lease runs
out. A running gateway that finds its lease in other hands (it was frozen, or the database was away when it started)
says so and counts it, and serves on: ending service would be the greater harm.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.admission.records import AdmissionError, Records

if TYPE_CHECKING:  # it brings in SQLAlchemy
    from gateway.database.sole import Holder

logger = logging.getLogger(__name__)

WAIT_S = 15.0
"""How long a start waits for another gateway to end. Longer than a lease without renewals."""
LOOK_EVERY_S = 0.5
RENEW_EVERY_S = 3.0
GIVE_UP_WITHIN_S = 2.0


class SoleUse:
    """One gateway's lease. `start`, later `aclose`; neither is on a request's path. Belongs to one event loop."""

    def __init__(
        self, records: Records, gateway: str, *, wait_s: float = WAIT_S, renew_every_s: float = RENEW_EVERY_S
    ) -> None:
        self.held = False
        self.lost = 0
        """Times that another gateway was found at work on the same database, after the start."""
        self._records = records
        self._gateway = gateway
        self._wait_s = wait_s
        self._renew_every_s = renew_every_s
        self._stop = asyncio.Event()
        self._no_waiting = asyncio.Event()
        self._failing = False
        self._beside = ""
        """The other gateway that was told of last."""
        self._task: asyncio.Task[None] | None = None

    async def start(self, wait: bool) -> None:
        """Take the lease, if `wait` for as long as another gateway may need to end. Then keep it.

        Without `wait` it is taken when that is possible: the database is not there yet. Raises `AdmissionError` when
        another gateway goes on.
        """
        if wait:
            await self._take_first()
        self._task = asyncio.get_running_loop().create_task(self._keep(), name="sole")

    def stop_waiting(self) -> None:
        """A start that waits for another gateway ends with an `AdmissionError`; a lease that is held is kept."""
        self._no_waiting.set()

    async def aclose(self) -> None:
        """Let the next gateway have it. Call it when nothing is written to the database any more."""
        self._stop.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=GIVE_UP_WITHIN_S)  # a database that hangs holds up nobody's end
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if not self.held:
            return
        with suppress(Exception):  # then it runs out
            async with asyncio.timeout(GIVE_UP_WITHIN_S):
                await asyncio.to_thread(lambda: self._records.database().sole.give_up(self._gateway))

    async def _take_first(self) -> None:
        from gateway.database.errors import DatabaseError
        from gateway.database.sole import LEASE_S

        begun = watched_at = time.monotonic()
        watched: Holder | None = None
        while True:
            now = time.monotonic()
            over = watched if now - watched_at > LEASE_S else None
            try:
                other = await asyncio.to_thread(self._ask, over)
            except DatabaseError as error:
                logger.warning("database: %s; whether another gateway uses it is asked again", error)
                return
            if other is None:
                self.held = True
                if watched is not None:
                    logger.info("database: free since %.1f s after the start; going on", time.monotonic() - begun)
                return
            if watched is None:
                logger.warning(
                    "database: %s is in use by %s; waiting up to %g s for that to end",
                    self._records.shown,
                    described(other),
                    self._wait_s,
                )
            if other != watched:
                watched, watched_at = other, now
            if now - begun >= self._wait_s or self._no_waiting.is_set():
                raise AdmissionError(_refusal(self._records.shown, other))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._no_waiting.wait(), LOOK_EVERY_S)

    async def _keep(self) -> None:
        while not self._stop.is_set():
            try:
                self._found(await asyncio.to_thread(self._ask, None))
            except Exception as error:  # of whatever kind: it is asked again
                if not self._failing:
                    logger.warning("database: the lease of this gateway is not renewed: %s", error)
                self._failing = True
            else:
                self._failing = False
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self._renew_every_s)

    def _found(self, other: Holder | None) -> None:
        if other is None:
            if not self.held and self._beside:
                logger.info("database: this gateway is the only one again")
            self.held, self._beside = True, ""
            return
        self.held = False
        if other.gateway == self._beside:
            return
        self._beside = other.gateway
        self.lost += 1
        logger.error(
            "database: %s is used by %s as well; both count limits in their own memory, so that together they let "
            "through twice what is allowed: stop one of them, or set store: redis://host:port for both",
            self._records.shown,
            described(other),
        )

    def _ask(self, over: Holder | None) -> Holder | None:
        """In a thread. Who has the lease; None: this gateway."""
        from gateway.database.errors import Conflict

        lease = self._records.database().sole
        me = this_process(self._gateway)
        try:
            return lease.take(me, is_gone, over)
        except Conflict:  # another one has just taken what was free
            return lease.take(me, is_gone)


def this_process(gateway: str) -> Holder:
    from gateway.database.sole import Holder

    pid = os.getpid()
    return Holder(gateway, socket.gethostname(), pid, _machine(), _process_started(pid) or 0)


def is_gone(holder: Holder) -> bool:
    """Whether the process has certainly ended: it ran on this machine, and is not there or another by now."""
    if not holder.machine or holder.machine != _machine() or holder.pid <= 0:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's: it is there
        pass
    started = _process_started(holder.pid)
    return started is not None and started != holder.process_started


def described(holder: Holder) -> str:
    since = f"{datetime.fromtimestamp(holder.since_unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return f"another gateway ({holder.gateway}, process {holder.pid} on {holder.host}, since {since})"


def _refusal(database: str, other: Holder) -> str:
    return (
        f"database: {database} is in use by {described(other)}. With store: memory each would keep limits of its own, "
        "and together they would let through twice what is allowed. Set store: redis://host:port for several gateways, "
        "or stop the other one."
    )


def _machine() -> str:
    """The running kernel and the name space of process numbers: the same for two processes that can see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: there are no name spaces of process numbers
        return "" if Path("/proc/self").exists() else socket.gethostname()


def _process_started(pid: int) -> int | None:
    """When it began, in ticks since the kernel did (proc(5): field 22 of `stat`); None where nobody can say.

    -1 for a process that has ended and is still listed, since its parent has not asked for its exit code.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
