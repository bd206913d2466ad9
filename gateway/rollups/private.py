"""What a worker answers on its private socket, to the process that asks all workers."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.policy import GuardedRoute, Who
from gateway.sources import Source


def private_routes(source: Source) -> list[GuardedRoute]:
    """The worker's counters and its state at a glance."""

    async def pulse(request: Request) -> Response:
        return Response(msgspec.json.encode(await source.pulse()), media_type="application/json")

    return [GuardedRoute("/worker/pulse", pulse, Who.READER, methods=["GET"])]
