"""What the process that answers operators asks of a worker about its requests: routes of the worker's own socket."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import InvalidRequest
from gateway.inspection.query import Query
from gateway.operations import body_of
from gateway.policy import GuardedRoute, Who
from gateway.sources import Source

MAX_QUERY_BYTES = 65_536


def request_routes(source: Source) -> list[GuardedRoute]:
    """As `gateway.sources.RemoteSource` asks them."""
    requests = _Requests(source)
    one = "/worker/requests/{id}"
    return [
        GuardedRoute("/worker/requests", requests.page, Who.READER, methods=["POST"]),
        GuardedRoute(one, requests.one, Who.READER, methods=["GET"]),
        GuardedRoute(one, requests.end, Who.OPERATOR, methods=["DELETE"]),
    ]


class _Requests:
    def __init__(self, source: Source) -> None:
        self._source = source

    async def page(self, request: Request) -> Response:
        try:
            query = msgspec.json.decode(await body_of(request, MAX_QUERY_BYTES), type=Query)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"The body must be a query: {error}.") from error
        return _json(await self._source.requests(query))

    async def one(self, request: Request) -> Response:
        return _json(await self._source.request(request.path_params["id"]))

    async def end(self, request: Request) -> Response:
        return _json(await self._source.end_request(request.path_params["id"]))


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
