"""The operators' listener: metrics in Prometheus' format; the state of the fleet, usage records and commands as JSON.

Nothing is answered to whoever is nobody, routes that say otherwise excepted (`/metrics` on a loopback address, the
dashboard's files). The check stands in front of the router, so that a path that does not exist is closed as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from heapq import merge
from itertools import islice
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.admin.areas import area_routes
from gateway.admin.desk import Desk
from gateway.admin.guard import Guard, Inside
from gateway.admin.openapi import described
from gateway.error_replies import ERROR_HANDLERS
from gateway.errors import InvalidRequest
from gateway.operations import NoWorkerAnswers, Operations, body_of, json_response
from gateway.policy import About, GuardedRoute, Who, guarded
from gateway.scaling.shown import families
from gateway.sources import WORKER_UP, Silent, Source, ask_all

DEFAULT_RECORDS = 100
MAX_RECORDS = 1000
"""What a worker keeps in memory."""
METRICS_PATH = "/metrics"
MAX_QUESTION_BYTES = 16 * 2**20
"""Of a request to explain."""


def admin_app(
    sources: Sequence[Source],
    *,
    host: str,
    token: SecretStr | None,
    routes: Sequence[GuardedRoute] = (),
    allowed_hosts: Sequence[str] = (),
    desk: Desk | None = None,
) -> ASGIApp:
    """The app for the admin listener on `host`, with these further routes. Without a token it stays closed.

    `desk`: what the areas of the admin side work with; without one there are only the routes about workers."""
    found = _routes(sources, routes, desk)
    app = Starlette(routes=found, exception_handlers=ERROR_HANDLERS)
    access = None if desk is None else desk.access
    return Guard(app, host=host, token=token, allowed_hosts=allowed_hosts, access=access)


def private_app(sources: Sequence[Source], routes: Sequence[GuardedRoute] = ()) -> Starlette:
    """The same without the guard: for a socket that only this user's processes can reach."""
    middleware = [Middleware(Inside)]
    return Starlette(routes=_routes(sources, routes), exception_handlers=ERROR_HANDLERS, middleware=middleware)


def _routes(sources: Sequence[Source], routes: Sequence[GuardedRoute], desk: Desk | None = None) -> list[GuardedRoute]:
    admin = _Admin(sources, desk)
    found = [
        GuardedRoute(METRICS_PATH, admin.metrics, Who.LOCAL, methods=["GET"], about=About(media=CONTENT_TYPE_LATEST)),
        GuardedRoute("/admin/fleet", admin.fleet, Who.READER, methods=["GET"]),
        GuardedRoute(
            "/admin/usage", admin.usage, Who.READER, methods=["GET"], about=About(query={"limit": "At most as many."})
        ),
        GuardedRoute("/admin/explain", admin.explain, Who.OPERATOR, methods=["POST"], about=About(body=dict[str, Any])),
        *Operations(sources, None if desk is None else desk.audit.note).routes(),
        *routes,
        *([] if desk is None else area_routes(desk)),
    ]
    return guarded([*found, *described(found)])


class _Admin:
    def __init__(self, sources: Sequence[Source], desk: Desk | None) -> None:
        self._sources = sources
        self._desk = desk

    async def metrics(self, request: Request) -> Response:
        """All workers' metrics, in Prometheus' text format."""
        answers = await ask_all(self._sources, lambda source: source.metrics())
        registry = CollectorRegistry()
        own = [] if self._desk is None else families(self._desk.scaling.helms.values())
        registry.register(_Families([*merged(answers), *own]))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def fleet(self, request: Request) -> Response:
        """What each worker is, serves and sees."""
        answers = await ask_all(self._sources, lambda source: source.fleet())
        return json_response({"workers": [state or {"worker": index, "up": False} for index, state in answers]})

    async def usage(self, request: Request) -> Response:
        """Usage records, the last settled first."""
        limit = _limit(request.query_params.get("limit"))
        answers = await ask_all(self._sources, lambda source: source.usage(limit))
        # Merged, not sorted: times are rounded in a record, but each worker has its own in the right order.
        records = merge(*(records or () for _, records in answers), key=_settled_at, reverse=True)
        return json_response({"data": list(islice(records, limit))})

    async def explain(self, request: Request) -> Response:
        """Where a request would go and why; it is not sent."""
        question = await body_of(request, MAX_QUESTION_BYTES)
        if not question:
            raise InvalidRequest("The body must be the request to explain, as JSON.")
        for source in self._sources:
            with suppress(Silent):  # another one knows as much
                return json_response(await source.explain(question))
        raise NoWorkerAnswers("No worker answers; they may be starting.", retry_after_s=1.0)


class _Families(Collector):
    """Families that are made already, as the exposition wants to collect them."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(answers: Iterable[tuple[int, list[Metric] | None]]) -> list[Metric]:
    """All workers' metrics as one exposition: each family once, every sample with the label `worker`."""
    up = GaugeMetricFamily(WORKER_UP, "1 when the worker answered this scrape.", labels=["worker"])
    families: dict[str, Metric] = {WORKER_UP: up}
    for index, metrics in answers:
        worker = str(index)
        up.add_metric([worker], 0.0 if metrics is None else 1.0)
        for each in metrics or ():
            family = families.get(each.name)
            if family is None:
                family = families[each.name] = Metric(each.name, each.documentation, each.type)
            family.samples += [sample._replace(labels={**sample.labels, "worker": worker}) for sample in each.samples]
    return list(families.values())


def _settled_at(record: dict[str, Any]) -> float:
    return float(record["time_unix_s"]) + float(record["duration_ms"]) / 1000


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_RECORDS
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_RECORDS and len(text) < 9):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_RECORDS}.", param="limit")
    return int(text)
