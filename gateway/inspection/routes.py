"""Inspection: requests under way and past ones, and the playground, as routes."""

from __future__ import annotations

from itertools import islice
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.desk import Desk
from gateway.errors import InvalidRequest
from gateway.inspection.playground import Playground
from gateway.inspection.query import PARAMETERS, Query, place_of, read_query
from gateway.operations import NoWorkerAnswers, json_response
from gateway.policy import About, GuardedRoute, Who
from gateway.sources import ask_all, find_request

TOPIC_PERIOD_S = 1.0
TOPIC_LIVE = 200
TOPIC_SETTLED = 50
"""Rows that viewers are sent each time; where more happens, the page says that it shows a part."""
_SLIM = (
    "id",
    "worker",
    "time_unix_s",
    "tenant",
    "key_id",
    "model",
    "fallback_from",
    "pool",
    "replica",
    "stream",
    "route_reason",
    "attempts",
    "status",
    "outcome",
    "error_code",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "queue_ms",
    "ttft_ms",
    "duration_ms",
    "explained",
    "cursor",
)


class UnknownRequest(InvalidRequest):
    status = 404
    code = "unknown_request"


class RequestOver(InvalidRequest):
    status = 409
    code = "request_over"


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area."""
    inspection = _Inspection(desk)
    playground = Playground(desk)
    desk.hub.topic("requests", TOPIC_PERIOD_S, inspection.topic)
    one = "/admin/requests/{id}"
    return [
        GuardedRoute(
            "/admin/requests", inspection.list, Who.READER, methods=["GET"], about=About(query=dict(PARAMETERS))
        ),
        GuardedRoute(one, inspection.one, Who.READER, methods=["GET"], about=About(errors=[UnknownRequest])),
        GuardedRoute(
            one, inspection.end, Who.OPERATOR, methods=["DELETE"], about=About(errors=[UnknownRequest, RequestOver])
        ),
        *playground.routes(),
    ]


class _Inspection:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def list(self, request: Request) -> Response:
        """Requests under way and past ones."""
        return json_response(await self.page(read_query(request.query_params)))

    async def page(self, query: Query) -> dict[str, Any]:
        """All workers' requests together; `next` continues after the last of `settled`."""
        answers = await ask_all(self._desk.sources, lambda source: source.requests(query))
        pages = [page for _, page in answers if page is not None]
        if self._desk.sources and not pages:
            raise NoWorkerAnswers("No worker answers; they may be starting.", retry_after_s=1.0)
        settled = sorted(
            (row for page in pages for row in page["settled"]), key=lambda row: place_of(row["cursor"]), reverse=True
        )
        shown = list(islice(settled, query.limit))
        return {
            "live": sorted((row for page in pages for row in page["live"]), key=_begun_at),
            "live_total": sum(page["live_total"] for page in pages),
            "settled": shown,
            "next": shown[-1]["cursor"] if len(shown) == query.limit else None,
            "silent_workers": [index for index, page in answers if page is None],
        }

    async def one(self, request: Request) -> Response:
        """One request: its record, what happened when, and why it went where it went."""
        return json_response(await self._found(request.path_params["id"]))

    async def _found(self, id: str) -> dict[str, Any]:
        found = await find_request(self._desk.sources, id)
        if found is None:
            raise UnknownRequest("No request of this id is under way or among the last 1000 of a worker.", param="id")
        return found

    async def end(self, request: Request) -> Response:
        """End a request that is under way: its client gets an error, its engine is told to stop."""
        id = request.path_params["id"]
        found = await self._found(id)
        live = found["live"]
        if live is None:
            raise RequestOver("This request is over already.", param="id")
        subject = {name: live[name] for name in ("tenant", "key_id", "model", "replica", "phase")}
        await self._desk.audit.note(request, "request.end", id, subject)
        answers = await ask_all(self._desk.sources, lambda source: source.end_request(id))
        if not any(ended for _, ended in answers):
            raise RequestOver("This request is over already.", param="id")
        return json_response({"id": id, "ended": True})

    async def topic(self) -> dict[str, Any]:
        """What viewers of the page are told: who is under way, and who was settled last."""
        page = await self.page(Query(limit=TOPIC_SETTLED, live_limit=TOPIC_LIVE))
        return {
            "live": [_without_age(row) for row in page["live"][:TOPIC_LIVE]],
            "live_total": page["live_total"],
            "settled": [{name: row[name] for name in _SLIM} for row in page["settled"]],
            "silent_workers": page["silent_workers"],
        }


def _begun_at(row: dict[str, Any]) -> tuple[float, str]:
    return row["time_unix_s"], row["id"]


def _without_age(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("age_ms", "request_bytes", "response_bytes")}
