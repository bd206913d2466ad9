"""What one worker tells of its policies, and of the requests that it has answered last."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.policy import GuardedRoute, Who
from gateway.steering.traffic import rows_of

if TYPE_CHECKING:
    from gateway.runtime import Runtime
    from gateway.sources import Source

MAX_ROWS = 4_096


class Stamp:
    """A digest of settings, made once for each: two processes that serve the same settings have the same."""

    def __init__(self) -> None:
        self._of: Settings | None = None
        self._stamp = ""

    def of(self, settings: Settings) -> str:
        if settings is not self._of:
            self._stamp = blake2b(settings.model_dump_json().encode(), digest_size=8).hexdigest()
            self._of = settings
        return self._stamp


class Steered:
    """The worker that runs in this process."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._stamp = Stamp()

    def policies(self) -> dict[str, Any]:
        runtime = self._runtime
        known = runtime.traffic.counts()
        return {
            "stamp": self._stamp.of(runtime.settings),
            "models": {
                name: {
                    "policy": route.policy,
                    "pool": route.pool.name,
                    "shadow": None if route.shadow is None else route.shadow.state(),
                    "recent_requests": known[name],
                }
                for name, route in runtime.fleet.models.items()
                if name == route.name
            },
        }

    async def traffic(self, model: str, limit: int) -> list[dict[str, Any]]:
        # Thousands of rows are made beside the event loop, which serves.
        return await asyncio.to_thread(rows_of, self._runtime.traffic.kept, model, limit)


def steered_routes(source: Source) -> list[GuardedRoute]:
    """For the socket between the processes of a gateway: the process that answers operators asks by these."""

    async def policies(request: Request) -> Response:
        return _answer(await source.policies())

    async def traffic(request: Request) -> Response:
        limit = request.query_params.get("limit", "")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= MAX_ROWS):
            raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_ROWS}.", param="limit")
        rows = await source.traffic(request.query_params.get("model", ""), int(limit))
        return await asyncio.to_thread(_answer, rows)

    return [
        GuardedRoute("/worker/policies", policies, Who.READER, methods=["GET"]),
        GuardedRoute("/worker/traffic", traffic, Who.OPERATOR, methods=["GET"]),
    ]


def _answer(content: Sequence[Any] | dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
