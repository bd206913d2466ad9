"""Keys and tenants, as routes of the admin listener: what `tidegate keys` does, over HTTP.

The rules are those of `gateway.keys.issuing`. A key's text is in the answer to its creation and its rotation, once; no
digest is in any answer. Everything that asks the database runs in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.audit import actor_of
from gateway.database.answers import KEY_STATES, KeyQuery
from gateway.database.errors import Conflict, DatabaseError, InvalidValue, NotFound, VersionConflict
from gateway.errors import BodyTooLarge, GatewayError, InvalidRequest
from gateway.keys.format import hidden
from gateway.keys.issuing import DEFAULT_OVERLAP_S, KeySpec, Office, TenantSpec, UnknownName, key_shown, tenant_shown
from gateway.keys.moments import parse_span_s
from gateway.keys.records import KeyRecord, TenantRecord
from gateway.keys.rules import BadValue
from gateway.operations import MAX_BODY_BYTES, json_response
from gateway.policy import About, GuardedRoute, Who

if TYPE_CHECKING:  # it brings in SQLAlchemy, which a gateway without keys does not need
    from gateway.database.database import Database

DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_SEARCHED = 200

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


class VersionChanged(InvalidRequest):
    """Somebody else was quicker: look again, and order again what is still wanted."""

    status = 412
    code = "version_conflict"

    def __init__(self, error: VersionConflict) -> None:
        said = str(error)
        super().__init__(f"{said[:1].upper()}{said[1:]}.", param="if-match")
        self.version = error.version

    def body(self) -> bytes:
        error = msgspec.json.decode(super().body())["error"]
        return msgspec.json.encode({"error": {**error, "version": self.version}})

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers(), (b"etag", b'"%d"' % self.version)]


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
    key, tenant, read, write = "/admin/keys/{id}", "/admin/tenants/{name}", Who.READER, Who.OWNER
    return [
        GuardedRoute("/admin/keys", handlers.keys, read, methods=["GET"], about=_about(query=_LISTED_KEYS)),
        GuardedRoute("/admin/keys", handlers.create, write, methods=["POST"], about=_about(body=KeySpec, status=201)),
        GuardedRoute(key, handlers.key, read, methods=["GET"], about=_about()),
        GuardedRoute(key, handlers.change_key, write, methods=["PATCH"], about=_about(body=KeySpec)),
        GuardedRoute(key, handlers.revoke, write, methods=["DELETE"], about=_about()),
        GuardedRoute(
            f"{key}/rotate", handlers.rotate, write, methods=["POST"], about=_about(body=Rotation, status=201)
        ),
        GuardedRoute("/admin/tenants", handlers.tenants, read, methods=["GET"], about=_about(query=_LISTED)),
        GuardedRoute(tenant, handlers.tenant, read, methods=["GET"], about=_about()),
        GuardedRoute(tenant, handlers.put_tenant, write, methods=["PUT"], about=_about(body=TenantSpec)),
        GuardedRoute(tenant, handlers.remove_tenant, write, methods=["DELETE"], about=_about()),
        GuardedRoute("/admin/undo/{entry}", handlers.undo, write, methods=["POST"], about=_about()),
    ]


_LISTED = {
    "limit": f"At most as many, 1 to {MAX_PAGE}.",
    "after": "The last of the page before.",
    "q": "Only with this in their name, whatever its case.",
}
_LISTED_KEYS = {
    **_LISTED,
    "q": "Only with this in their id, name, hint or tenant's name, whatever its case.",
    "tenant": "Only of this one.",
    "state": f"One of {', '.join(KEY_STATES)}.",
    "order": "`id`, or `newest`: those first that were made last.",
    "count": "`true`: say as well how many there are on all pages.",
}


def _about(*, query: Mapping[str, str] | None = None, body: Any = None, status: int = 200) -> About:
    errors = (KeysOff, UnknownKey, UnknownTenant, KeyConflict, VersionChanged, DatabaseAway)
    return About(query=query or {}, body=body, status=status, errors=errors)


class _Keys:
    def __init__(self, database: Callable[[], Database | None], pepper: bytes | None, on_changed: OnChanged) -> None:
        self._database = database
        self._pepper = pepper
        self._on_changed = on_changed
        self._changing = asyncio.Lock()
        """What an order leaves as it is, was read before: two at once could undo each other."""

    # -- keys

    async def keys(self, request: Request) -> Response:
        """API keys, without the keys: a page of those that are asked for."""
        query, counted = _key_query(request), request.query_params.get("count") == "true"
        page, count = await self._read(
            lambda database: (
                database.finding.keys(query),
                database.finding.count_keys(query) if counted else None,
            )
        )
        now = time.time()
        data = [{**key_shown(record, now), "version": version} for record, version in page.keys]
        answer = {"data": data, "has_more": page.more}
        return json_response(answer if count is None else {**answer, "total": count})

    async def create(self, request: Request) -> Response:
        """Issue a key; the answer has its text, once."""
        spec, actor = await _decoded(request, KeySpec), actor_of(request)
        record, key = await self._change(lambda office: office.create(spec, actor))
        return await self._told_key(record.id, 201, key=key)

    async def key(self, request: Request) -> Response:
        """One key's record."""
        return await self._told_key(request.path_params["id"])

    async def change_key(self, request: Request) -> Response:
        """Change the fields that are sent."""
        id, expected = request.path_params["id"], _expected(request)
        spec, actor = await _decoded(request, KeySpec), actor_of(request)
        await self._change(lambda office: office.update(id, spec, actor, expected))
        return await self._told_key(id, changed=True)

    async def revoke(self, request: Request) -> Response:
        """Revoke a key, for good."""
        id, expected, actor = request.path_params["id"], _expected(request), actor_of(request)
        record = await self._change(lambda office: office.revoke(id, actor, expected))
        return json_response({**key_shown(record, time.time()), "state": "revoked"})

    async def rotate(self, request: Request) -> Response:
        """Issue another key in a key's place."""
        id, expected = request.path_params["id"], _expected(request)
        order, actor = await _decoded(request, Rotation, empty=Rotation()), actor_of(request)
        try:
            overlap_s = DEFAULT_OVERLAP_S if order.overlap is None else parse_span_s(order.overlap)
        except ValueError as error:
            raise _invalid(f"overlap: {error}.", "overlap") from None
        record, key = await self._change(lambda office: office.rotate(id, overlap_s, actor, expected))
        return await self._told_key(record.id, 201, key=key)

    async def _told_key(self, id: str, status: int = 200, *, changed: bool = False, key: str = "") -> Response:
        """A key as it is now, with its version; after a change also which entry of the audit tells of that."""

        def read(database: Database) -> tuple[KeyRecord, int, int | None]:
            record, version = database.finding.key(id)
            return record, version, database.finding.last_change(id) if changed else None

        record, version, entry = await self._read(read)
        shown = {**({"key": key} if key else {}), **key_shown(record, time.time())}
        return _versioned(shown, version, entry, status)

    # -- tenants

    async def tenants(self, request: Request) -> Response:
        """The tenants of the database, each with the number of its keys."""
        limit, after, text = _page(request), _text(request, "after"), _text(request, "q")
        page = await self._read(lambda database: database.finding.tenants(text, after, limit))
        data = [{**tenant_shown(record), "keys": keys, "version": version} for record, version, keys in page.tenants]
        return json_response({"data": data, "has_more": page.more})

    async def tenant(self, request: Request) -> Response:
        """One tenant."""
        return await self._told_tenant(request.path_params["name"])

    async def put_tenant(self, request: Request) -> Response:
        """Change the fields that are sent; makes the tenant if there is none."""
        name, expected = request.path_params["name"], _expected(request)
        spec, actor = await _decoded(request, TenantSpec), actor_of(request)
        await self._change(lambda office: office.put_tenant(name, spec, actor, expected))
        return await self._told_tenant(name, changed=True)

    async def remove_tenant(self, request: Request) -> Response:
        """Remove a tenant that has no keys."""
        name, expected, actor = request.path_params["name"], _expected(request), actor_of(request)
        record = await self._change(lambda office: office.remove_tenant(name, actor, expected), UnknownTenant)
        return json_response({**tenant_shown(record), "removed": True})

    async def _told_tenant(self, name: str, *, changed: bool = False) -> Response:
        def read(database: Database) -> tuple[TenantRecord, int, int, int | None]:
            found = database.finding.tenant(name)
            return *found, database.finding.last_change(name) if changed else None

        record, version, keys, entry = await self._read(read, UnknownTenant)
        return _versioned({**tenant_shown(record), "keys": keys}, version, entry)

    async def undo(self, request: Request) -> Response:
        """Take back a change of a key or a tenant, by the number of its entry in the audit."""
        text, actor = request.path_params["entry"], actor_of(request)
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise InvalidRequest("An entry of the audit is a whole number.", param="entry")

        def order(database: Database) -> KeyRecord | TenantRecord:
            from gateway.keys.undoing import undo

            return undo(database, int(text), actor)

        async with self._changing:
            record = await self._read(order)
        await self._on_changed()
        if isinstance(record, KeyRecord):
            return await self._told_key(record.id, changed=True)
        return await self._told_tenant(record.name, changed=True)

    # -- the database

    def _open(self) -> Database:
        """Blocks: nobody may have needed the database before."""
        database = self._database()
        if database is None:
            raise KeysOff("This gateway runs without API keys (auth: insecure); set auth: keys and restart it.")
        return database

    async def _ask(self, question: Callable[[Office], T], unknown: type[GatewayError] = UnknownKey) -> T:
        return await self._threaded(lambda: question(Office(self._open(), self._pepper)), unknown)

    async def _read(self, question: Callable[[Database], T], unknown: type[GatewayError] = UnknownKey) -> T:
        return await self._threaded(lambda: question(self._open()), unknown)

    async def _change(self, order: Callable[[Office], T], unknown: type[GatewayError] = UnknownKey) -> T:
        """Carry out an order, and tell the other gateways; one that is not told learns it by its next reading."""
        async with self._changing:
            answer = await self._ask(order, unknown)
        await self._on_changed()
        return answer

    @staticmethod
    async def _threaded(call: Callable[[], T], unknown: type[GatewayError]) -> T:
        try:
            return await asyncio.to_thread(call)
        except (BadValue, InvalidValue) as error:
            raise _invalid(f"{error}.", error.field) from None
        except NotFound as error:
            raise unknown(f"{str(error)[:1].upper()}{hidden(str(error))[1:]}.") from None
        except UnknownName as error:
            said = str(error).partition("; ")[0].partition(" in the database")[0]
            raise unknown(f"{said[:1].upper()}{said[1:]}.") from None
        except VersionConflict as error:
            raise VersionChanged(error) from None
        except Conflict as error:
            said = str(error)
            raise KeyConflict(f"{said[:1].upper()}{said[1:]}.") from None
        except DatabaseError as error:
            raise DatabaseAway(f"{error}.", retry_after_s=1.0) from error


def _invalid(message: str, field: str | None) -> InvalidRequest:
    """What was sent is repeated, unless it looks like a key: answers are logged and shown around."""
    return InvalidRequest(hidden(message), param=None if field is None else hidden(field))


def _versioned(shown: dict[str, Any], version: int, entry: int | None, status: int = 200) -> Response:
    """With the version as an entity tag, which a change may name in `If-Match` (RFC 9110, 13.1.1)."""
    shown["version"] = version
    response = json_response(shown if entry is None else {**shown, "audit_id": entry}, status)
    response.headers["etag"] = f'"{version}"'
    return response


def _expected(request: Request) -> int | None:
    """The version that a change is for; None: whatever there is. Raises `InvalidRequest`."""
    said = request.headers.getlist("if-match")
    if not said or said == ["*"]:
        return None
    text = said[0].strip()
    number = text[1:-1]
    if len(said) > 1 or text != f'"{number}"' or not (number.isascii() and number.isdigit() and len(number) < 19):
        raise InvalidRequest("If-Match must be one version, as ETag gives it.", param="if-match", code="invalid_header")
    return int(number)


def _key_query(request: Request) -> KeyQuery:
    state, order = request.query_params.get("state") or None, request.query_params.get("order", "id")
    if state is not None and state not in KEY_STATES:
        raise InvalidRequest(f"state must be one of {', '.join(KEY_STATES)}.", param="state")
    if order not in ("id", "newest"):
        raise InvalidRequest("order must be id or newest.", param="order")
    tenant, newest = request.query_params.get("tenant") or None, order == "newest"
    return KeyQuery(_text(request, "q"), tenant, state, newest, _text(request, "after"), _page(request))


def _text(request: Request, name: str) -> str:
    text = request.query_params.get(name, "")
    if len(text) > MAX_SEARCHED or not text.isprintable():
        raise InvalidRequest(f"{name} must have at most {MAX_SEARCHED} printable characters.", param=name)
    return text


def _page(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_PAGE}.", param="limit")
    return int(text)


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
