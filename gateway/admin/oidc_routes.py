"""Logging in at an identity provider, as routes: to it, and back from it.

What goes wrong is shown by the login page, as one of a few words (`/admin/?signin=expired`); the log says more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.guard import session_id
from gateway.admin.oidc import PENDING_S, Attempts, OidcError, Provider
from gateway.admin.sessions import Session, no_cookie
from gateway.config.operators import CALLBACK_PATH
from gateway.errors import InvalidRequest
from gateway.policy import About, GuardedRoute, Who

if TYPE_CHECKING:
    from gateway.admin.desk import Desk

logger = logging.getLogger("tidegate")

ATTEMPT_COOKIE = "__Host-tidegate-login"
MAX_CODE_CHARACTERS = 4096
Begin = Callable[[Request, str, Who, str], Awaitable[tuple[Session, str]]]
"""Opens a session for a request, by the name and role of somebody, and how they came; with the header that tells."""


class OidcOff(InvalidRequest):
    status = 404
    code = "oidc_off"


def routes(desk: Desk, begin: Begin) -> list[GuardedRoute]:
    """The routes. `begin` opens the session of somebody whom the provider has named."""
    handlers = _Oidc(desk, begin)
    to_provider = About(status=303, errors=(OidcOff,))
    back = About(
        status=303,
        query={"code": "From the provider.", "state": "From the provider.", "iss": "From the provider."},
        errors=(OidcOff,),
    )
    return [
        GuardedRoute("/admin/session/oidc", handlers.away, Who.ANYONE, methods=["GET"], about=to_provider),
        GuardedRoute(CALLBACK_PATH, handlers.back, Who.ANYONE, methods=["GET"], about=back),
    ]


class _Oidc:
    def __init__(self, desk: Desk, begin: Begin) -> None:
        self._desk = desk
        self._begin = begin
        self._attempts = Attempts()
        self._made: Provider | None = None

    @property
    def _provider(self) -> Provider:
        settings = self._desk.access.settings().oidc
        if settings is None:
            raise OidcOff("This gateway has no identity provider (admin.oidc).")
        if self._made is None:
            self._made = Provider(settings)
        return self._made

    async def away(self, request: Request) -> Response:
        """To the identity provider, where one logs in."""
        state, kept, pending = self._attempts.begin()
        try:
            address = await self._provider.address(state, pending)
        except OidcError as error:
            return self._sorry(error)
        # Lax: the browser comes back from another site, and is to show this then.
        kept_cookie = f"{ATTEMPT_COOKIE}={kept}; Path=/; Max-Age={int(PENDING_S)}; Secure; HttpOnly; SameSite=Lax"
        return _to(address, kept_cookie)

    async def back(self, request: Request) -> Response:
        """From the identity provider; the answer sets the cookie of a session."""
        provider, access, query = self._provider, self._desk.access, request.query_params
        address, now = str(request.client.host) if request.client else "local", time.monotonic()
        if access.throttle.wait_s(address, now) > 0:
            return self._sorry(OidcError("throttled", "too many failed logins"))
        cookies = [value for name, value in request.scope["headers"] if name == b"cookie"]
        try:
            pending = self._attempts.finish(query.get("state", ""), session_id(cookies, ATTEMPT_COOKIE))
            settings = access.settings().oidc
            if settings is None or query.get("iss", settings.issuer) != settings.issuer:
                raise OidcError("refused", "the answer is another issuer's")
            code = query.get("code", "")
            if not 1 <= len(code) <= MAX_CODE_CHARACTERS:
                raise OidcError("refused", "the provider did not log anybody in")
            person = await provider.person(code, pending)
        except OidcError as error:
            # A state cannot be guessed, and any page can have a browser come here with none.
            if error.code not in ("unavailable", "expired"):
                access.throttle.failed(address, now)
                self._desk.audit.failed_login(address)
            return self._sorry(error)
        _, cookie = await self._begin(request, person.name, person.role, "oidc")
        return _to("/admin/", cookie, no_cookie(ATTEMPT_COOKIE))

    def _sorry(self, error: OidcError) -> Response:
        logger.warning("admin: nobody was logged in by the identity provider: %s", error)
        return _to(f"/admin/?signin={error.code}", no_cookie(ATTEMPT_COOKIE))


def _to(address: str, *cookies: str) -> Response:
    response = Response(status_code=303, headers={"location": address, "cache-control": "no-store"})
    for each in cookies:
        response.headers.append("set-cookie", each)
    return response
