"""Who may come in at the admin listener: found out before the router.

Whoever is nobody is told so before anything says what exists (401); whoever is somebody and may not do what is asked is
told which role it needs (403, by the route itself: `gateway.policy.GuardedRoute`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pydantic import SecretStr
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admin.access import Access
from gateway.admin.browser import cross_site_problem, hardened
from gateway.admin.sessions import COOKIE, Session
from gateway.config.values import is_loopback
from gateway.edges.hosts import HostList, WrongHost, host_name
from gateway.error_replies import error_response
from gateway.errors import GatewayError, InvalidRequest
from gateway.policy import ACTING_FOR, OPERATOR, GuardedRoute, Operator, Who

SESSION = "tidegate.session"
"""Where in the scope the `Session` is of somebody who has logged in."""
INSIDE = Operator("gateway", Who.OWNER, "token")
"""Who asks a worker through its private socket: the gateway itself."""
ACTOR_HEADER = "x-tidegate-actor"
MAX_ACTOR_CHARACTERS = 64
_ACTOR = ACTOR_HEADER.encode()
_MAX_COOKIE_BYTES = 8192
_COOKIE_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")


class Unauthorized(InvalidRequest):
    status = 401
    code = "invalid_token"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"www-authenticate", b"Bearer")]


def operator_of(request: Request) -> Operator:
    """Who asks. For routes that somebody had to be let in to."""
    operator: Operator = request.scope[OPERATOR]
    return operator


def session_of(request: Request) -> Session | None:
    """The session by which somebody asks; None for a token. What streams to it has to end with `session.ended`."""
    session: Session | None = request.scope.get(SESSION)
    return session


class Inside:
    """Pure ASGI, in place of the guard behind a private socket: whoever can reach that is the gateway itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[OPERATOR] = INSIDE
        await self._app(scope, receive, send)


class Guard:
    """Pure ASGI: lets a request through when it names this listener and somebody known has sent it.

    The name is checked against DNS rebinding: a web page whose own host name was made to resolve to 127.0.0.1 can have
    a browser send requests here, but not with another name in `Host`. Where other machines can reach the listener,
    nothing is open that a page could ask for, and only then are other names accepted as well.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        token: SecretStr | None,
        allowed_hosts: Sequence[str] = (),
        access: Access | None = None,
    ) -> None:
        """Of the routes of `app`, those are open that say so; of an application without routes, nothing is.

        `access`: whom else than the bearer of `token` it knows."""
        self.app = app
        self.access = access or Access()
        self.access.owner = token
        local = is_loopback(host)
        self._hosts = HostList(allowed_hosts, own=host) if allowed_hosts or local else None
        """None: any name, on an address that other machines can reach."""
        self._open = _open_paths(app, local)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        problem = self.admit(scope)
        answer = self.app if problem is None else error_response(problem)
        await answer(scope, receive, hardened(send))

    def problem(self, path: str, headers: Iterable[tuple[bytes, bytes]], method: str = "GET") -> GatewayError | None:
        """Why such a request is refused; None when it is not."""
        return self.admit({"path": path, "headers": list(headers), "method": method})

    def admit(self, scope: Scope) -> GatewayError | None:
        """Find out who asks, and put that into the scope. Why the request is refused; None when it is not."""
        hosts: list[bytes] = []
        credentials: list[bytes] = []
        cookies: list[bytes] = []
        for name, value in scope["headers"]:
            if name == b"host":
                hosts.append(value)
            elif name == b"authorization":
                credentials.append(value)
            elif name == b"cookie":
                cookies.append(value)
        if len(hosts) != 1 or not self._is_ours(hosts[0].decode("latin-1")):
            return WrongHost("The Host header does not name this admin listener.")
        is_open = self._is_open(scope["path"], scope["method"])
        if credentials or not cookies:  # who shows a token means it
            operator = self._bearer(credentials)
            if operator is not None and (problem := _acting_for(scope)) is not None:
                return problem
        else:
            operator, problem = self._by_session(scope, cookies)
            if problem is not None and not is_open:
                return problem
        if operator is not None:
            scope[OPERATOR] = operator
            return None
        if is_open:
            return None
        if self.access.closed:
            return Unauthorized("The admin interface is closed: there is no owner token; the log says why.")
        if cookies and not credentials:
            return Unauthorized("You are not logged in, or not any more.")
        return Unauthorized("The owner token is missing or wrong; send it as: Authorization: Bearer <token>.")

    def _bearer(self, credentials: list[bytes]) -> Operator | None:
        if len(credentials) != 1:
            return None
        scheme, _, token = credentials[0].partition(b" ")
        return self.access.bearer(token.strip()) if scheme.lower() == b"bearer" else None

    def _by_session(self, scope: Scope, cookies: list[bytes]) -> tuple[Operator | None, GatewayError | None]:
        """Who has logged in, and why that does not count for this request."""
        id = session_id(cookies)
        session = None if id is None else self.access.sessions.find(id)
        if session is None:
            return None, None
        problem = cross_site_problem(scope["method"], scope["headers"])
        if problem is not None:
            return None, problem
        scope[SESSION] = session
        return Operator(session.name, session.role, "session"), None

    def _is_open(self, path: str, method: str) -> bool:
        return any(pattern.match(path) and method not in closed for pattern, closed in self._open)

    def _is_ours(self, value: str) -> bool:
        name = host_name(value)
        return bool(name) and (self._hosts is None or self._hosts.allows(name))


def session_id(cookies: Iterable[bytes], name: str = COOKIE) -> str | None:
    """What the browser keeps of a session; None when it keeps nothing that could be, or two things."""
    found = []
    for header in cookies:
        if len(header) > _MAX_COOKIE_BYTES:
            return None
        for part in header.decode("latin-1").split(";"):
            key, _, value = part.strip(" \t").partition("=")
            if key == name:
                found.append(value)
    return found[0] if len(found) == 1 and _COOKIE_VALUE.fullmatch(found[0]) else None


def _acting_for(scope: Scope) -> GatewayError | None:
    """Put into the scope for whom somebody says to act. Why that cannot be: known before anything is done."""
    said = [value.decode("latin-1").strip() for name, value in scope["headers"] if name == _ACTOR]
    if not said:
        return None
    (name, *more) = said
    if more or not 1 <= len(name) <= MAX_ACTOR_CHARACTERS or not (name.isascii() and name.isprintable()):
        return InvalidRequest(
            f"{ACTOR_HEADER} must be one text of 1 to {MAX_ACTOR_CHARACTERS} printable ASCII characters.",
            param=ACTOR_HEADER,
            code="invalid_header",
        )
    scope[ACTING_FOR] = name
    return None


def _open_paths(app: ASGIApp, local: bool) -> list[tuple[re.Pattern[str], frozenset[str]]]:
    """Paths that nobody has to be let in to, each with the methods for which one has to all the same."""
    routes = [route for route in getattr(app, "routes", ()) if isinstance(route, GuardedRoute)]
    found = {}
    for route in routes:
        if route.who is Who.ANYONE or (local and route.who is Who.LOCAL):
            rest = [each for each in routes if each.path == route.path and each.who.is_role]
            found[route.path] = (route.path_regex, frozenset(m for each in rest for m in each.methods or ()))
    return list(found.values())
