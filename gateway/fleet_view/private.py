"""What the process that answers operators asks of a worker about its replicas: a route of the worker's own socket."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.policy import GuardedRoute, Who
from gateway.sources import Source


def glance_routes(source: Source) -> list[GuardedRoute]:
    """As `gateway.sources.RemoteSource` asks them."""

    async def glance(request: Request) -> Response:
        return Response(msgspec.json.encode(await source.glance()), media_type="application/json")

    return [GuardedRoute("/worker/glance", glance, Who.READER, methods=["GET"])]
