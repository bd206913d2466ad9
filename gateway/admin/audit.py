"""The audit of what operators do: keys and tenants, and everything else they order; who came in, and who did not.

Entries are in the database of keys; a gateway without keys has one with the same tables, for the audit alone, in the
state directory (`audit.db`), made with its first entry. There as here the database refuses to change or delete one.

What cannot be written now is kept (`MAX_WAITING` entries), is in the log, and is written with the next one: nobody is
kept from draining a replica by a database that is away. Keys and tenants are the other way round: their entries are
written with the change or not at all (`gateway.database.audit`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.audit_text import cleaned, printable
from gateway.errors import GatewayError, InvalidRequest
from gateway.keys.moments import shown
from gateway.operations import json_response
from gateway.policy import ACTING_FOR, OPERATOR, About, GuardedRoute, Operator, Who

if TYPE_CHECKING:  # it brings in SQLAlchemy, which a gateway where nobody orders anything does not need
    from gateway.admin.desk import Desk
    from gateway.database.answers import AuditEntry
    from gateway.database.database import Database

logger = logging.getLogger("tidegate")
T = TypeVar("T")

FILE = "audit.db"
"""In this gateway's folder of the state directory."""
ITSELF = "gateway"
NOBODY = "nobody"
MAX_WAITING = 1000
WRITTEN_WITHIN_S = 2.0
"""How long an order waits for its entry: databases that are away often say so after several seconds only."""
FAILURES_EVERY_S = 60.0
"""The first failed login is written at once; how many more there were in the minute after it, at its end."""
MAX_ADDRESSES_SHOWN = 10
DEFAULT_PAGE, MAX_PAGE = 100, 1000


class AuditUnavailable(GatewayError):
    status = 503
    code = "audit_unavailable"


@dataclass(frozen=True, slots=True)
class _Entry:
    actor: str
    action: str
    subject: str
    diff: dict[str, Any]
    at_unix_s: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which entries somebody wants to see; empty texts: any."""

    limit: int = DEFAULT_PAGE
    before: int | None = None
    actor: str = ""
    action: str = ""
    object: str = ""


class AuditLog:
    """Writes and reads. To be used from the event loop of the process that answers operators."""

    def __init__(self, database: Callable[[], Database | None] = lambda: None, state_dir: Path | None = None) -> None:
        """`database` blocks, and gives None in a gateway without keys; `state_dir`: where its audit is then."""
        self._database = database
        self._state_dir = state_dir
        self._own: Database | None = None
        self._opening = threading.Lock()
        self._waiting: deque[_Entry] = deque()
        self._lost = 0
        self._writing: asyncio.Task[None] | None = None
        self._failed: dict[str, int] = {}
        self._failed_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def unwritten(self) -> int:
        """Entries that are not in the database yet, and those given up on."""
        return len(self._waiting) + self._lost

    async def note(self, request: Request | None, action: str, subject: str, diff: Mapping[str, Any]) -> None:
        """Write down what an operator has done, or is about to do. Never fails, and never writes down a secret.

        `action` is `thing.verb`; `subject` is what it is done to; `diff` is field: [before, after], or what else there
        is to be known. Without a request, the gateway itself has done it.
        """
        await self._add(ITSELF if request is None else actor_of(request), action, subject, diff)

    def failed_login(self, address: str) -> None:
        """Somebody at `address` could not log in. Any number of these makes at most two entries a minute."""
        if self._failed_timer is None:
            self._spawn(NOBODY, "login.failed", address, {"count": 1})
            self._failed_timer = asyncio.get_running_loop().call_later(FAILURES_EVERY_S, self._sum_up)
        elif address in self._failed or len(self._failed) < MAX_ADDRESSES_SHOWN:
            self._failed[address] = self._failed.get(address, 0) + 1
        else:
            self._failed["others"] = self._failed.get("others", 0) + 1

    def _sum_up(self) -> None:
        self._failed_timer = None
        if self._failed:
            addresses, self._failed = self._failed, {}
            self._spawn(NOBODY, "login.failed", "several", {"count": sum(addresses.values()), "addresses": addresses})

    def _spawn(self, actor: str, action: str, subject: str, diff: Mapping[str, Any]) -> None:
        task = asyncio.get_running_loop().create_task(self._add(actor, action, subject, diff))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _add(self, actor: str, action: str, subject: str, diff: Mapping[str, Any]) -> None:
        entry = _Entry(printable(actor), printable(action, 64), printable(subject), cleaned(diff), time.time())
        logger.info("audit: %s %s %s", entry.actor, entry.action, entry.subject)
        self._waiting.append(entry)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_all(), name="audit")
        await self._written()

    async def _written(self) -> None:
        """What is being written is, or takes too long to be waited for."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=WRITTEN_WITHIN_S)

    async def _write_all(self) -> None:
        try:
            written = True
            while written and self._waiting:  # one may have come when the thread had seen the last
                written = await asyncio.to_thread(self._write)
        finally:
            self._writing = None

    def _write(self) -> bool:
        """Whether all that waited is written. Blocks."""
        from gateway.database.errors import DatabaseError, InvalidValue

        while self._waiting:
            entry = self._waiting.popleft()  # so that what comes meanwhile pushes out another one than this
            late = time.time() - entry.at_unix_s > 5
            diff = {**entry.diff, "ordered_at": shown(round(entry.at_unix_s))} if late else entry.diff
            try:
                self._place().audit.record(entry.actor, entry.action, entry.subject, diff)
            except InvalidValue as error:
                logger.error("audit: what was noted of %s cannot be kept: %s", entry.action, error)
                self._lost += 1
            except (DatabaseError, AuditUnavailable) as error:
                self._waiting.appendleft(entry)
                logger.error("audit: %d entries are not written yet: %s", len(self._waiting), error)
                return False
        return True

    async def list(self, wanted: Wanted) -> tuple[AuditEntry, ...]:
        """The newest first. Raises `AuditUnavailable`."""
        return await self._asked(
            lambda database: database.audit.list(
                wanted.limit, wanted.before, actor=wanted.actor, action=wanted.action, object=wanted.object
            )
        )

    async def missing(self) -> tuple[tuple[int, int], ...]:
        """First and last id of each run of entries that somebody has taken out. Raises `AuditUnavailable`."""
        return await self._asked(lambda database: database.audit.missing())

    async def _asked(self, question: Callable[[Database], T]) -> T:
        from gateway.database.errors import DatabaseError

        await self._written()
        try:
            return await asyncio.to_thread(lambda: question(self._place()))
        except DatabaseError as error:
            raise AuditUnavailable(f"The audit cannot be read: {error}.", retry_after_s=1.0) from error

    def _place(self) -> Database:
        """Where the entries are. Blocks. Raises `DatabaseError` and `AuditUnavailable`."""
        database = self._database()
        if database is not None:
            return database
        if self._state_dir is None:
            raise AuditUnavailable("There is no directory for the audit: set TIDEGATE_STATE_DIR to one.")
        from gateway.database.database import Database

        with self._opening:
            if self._own is None:
                try:
                    self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
                except OSError as error:
                    raise AuditUnavailable(f"There is no directory for the audit: {error}.") from error
                self._own = Database.open(f"sqlite:///{(self._state_dir / FILE).absolute()}")
            return self._own

    async def aclose(self) -> None:
        """Write what is still to be written."""
        if self._failed_timer is not None:
            self._failed_timer.cancel()
            self._sum_up()
        await asyncio.gather(*self._tasks)
        if self._writing is not None:
            await self._writing
        if self._waiting:
            await asyncio.to_thread(self._write)
        if self._own is not None:
            self._own.close()
            self._own = None


def actor_of(request: Request) -> str:
    """Who is written into the audit: whom the guard let in, and whom the bearer of a token says to act for."""
    operator: Operator | None = request.scope.get(OPERATOR)
    if operator is None:
        return NOBODY
    said: str | None = request.scope.get(ACTING_FOR)
    return operator.name if said is None else f"{operator.name}:{said}"


def routes(desk: Desk) -> list[GuardedRoute]:
    """The audit, to be read."""
    return audit_routes(desk.audit)


def audit_routes(log: AuditLog) -> list[GuardedRoute]:
    """The same of an audit alone."""

    async def audit(request: Request) -> Response:
        """Who did what and when, newest first; `missing` are runs of entries that somebody has taken out."""
        wanted = _wanted(request)
        entries = await log.list(Wanted(wanted.limit + 1, wanted.before, wanted.actor, wanted.action, wanted.object))
        return json_response(
            {
                "data": [_shown(entry) for entry in entries[: wanted.limit]],
                "has_more": len(entries) > wanted.limit,
                "missing": [list(run) for run in await log.missing()],
                "unwritten": log.unwritten,
            }
        )

    query = {
        "limit": f"At most as many, 1 to {MAX_PAGE}.",
        "before": "Only older than the entry of this id.",
        "actor": "Only of actors with this in their name.",
        "action": "Only actions that begin with this.",
        "object": "Only of objects with this in their name.",
    }
    about = About(query=query, errors=(AuditUnavailable,))
    return [GuardedRoute("/admin/audit", audit, Who.READER, methods=["GET"], about=about)]


def _shown(entry: AuditEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "time": shown(round(entry.time_unix_s, 3)),
        "time_unix_s": round(entry.time_unix_s, 3),
        "actor": entry.actor,
        "action": entry.action,
        "object": entry.object,
        "diff": entry.diff,
    }


def _wanted(request: Request) -> Wanted:
    query = request.query_params
    limit, before = query.get("limit", str(DEFAULT_PAGE)), query.get("before")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= MAX_PAGE):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_PAGE}.", param="limit")
    if before is not None and not (before.isascii() and before.isdigit() and len(before) <= 18):
        raise InvalidRequest("before must be the id of an entry.", param="before")
    texts = {name: query.get(name, "").strip() for name in ("actor", "action", "object")}
    for name, text in texts.items():
        if len(text) > 200:
            raise InvalidRequest(f"{name} may have 200 characters.", param=name)
    return Wanted(int(limit), None if before is None else int(before), **texts)
