"""Sessions, as routes: logging in with a token, saying who one is, logging out, and ending everybody's session."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.access import Access, session_name
from gateway.admin.browser import CrossSiteRequest, cross_site_problem
from gateway.admin.guard import Unauthorized, session_id, session_of
from gateway.admin.sessions import Session, cookie, no_cookie
from gateway.config.values import is_loopback
from gateway.edges.hosts import host_name
from gateway.errors import InvalidRequest
from gateway.operations import body_of, json_response
from gateway.policy import OPERATOR, About, GuardedRoute, Operator, Who

if TYPE_CHECKING:
    from gateway.admin.desk import Desk

MAX_LOGIN_BYTES = 4096


class LoginThrottled(InvalidRequest):
    status = 429
    code = "login_throttled"


class LoginRefused(Unauthorized):
    """No `WWW-Authenticate`: a browser would ask for it in a window of its own."""

    code = "login_refused"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return []


class InsecureOrigin(InvalidRequest):
    code = "insecure_origin"


class NoSession(InvalidRequest):
    status = 409
    code = "no_session"


class Login(msgspec.Struct, forbid_unknown_fields=True):
    token: str
    """The owner's, or another one of the configuration."""


class Signed(msgspec.Struct):
    """Who somebody is, and until when."""

    name: str
    role: str
    how: str
    """`token` or `session`."""
    expires_in_s: int | None = None
    """Until the session ends at the latest."""
    idle_s: int | None = None
    """Seconds without a request after which it ends before."""


class Ways(msgspec.Struct):
    """How one can log in."""

    token: bool
    oidc: bool
    oidc_name: str | None


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area."""
    from gateway.admin import oidc_routes

    handlers = _Logins(desk)
    session, sessions = "/admin/session", "/admin/sessions"
    return [
        GuardedRoute(session, handlers.who, Who.ANYONE, methods=["GET"], about=About(answer=Signed)),
        GuardedRoute(
            session,
            handlers.login,
            Who.ANYONE,
            methods=["POST"],
            about=About(
                body=Login,
                answer=Signed,
                status=201,
                errors=(LoginRefused, LoginThrottled, InsecureOrigin, CrossSiteRequest),
            ),
        ),
        GuardedRoute(
            session, handlers.logout, Who.READER, methods=["DELETE"], about=About(status=204, errors=(NoSession,))
        ),
        GuardedRoute(f"{session}/ways", handlers.ways, Who.ANYONE, methods=["GET"], about=About(answer=Ways)),
        GuardedRoute(sessions, handlers.sessions, Who.OWNER, methods=["GET"]),
        GuardedRoute(sessions, handlers.end_all, Who.OWNER, methods=["DELETE"]),
        *oidc_routes.routes(desk, handlers.begin),
    ]


class _Logins:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @property
    def _access(self) -> Access:
        return self._desk.access

    async def ways(self, request: Request) -> Response:
        """How one can log in here."""
        oidc = self._access.settings().oidc
        name = None if oidc is None else urlsplit(oidc.issuer).hostname
        return json_response(msgspec.to_builtins(Ways(not self._access.closed, oidc is not None, name)))

    async def who(self, request: Request) -> Response:
        """Who one is; 204 for nobody."""
        operator: Operator | None = request.scope.get(OPERATOR)
        if operator is None:
            headers = {"cache-control": "no-store"}
            id = session_id(_cookies(request))
            if id is not None and self._access.sessions.find(id) is None:  # over; not one that another page shows
                headers["set-cookie"] = no_cookie()
            return Response(status_code=204, headers=headers)
        return json_response(msgspec.to_builtins(self._signed(operator, session_of(request))))

    async def login(self, request: Request) -> Response:
        """Log in with a token; the answer sets the cookie of a session."""
        problem = cross_site_problem("POST", request.scope["headers"], origin_needed=False)
        if problem is not None:
            raise problem
        _require_secure(request)
        address, now = _address(request), time.monotonic()
        wait_s = self._access.throttle.wait_s(address, now)
        if wait_s > 0:
            raise LoginThrottled(
                "There were too many failed logins; wait, or use the command line with the token.", retry_after_s=wait_s
            )
        try:
            given = msgspec.json.decode(await body_of(request, MAX_LOGIN_BYTES), type=Login).token
        except msgspec.MsgspecError:
            raise InvalidRequest('The body must be {"token": "..."}.', param="token") from None
        operator = self._access.bearer(given.encode("utf-8", "replace"))
        if operator is None:
            self._access.throttle.failed(address, now)
            self._desk.audit.failed_login(address)
            raise LoginRefused("This is not a token of this gateway.", param="token")
        if operator.role is Who.REGISTRAR:
            raise LoginRefused("This token is a replica's: it registers, and has nothing to look at.", param="token")
        session, told = await self.begin(request, session_name(operator), operator.role, "token")
        response = json_response(msgspec.to_builtins(self._signed(request.scope[OPERATOR], session)), 201)
        response.headers.append("set-cookie", told)
        return response

    async def begin(self, request: Request, name: str, role: Who, by: str) -> tuple[Session, str]:
        """Open a session, whatever the browser came with; the second is the header that has it keep that."""
        before = session_id(_cookies(request))
        if before is not None and (old := self._access.sessions.find(before)) is not None:
            self._access.sessions.end(old)
        id, session = self._access.sessions.open(name, role)
        request.scope[OPERATOR] = Operator(name, role, "session")
        await self._desk.audit.note(
            request, "login", name, {"by": by, "role": role.value, "address": _address(request)}
        )
        return session, cookie(id, self._access.settings().session.lifetime_s)

    async def logout(self, request: Request) -> Response:
        """End the session that asks for it."""
        session = session_of(request)
        if session is None:
            raise NoSession("A token has no session to end; it is valid as long as it is configured.")
        self._access.sessions.end(session)
        await self._desk.audit.note(request, "logout", session.name, {})
        return Response(status_code=204, headers={"set-cookie": no_cookie(), "cache-control": "no-store"})

    async def sessions(self, request: Request) -> Response:
        """Who has logged in, without what would let one in."""
        own, now = session_of(request), time.monotonic()
        return json_response(
            {
                "data": [
                    {
                        "name": session.name,
                        "role": session.role.value,
                        "since": datetime.fromtimestamp(session.began_unix_s, UTC).isoformat(timespec="seconds"),
                        "idle_s": round(max(0.0, now - session.used_at)),
                        "yours": session is own,
                    }
                    for session in self._access.sessions
                ]
            }
        )

    async def end_all(self, request: Request) -> Response:
        """End everybody's session, one's own too."""
        count = self._access.sessions.end_all()
        await self._desk.audit.note(request, "sessions.end", "all", {"count": count})
        response = json_response({"ended": count})
        response.headers.append("set-cookie", no_cookie())
        return response

    def _signed(self, operator: Operator, session: Session | None) -> Signed:
        signed = Signed(operator.name, operator.role.value, operator.how)
        if session is not None:
            settings = self._access.settings().session
            signed.expires_in_s = int(max(0.0, session.began_at + settings.lifetime_s - time.monotonic()))
            signed.idle_s = int(settings.idle_s)
        return signed


def _cookies(request: Request) -> list[bytes]:
    return [value for name, value in request.scope["headers"] if name == b"cookie"]


def _address(request: Request) -> str:
    client: Any = request.scope.get("client")
    return str(client[0]) if client else "local"


def _require_secure(request: Request) -> None:
    """A browser drops a Secure cookie that came over plain HTTP from elsewhere, without a word; better say so."""
    origin = request.headers.get("origin", "")
    if origin.startswith("http://") and not is_loopback(host_name(origin.removeprefix("http://"))):
        raise InsecureOrigin(
            "This page came over plain HTTP, where browsers keep no session. Put a proxy with TLS before the admin "
            "listener, or forward its port (ssh -L 7401:127.0.0.1:7401) and open http://127.0.0.1:7401/admin/."
        )
