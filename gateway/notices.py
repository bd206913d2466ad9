"""Facts of the shared store that are not about the health of one replica: who has registered, what is in demand, what
agents are to do. Each worker keeps the last of each; the process that answers operators asks a worker for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import InvalidRequest
from gateway.policy import GuardedRoute, Who
from gateway.sources import Announcement, Source, StoreClaim

MEMBER = "member"
"""`member/<pool>/<name>`: a replica that has registered."""
DEMAND = "demand"
"""`demand/<pool>/<worker>`: what a worker sees a pool asked for."""
AGENT = "agent"
"""`agent/<name>`: what launches engines on some machine, and what it has."""
ROLL = "roll"
"""`roll/<pool>`: how often its servers were to be restarted one by one."""
ORDER = "order"
"""`order/<pool>`: how many replicas there should be, by the gateway that decides it."""
HOLD = "hold"
"""`hold/<pool>`: how many an operator wants for a while."""
START = "start"
"""`start/<pool>/<gateway>`: replicas that start (`gateway.starting`)."""
LEARNED = "learned"
"""`learned/<pool>`: what the gateway that decides has learned of what its replicas carry."""
KINDS = frozenset({MEMBER, DEMAND, AGENT, ROLL, ORDER, HOLD, START, LEARNED})
MAX_NOTICES = 20_000
"""Kept by a worker; what a store that is shared with others holds beyond that is not for us."""


class Notices:
    """What one worker has read of them."""

    def __init__(self) -> None:
        self._by_kind: dict[str, dict[str, bytes]] = {}
        self._count = 0

    def reset(self) -> None:
        """All that hold are told again."""
        self._by_kind.clear()
        self._count = 0

    def apply(self, kind: str, key: str, value: bytes | None) -> None:
        """Take one in; without a value it no longer holds."""
        kept = self._by_kind.setdefault(kind, {})
        if value is None:
            self._count -= kept.pop(key, None) is not None
        elif key in kept or self._count < MAX_NOTICES:
            self._count += key not in kept
            kept[key] = value

    def of(self, kind: str) -> Mapping[str, bytes]:
        """Those of a kind, by their keys."""
        return self._by_kind.get(kind, {})


def notice_routes(source: Source) -> list[GuardedRoute]:
    """For the socket between the processes of a gateway, as `gateway.sources.RemoteSource` asks them."""

    async def notices(request: Request) -> Response:
        kind = request.query_params.get("kind", "")
        if kind not in KINDS:
            raise InvalidRequest(f"kind must be one of {', '.join(sorted(KINDS))}.", param="kind")
        return _answer(await source.notices(kind))

    async def announce(request: Request) -> Response:
        told = msgspec.json.decode(await request.body(), type=Announcement)
        if told.value is None:
            await source.retract(told.key)
        else:
            await source.announce(told.key, told.value, told.ttl_s)
        return _answer({})

    async def claim(request: Request) -> Response:
        wanted = msgspec.json.decode(await request.body(), type=StoreClaim)
        return _answer({"claimed": await source.claim(wanted.lease, wanted.holder, wanted.ttl_s)})

    return [
        GuardedRoute("/worker/notices", notices, Who.READER, methods=["GET"]),
        GuardedRoute("/worker/notices", announce, Who.OPERATOR, methods=["POST"]),
        GuardedRoute("/worker/claim", claim, Who.OPERATOR, methods=["POST"]),
    ]


def _answer(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
