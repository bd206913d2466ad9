"""What a worker tells the process that answers operators about limits and costs: on its private socket only."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.accounts.limit_rows import LimitsQuestion
from gateway.operations import body_of
from gateway.policy import GuardedRoute, Who
from gateway.sources import Source

MAX_QUESTION_BYTES = 262_144


def worker_routes(source: Source) -> list[GuardedRoute]:
    """Asked by `gateway.sources.RemoteSource`, in the shapes of `gateway.accounts`."""

    async def limits(request: Request) -> Response:
        question = msgspec.json.decode(await body_of(request, MAX_QUESTION_BYTES), type=LimitsQuestion)
        return _answer(await source.limits(question))

    async def costs(request: Request) -> Response:
        query = request.query_params
        return _answer(await source.costs(query.get("life", ""), int(query.get("turn", "0"))))

    return [
        GuardedRoute("/admin/worker/limits", limits, Who.OPERATOR, methods=["POST"]),
        GuardedRoute("/admin/worker/costs", costs, Who.OPERATOR, methods=["GET"]),
    ]


def _answer(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
