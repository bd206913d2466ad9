"""Who may use a route: a part of the route itself, so that none exists without somebody having decided it.

Both listeners are built by `guarded`, which refuses a route that says nothing. What decides is the path that the router
has matched (`scope["path"]`), never a URL put together from headers: those of the client have opened other gateways
(CVE-2026-48710).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

CALLER = "tidegate.caller"
"""Where in the scope of a request `admit` has put whom it let in."""


class Who(StrEnum):
    """Whom a route is for."""

    ANYONE = "anyone"
    """Whoever can connect: nothing is told that a stranger may not know."""
    KEY = "key"
    """Whoever bears an API key; with `auth: insecure` whoever can connect."""
    OPERATOR = "operator"
    """Whoever bears the owner's token."""
    LOCAL = "local"
    """Whoever is on this machine; elsewhere as `OPERATOR`."""


class GuardedRoute(Route):
    """A route that knows whom it is for."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        who: Who,
        *,
        methods: list[str],
        admit: Callable[[Scope], object] | None = None,
    ) -> None:
        """`admit` raises a `GatewayError` for whom the route is not; what it returns is put into the scope. None: who
        comes as far as this has been checked before the router, or will be as the first thing that the endpoint does
        (the exchange, which every edge calls, asks who sends a request before it reads it)."""
        super().__init__(path, endpoint, methods=methods)
        self.who = who
        self._admit = admit

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._admit is not None:
            scope[CALLER] = self._admit(scope)
        await super().handle(scope, receive, send)


class UnguardedRoute(TypeError):
    """A route that does not say whom it is for. The application is not built."""


R = TypeVar("R", bound=BaseRoute)


def guarded(routes: Iterable[R]) -> list[R]:
    """The routes as they are. Raises `UnguardedRoute` when one says nothing."""
    found = list(routes)
    for route in found:
        if not isinstance(route, GuardedRoute):
            raise UnguardedRoute(f"{route!r} does not say who may use it; make it a GuardedRoute")
    return found
