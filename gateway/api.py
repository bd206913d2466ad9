"""The client-facing ASGI application: the inference routes' reference edge, models, liveness and readiness."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.edges.asgi import InferenceEndpoint
from gateway.error_replies import ERROR_HANDLERS
from gateway.errors import ModelNotFound
from gateway.fleet import ModelRoute, Pool
from gateway.inspection.front import playground_routes
from gateway.keys.directory import Freshness
from gateway.keys.principal import Principal, may_use
from gateway.openapi import document
from gateway.order import INFERENCE_PATHS
from gateway.policy import CALLER, GuardedRoute, Who, guarded
from gateway.runtime import Runtime
from routing.filters import HELD_BACK
from routing.types import Replica


def build_app(runtime: Runtime) -> ASGIApp:
    """The application for one worker."""
    endpoint = InferenceEndpoint(runtime)
    api = _Api(runtime)
    # The exchange asks for the key, as it does for the protocol edge, which serves these paths without this router.
    routes = [GuardedRoute(path, endpoint, Who.KEY, methods=["POST"]) for path in INFERENCE_PATHS]
    routes += [
        GuardedRoute("/v1/models", api.models, Who.KEY, methods=["GET"], admit=api.admit),
        GuardedRoute("/v1/models/{model:path}", api.model, Who.KEY, methods=["GET"], admit=api.admit),
        GuardedRoute("/livez", api.livez, Who.ANYONE, methods=["GET"]),
        GuardedRoute("/readyz", api.readyz, Who.ANYONE, methods=["GET"]),
        GuardedRoute("/openapi.json", api.openapi, Who.ANYONE, methods=["GET"]),
    ]
    routes += playground_routes(runtime)
    app = Starlette(
        routes=guarded(routes),
        exception_handlers=ERROR_HANDLERS,
    )
    # A path with a stray slash is unknown, as at OpenAI's; the redirect would be built from the client's Host header.
    app.router.redirect_slashes = False
    return RequestId(app, runtime)


class RequestId:
    """Pure ASGI: gives an `x-request-id` to every reply that has none, which are those outside of exchanges.

    Refusals among them are counted; `/readyz` saying no is not one.
    """

    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                if all(name != b"x-request-id" for name, _ in headers):
                    headers.append((b"x-request-id", self._runtime.new_request_id().encode()))
                    if message["status"] >= 400 and scope["path"] != "/readyz":
                        self._runtime.metrics.refused(message["status"])
                if self._runtime.draining or self._runtime.overload.closing:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_id)


class _Api:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def admit(self, scope: Scope) -> Principal:
        """Who asks. Raises `Unauthenticated` and `KeysUnavailable`."""
        return self._runtime.gate.identify(scope["headers"], scope["client"])

    async def models(self, request: Request) -> Response:
        """The models that the caller may use."""
        caller: Principal = request.scope[CALLER]
        fleet = self._runtime.fleet
        listed = [
            _model_object(name, route, fleet.created_unix_s)
            for name, route in fleet.listed()
            if may_use(caller, route.model, route.asked_adapter)
        ]
        return _json({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        caller: Principal = request.scope[CALLER]
        fleet = self._runtime.fleet
        name = request.path_params["model"]
        route = fleet.route(name)
        if route is None or not may_use(caller, route.model, route.asked_adapter):
            raise ModelNotFound(
                f"The model {name[:200]!r} does not exist here; GET /v1/models lists them.", param="model"
            )
        return _json(_model_object(name, route, fleet.created_unix_s))

    async def livez(self, request: Request) -> Response:
        """The process answers. Nothing else is implied."""
        return _json({"status": "ok"})

    async def openapi(self, request: Request) -> Response:
        """What this listener understands and answers. For anybody: it says nothing of this gateway's models."""
        return _json(document())

    async def readyz(self, request: Request) -> Response:
        """Whether new traffic should come here: not draining, and some replica may be used for every model."""
        runtime = self._runtime
        if runtime.draining:
            return _json({"status": "draining"}, 503)
        directory = runtime.gate.directory
        if directory is not None and directory.freshness is Freshness.STALE:
            return _json({"status": "keys_unavailable"}, 503)
        now = time.monotonic()
        pools = runtime.fleet.pools.values()
        without = sorted(pool.name for pool in pools if not any(_may_serve(each, now) for each in pool.replicas))
        if pools and len(without) == len(pools) and not any(_asleep(pool) for pool in pools):
            return _json({"status": "no_replica_available", "pools_without_replica": without}, 503)
        return _json({"status": "ready", "pools_without_replica": without})


def _may_serve(replica: Replica, now: float) -> bool:
    """Whether the replica serves, or is about to: being busy, or one lost connection, is no reason to turn away."""
    reason = replica.unavailable_reason(now)
    if reason in (None, "full", "half_open", "joining") or reason in HELD_BACK:
        return True
    return reason == "cooling_down" and replica.cooldown.failures < 2


def _asleep(pool: Pool) -> bool:
    """Whether the pool may be scaled to nothing and is: without requests, which nobody sends to a gateway that is not
    ready, it would never wake up."""
    scaling = pool.settings.scaling
    return scaling is not None and not scaling.min and not pool.replicas


def _model_object(name: str, route: ModelRoute, created_unix_s: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_unix_s, "owned_by": route.pool.name}


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
