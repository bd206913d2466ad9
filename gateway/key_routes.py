"""Keys, tenants and the audit, as routes of the admin listener: what `tidegate keys` does, over HTTP.

The rules are those of `gateway.keys.issuing`. A key's text is in the answer to its creation and its rotation, once; no
digest is in any answer. Everything that asks the database runs in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.database.errors import Conflict, DatabaseError, InvalidValue
from gateway.errors import BodyTooLarge, GatewayError, InvalidRequest
from gateway.keys.format import hidden
from gateway.keys.issuing import DEFAULT_OVERLAP_S, KeySpec, Office, TenantSpec, UnknownName, key_shown, tenant_shown
from gateway.keys.moments import parse_span_s, shown
from gateway.keys.rules import BadValue
from gateway.operations import MAX_BODY_BYTES, json_response
from gateway.policy import GuardedRoute, Who

if TYPE_CHECKING:  # it brings in SQLAlchemy, which a gateway without keys does not need
    from gateway.database.database import Database

ACTOR_HEADER = "x-tidegate-actor"
MAX_ACTOR_CHARACTERS = 64
DEFAULT_PAGE = 100
MAX_PAGE = 1000

OnChanged = Callable[[], Awaitable[None]]
Spec = TypeVar("Spec")
T = TypeVar("T")


class KeysOff(InvalidRequest):
    status = 409
    code = "keys_off"


class UnknownKey(InvalidRequest):
    status = 404
    code = "unknown_key"


class UnknownTenant(InvalidRequest):
    status = 404
    code = "unknown_tenant"


class KeyConflict(InvalidRequest):
    status = 409
    code = "key_conflict"


class DatabaseAway(GatewayError):
    status = 503
    code = "database_unavailable"


class Rotation(msgspec.Struct, forbid_unknown_fields=True):
    overlap: str | None = None
    """How long the old key goes on, such as `24h`; null: a day."""


def key_routes(
    database: Callable[[], Database | None], pepper: bytes | None, on_changed: OnChanged
) -> list[GuardedRoute]:
    """The routes. `database` gives None in a gateway without keys; `on_changed` is awaited after each change."""
    handlers = _Keys(database, pepper, on_changed)
    key, tenant = "/admin/keys/{id}", "/admin/tenants/{name}"
    return [
        GuardedRoute("/admin/keys", handlers.keys, Who.OPERATOR, methods=["GET", "POST"]),
        GuardedRoute(key, handlers.key, Who.OPERATOR, methods=["GET", "PATCH", "DELETE"]),
        GuardedRoute(f"{key}/rotate", handlers.rotate, Who.OPERATOR, methods=["POST"]),
        GuardedRoute("/admin/tenants", handlers.tenants, Who.OPERATOR, methods=["GET"]),
        GuardedRoute(tenant, handlers.tenant, Who.OPERATOR, methods=["GET", "PUT"]),
        GuardedRoute("/admin/audit", handlers.audit, Who.OPERATOR, methods=["GET"]),
    ]


class _Keys:
    def __init__(self, database: Callable[[], Database | None], pepper: bytes | None, on_changed: OnChanged) -> None:
        self._database = database
        self._pepper = pepper
        self._on_changed = on_changed
        self._changing = asyncio.Lock()
        """What an order leaves as it is, was read before: two at once could undo each other."""

    # -- keys

    async def keys(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._create(request)
        limit, after = _page(request), request.query_params.get("after", "")
        tenant = request.query_params.get("tenant")
        records = await self._ask(lambda office: office.keys(tenant))
        rest = [record for record in records if record.id > after]
        now = time.time()
        page = [key_shown(record, now) for record in rest[:limit]]
        return json_response({"data": page, "has_more": len(rest) > limit})

    async def _create(self, request: Request) -> Response:
        spec, actor = await _decoded(request, KeySpec), _actor(request)
        record, key = await self._change(lambda office: office.create(spec, actor))
        return json_response({"key": key, **key_shown(record, time.time())}, 201)

    async def key(self, request: Request) -> Response:
        id = request.path_params["id"]
        if request.method == "PATCH":
            spec, actor = await _decoded(request, KeySpec), _actor(request)
            return json_response(
                key_shown(await self._change(lambda office: office.update(id, spec, actor)), time.time())
            )
        if request.method == "DELETE":
            actor = _actor(request)
            record = await self._change(lambda office: office.revoke(id, actor))
            return json_response({**key_shown(record, time.time()), "state": "revoked"})
        return json_response(key_shown(await self._ask(lambda office: office.key(id)), time.time()))

    async def rotate(self, request: Request) -> Response:
        id = request.path_params["id"]
        order, actor = await _decoded(request, Rotation, empty=Rotation()), _actor(request)
        try:
            overlap_s = DEFAULT_OVERLAP_S if order.overlap is None else parse_span_s(order.overlap)
        except ValueError as error:
            raise _invalid(f"overlap: {error}.", "overlap") from None
        record, key = await self._change(lambda office: office.rotate(id, overlap_s, actor))
        return json_response({"key": key, **key_shown(record, time.time())}, 201)

    # -- tenants

    async def tenants(self, request: Request) -> Response:
        limit, after = _page(request), request.query_params.get("after", "")
        rest = [record for record in await self._ask(lambda office: office.tenants()) if record.name > after]
        page = [tenant_shown(record) for record in rest[:limit]]
        return json_response({"data": page, "has_more": len(rest) > limit})

    async def tenant(self, request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "PUT":
            spec, actor = await _decoded(request, TenantSpec), _actor(request)
            record = await self._change(lambda office: office.put_tenant(name, spec, actor))
        else:
            record = await self._ask(lambda office: office.tenant(name), UnknownTenant)
        return json_response(tenant_shown(record))

    # -- the audit

    async def audit(self, request: Request) -> Response:
        limit, before = _page(request), request.query_params.get("before")
        if before is not None and not (before.isascii() and before.isdigit() and len(before) <= 18):
            raise InvalidRequest("before must be the id of an entry.", param="before")
        before_id = None if before is None else int(before)
        entries = await self._threaded(lambda: self._open().audit.list(limit, before_id), UnknownKey)
        data = [
            {
                "id": entry.id,
                "time": shown(round(entry.time_unix_s, 3)),
                "actor": entry.actor,
                "action": entry.action,
                "object": entry.object,
                "diff": entry.diff,
            }
            for entry in entries
        ]
        return json_response({"data": data})

    # -- the database

    def _open(self) -> Database:
        """Blocks: nobody may have needed the database before."""
        database = self._database()
        if database is None:
            raise KeysOff("This gateway runs without API keys (auth: insecure); set auth: keys and restart it.")
        return database

    async def _ask(self, question: Callable[[Office], T], unknown: type[GatewayError] = UnknownKey) -> T:
        return await self._threaded(lambda: question(Office(self._open(), self._pepper)), unknown)

    async def _change(self, order: Callable[[Office], T]) -> T:
        """Carry out an order, and tell the other gateways; one that is not told learns it by its next reading."""
        async with self._changing:
            answer = await self._ask(order)
        await self._on_changed()
        return answer

    @staticmethod
    async def _threaded(call: Callable[[], T], unknown: type[GatewayError]) -> T:
        try:
            return await asyncio.to_thread(call)
        except (BadValue, InvalidValue) as error:
            raise _invalid(f"{error}.", error.field) from None
        except UnknownName as error:
            said = str(error).partition("; ")[0].partition(" in the database")[0]
            raise unknown(f"{said[:1].upper()}{said[1:]}.") from None
        except Conflict as error:
            said = str(error)
            raise KeyConflict(f"{said[:1].upper()}{said[1:]}.") from None
        except DatabaseError as error:
            raise DatabaseAway(f"{error}.", retry_after_s=1.0) from error


def _invalid(message: str, field: str | None) -> InvalidRequest:
    """What was sent is repeated, unless it looks like a key: answers are logged and shown around."""
    return InvalidRequest(hidden(message), param=None if field is None else hidden(field))


def _page(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_PAGE}.", param="limit")
    return int(text)


def _actor(request: Request) -> str:
    """Who is written into the audit: the owner's token, and whom its bearer acts for if that is said."""
    said = request.headers.getlist(ACTOR_HEADER)
    if not said:
        return "admin"
    name = said[0].strip()
    if len(said) > 1 or not 1 <= len(name) <= MAX_ACTOR_CHARACTERS or not (name.isascii() and name.isprintable()):
        raise InvalidRequest(
            f"{ACTOR_HEADER} must be one text of 1 to {MAX_ACTOR_CHARACTERS} printable ASCII characters.",
            param=ACTOR_HEADER,
            code="invalid_header",
        )
    return f"admin:{name}"


async def _decoded(request: Request, kind: type[Spec], empty: Spec | None = None) -> Spec:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise BodyTooLarge(f"The body may have {MAX_BODY_BYTES} bytes.")
    if not body and empty is not None:
        return empty
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(f"The body cannot be used: {error}.", _field(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json") from None


def _field(problem: str) -> str | None:
    """The field that msgspec complains of: `... unknown field `colour` - at `$.raises[0]``, or a part of it."""
    _, found, place = problem.partition(" - at `$")
    unknown = problem.partition("unknown field `")[2].partition("`")[0]
    missing = problem.partition("required field `")[2].partition("`")[0]
    parts = [place.rstrip("`").lstrip(".") if found else "", unknown or missing]
    return ".".join(part for part in parts if part) or None
