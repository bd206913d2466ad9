"""The operators' listener: metrics in Prometheus' format; the state of the fleet, usage records and commands as JSON.

Nothing is answered without the owner's token, routes that say otherwise excepted (`/metrics` on a loopback address).
The check stands in front of the router, so that a path that does not exist is closed as well.
"""

from __future__ import annotations

import hmac
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
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.config.values import is_loopback
from gateway.edges.hosts import HostList, WrongHost, host_name
from gateway.error_replies import ERROR_HANDLERS, error_response
from gateway.errors import GatewayError, InvalidRequest
from gateway.operations import NoWorkerAnswers, Operations, body_of, json_response
from gateway.policy import GuardedRoute, Who, guarded
from gateway.sources import WORKER_UP, Silent, Source, ask_all

DEFAULT_RECORDS = 100
MAX_RECORDS = 1000
"""What a worker keeps in memory."""
METRICS_PATH = "/metrics"
MAX_QUESTION_BYTES = 16 * 2**20
"""Of a request to explain."""


class Unauthorized(InvalidRequest):
    status = 401
    code = "invalid_token"

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"www-authenticate", b"Bearer")]


def admin_app(
    sources: Sequence[Source],
    *,
    host: str,
    token: SecretStr | None,
    routes: Sequence[GuardedRoute] = (),
    allowed_hosts: Sequence[str] = (),
) -> ASGIApp:
    """The app for the admin listener on `host`, with these further routes. Without a token it stays closed."""
    return Guard(private_app(sources, routes), host=host, token=token, allowed_hosts=allowed_hosts)


def private_app(sources: Sequence[Source], routes: Sequence[GuardedRoute] = ()) -> Starlette:
    """The same without the guard: for a socket that only this user's processes can reach."""
    admin = _Admin(sources)
    return Starlette(
        routes=guarded(
            [
                GuardedRoute(METRICS_PATH, admin.metrics, Who.LOCAL, methods=["GET"]),
                GuardedRoute("/admin/fleet", admin.fleet, Who.OPERATOR, methods=["GET"]),
                GuardedRoute("/admin/usage", admin.usage, Who.OPERATOR, methods=["GET"]),
                GuardedRoute("/admin/explain", admin.explain, Who.OPERATOR, methods=["POST"]),
                *Operations(sources).routes(),
                *routes,
            ]
        ),
        exception_handlers=ERROR_HANDLERS,
    )


class Guard:
    """Pure ASGI: lets a request through when it names this listener and bears the owner's token.

    The name is checked against DNS rebinding: a web page whose own host name was made to resolve to 127.0.0.1 can have
    a browser send requests here, but not with another name in `Host`. Where other machines can reach the listener,
    nothing is open that a page could ask for, and only then are other names accepted as well.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: SecretStr | None, allowed_hosts: Sequence[str] = ()) -> None:
        """Of the routes of `app`, those are open that say so; of an application without routes, nothing is."""
        self.app = app
        self._token = token
        local = is_loopback(host)
        self._hosts = HostList(allowed_hosts, own=host) if allowed_hosts or local else None
        """None: any name, on an address that other machines can reach."""
        self._open = frozenset(
            route.path
            for route in getattr(app, "routes", ())
            if isinstance(route, GuardedRoute) and (route.who is Who.ANYONE or (local and route.who is Who.LOCAL))
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        problem = self.problem(scope["path"], scope["headers"])
        answer = self.app if problem is None else error_response(problem)
        await answer(scope, receive, send)

    def problem(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> GatewayError | None:
        """Why this request is refused; None when it is not."""
        hosts: list[bytes] = []
        credentials: list[bytes] = []
        for name, value in headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"authorization":
                credentials.append(value)
        if len(hosts) != 1 or not self._is_ours(hosts[0].decode("latin-1")):
            return WrongHost("The Host header does not name this admin listener.")
        if path in self._open:
            return None
        if self._token is None:
            return Unauthorized("The admin interface is closed: there is no owner token; the log says why.")
        expected = b"Bearer " + self._token.get_secret_value().encode()
        given = credentials[0] if len(credentials) == 1 else b""
        scheme, _, rest = given.partition(b" ")
        if scheme.lower() == b"bearer":
            given = b"Bearer " + rest.strip()
        if not hmac.compare_digest(given, expected):
            return Unauthorized("The owner token is missing or wrong; send it as: Authorization: Bearer <token>.")
        return None

    def _is_ours(self, value: str) -> bool:
        name = host_name(value)
        return bool(name) and (self._hosts is None or self._hosts.allows(name))


class _Admin:
    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    async def metrics(self, request: Request) -> Response:
        answers = await ask_all(self._sources, lambda source: source.metrics())
        registry = CollectorRegistry()
        registry.register(_Families(merged(answers)))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def fleet(self, request: Request) -> Response:
        answers = await ask_all(self._sources, lambda source: source.fleet())
        return json_response({"workers": [state or {"worker": index, "up": False} for index, state in answers]})

    async def usage(self, request: Request) -> Response:
        limit = _limit(request.query_params.get("limit"))
        answers = await ask_all(self._sources, lambda source: source.usage(limit))
        # Merged, not sorted: times are rounded in a record, but each worker has its own in the right order.
        records = merge(*(records or () for _, records in answers), key=_settled_at, reverse=True)
        return json_response({"data": list(islice(records, limit))})

    async def explain(self, request: Request) -> Response:
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
