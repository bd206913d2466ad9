"""Who may use a route: a part of the route itself, so that none exists without somebody having decided it.

Both listeners are built by `guarded`, which refuses a route that says nothing. What decides is the path that the router
has matched (`scope["path"]`), never a URL put together from headers: those of the client have opened other gateways
(CVE-2026-48710).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeVar

from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from gateway.errors import GatewayError, InvalidRequest

CALLER = "tidegate.caller"
"""Where in the scope of a request `admit` has put whom it let in."""
OPERATOR = "tidegate.operator"
"""Where the guard of the admin listener has put whom it let in: an `Operator`."""
ACTING_FOR = "tidegate.acting_for"
"""And for whom a bearer of a token says to act, where one does."""


class Who(StrEnum):
    """Whom a route is for."""

    ANYONE = "anyone"
    """Whoever can connect: nothing is told that a stranger may not know."""
    KEY = "key"
    """Whoever bears an API key; with `auth: insecure` whoever can connect."""
    LOCAL = "local"
    """Whoever is on this machine; elsewhere as `READER`."""
    REGISTRAR = "registrar"
    """On the admin side: whoever may say where replicas are, how they start and end, and be told how many there should
    be. It may look at nothing else; an operator may this too, a reader not."""
    READER = "reader"
    """On the admin side: whoever may look."""
    OPERATOR = "operator"
    """Whoever may also steer: drain, kill, weigh, load adapters."""
    OWNER = "owner"
    """Whoever may also say who gets in, how much of it, and what it costs: everything."""

    @property
    def rank(self) -> int:
        """1 to 3 for the roles of the admin side each of which may what the one below may; 0: none of them."""
        return _RANKS.get(self, 0)

    @property
    def is_role(self) -> bool:
        """Whether somebody of the admin side can be this."""
        return self in ROLES

    def includes(self, needed: Who) -> bool:
        """Whether somebody of this role may use what is for `needed`."""
        if needed is Who.REGISTRAR:
            return self is Who.REGISTRAR or self.rank >= Who.OPERATOR.rank
        return needed is Who.ANYONE or self.rank >= max(needed.rank, 1)


_RANKS: Mapping[Who, int] = {Who.READER: 1, Who.OPERATOR: 2, Who.OWNER: 3}
ROLES = (Who.REGISTRAR, *_RANKS)


class RoleRequired(InvalidRequest):
    """Somebody known, who may not do this."""

    status = 403
    code = "role_required"


class PoolRefused(InvalidRequest):
    """A registrar whose token is for other pools."""

    status = 403
    code = "pool_refused"


class Operator(NamedTuple):
    """Somebody whom the admin listener has let in."""

    name: str
    """As the audit has it: `admin` has the owner's token, `token:ci` the one that is configured as `ci`,
    `session:admin` has logged in with the owner's token, `oidc:jo@example.org` with an identity provider."""
    role: Who
    how: Literal["token", "session"]
    pools: frozenset[str] | None = None
    """The only ones that a registrar may speak for; None: all."""

    def speak_for(self, pool: str) -> None:
        """Raises `PoolRefused` where somebody may not."""
        if self.pools is not None and pool not in self.pools:
            raise PoolRefused(
                f"This is about the pool {pool[:80]!r}, and {self.name} may speak for {', '.join(sorted(self.pools))} "
                "only (admin.tokens.<name>.pools).",
                param="pool",
            )


@dataclass(frozen=True, slots=True)
class About:
    """What the description of an API says of a route beyond what the route itself shows."""

    summary: str = ""
    """Empty: the first line of the endpoint's docstring."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Parameters in the address, with their meaning."""
    body: Any = None
    """The type that the body of an unsafe method is decoded into (anything that msgspec knows)."""
    answer: Any = None
    """The type of the answer; None: some JSON object."""
    status: int = 200
    """Of an answer that is no error."""
    errors: Sequence[type[GatewayError]] = ()
    """Errors of this route alone."""
    media: str = "application/json"
    """Of the answer."""


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
        about: About | None = None,
    ) -> None:
        """`admit` raises a `GatewayError` for whom the route is not; what it returns is put into the scope. None: who
        comes as far as this has been checked before the router (the roles of the admin side: here, against what was
        found out there), or will be as the first thing that the endpoint does (the exchange, which every edge calls,
        asks who sends a request before it reads it)."""
        super().__init__(path, endpoint, methods=methods)
        self.who = who
        self.about = about or About()
        self._admit = admit
        self._allowed = ", ".join(sorted(self.methods or ()))

    def siblings(self, methods: Iterable[str]) -> None:
        """Other routes have this path for other methods: what is to be said to whoever uses one of none."""
        self._allowed = ", ".join(sorted(methods))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.methods and scope["method"] not in self.methods:
            raise HTTPException(405, headers={"Allow": self._allowed})
        operator: Operator | None = scope.get(OPERATOR)
        needed = self.who.is_role or (self.who is Who.LOCAL and operator is not None)
        if needed and (operator is None or not operator.role.includes(self.who)):
            have = "nobody it knows" if operator is None else f"{operator.name}, a {operator.role.value}"
            raise RoleRequired(f"This needs the role {self.who.value}; you are {have}.")
        if operator is not None and (pool := scope["path_params"].get("pool")) is not None:
            operator.speak_for(pool)
        if self._admit is not None:
            scope[CALLER] = self._admit(scope)
        await super().handle(scope, receive, send)


class UnguardedRoute(TypeError):
    """A route that does not say whom it is for. The application is not built."""


R = TypeVar("R", bound=BaseRoute)


def guarded(routes: Iterable[R]) -> list[R]:
    """The routes as they are. Raises `UnguardedRoute` when one says nothing."""
    found = list(routes)
    methods: defaultdict[str, set[str]] = defaultdict(set)
    for route in found:
        if not isinstance(route, GuardedRoute):
            raise UnguardedRoute(f"{route!r} does not say who may use it; make it a GuardedRoute")
        methods[route.path] |= route.methods or set()
    for route in found:
        if isinstance(route, GuardedRoute):
            route.siblings(methods[route.path])
    return found
