"""Scaling as routes: what is wanted and why, numbers held by operators, and the orders of agents."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.desk import Desk
from gateway.admin.guard import operator_of
from gateway.errors import GatewayError, InvalidRequest
from gateway.members.registering import UnknownPool
from gateway.operations import NoWorkerAnswers, body_of, json_response
from gateway.policy import About, GuardedRoute, PoolRefused, Who
from gateway.scaling.agents import Orders, Report
from gateway.scaling.helm import Helm
from gateway.scaling.memory import LAST_CHANGES
from gateway.scaling.providers import Kubernetes, ProviderError
from gateway.scaling.service import LONGEST_HOLD_S
from gateway.scaling.shown import agent_rows, pool_row
from gateway.sources import Silent

LIVE_S = 2.0
MAX_BODY_BYTES = 65_536
MAX_NUMBER = 1_000_000_000
"""Of servers and of orders to restart them; the next order is one higher than what agents say."""
_AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class NotScaled(InvalidRequest):
    """The pool is there, and nobody decides how many replicas it has."""

    status = 404
    code = "not_scaled"


class NotRollable(InvalidRequest):
    """Nobody is known who could restart the servers of this pool."""

    status = 409
    code = "not_rollable"


class ProviderFailed(GatewayError):
    """Whoever should restart them did not."""

    status = 502
    code = "provider_failed"


class HoldBody(msgspec.Struct, forbid_unknown_fields=True):
    """A number of replicas that is to be kept to for a while."""

    count: int
    for_s: float = 3600.0
    """Seconds; at most a day."""


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area; and the live topic `scaling`."""
    view = _View(desk)
    desk.hub.topic("scaling", LIVE_S, view.live)
    one, agent = "/admin/scaling/{pool}", "/admin/agents/{agent}"
    unknown = (UnknownPool, NotScaled)
    return [
        GuardedRoute("/admin/scaling", view.all, Who.READER, methods=["GET"]),
        GuardedRoute(one, view.one, Who.READER, methods=["GET"], about=About(errors=unknown)),
        GuardedRoute(
            one,
            view.hold,
            Who.OPERATOR,
            methods=["PUT"],
            about=About(body=HoldBody, errors=(*unknown, NoWorkerAnswers)),
        ),
        GuardedRoute(
            one, view.release, Who.OPERATOR, methods=["DELETE"], about=About(errors=(*unknown, NoWorkerAnswers))
        ),
        GuardedRoute("/admin/agents", view.agents, Who.READER, methods=["GET"]),
        GuardedRoute(
            agent,
            view.report,
            Who.REGISTRAR,
            methods=["PUT"],
            about=About(body=Report, answer=Orders, errors=(NoWorkerAnswers, PoolRefused)),
        ),
        GuardedRoute(
            "/admin/pools/{pool}/roll",
            view.roll,
            Who.OPERATOR,
            methods=["POST"],
            about=About(errors=(UnknownPool, NotRollable, ProviderFailed, NoWorkerAnswers)),
        ),
    ]


class _View:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._service = desk.scaling

    async def all(self, request: Request) -> Response:
        """Show how many replicas pools should have, and why."""
        return json_response(await self.live())

    async def live(self) -> dict[str, Any]:
        service = self._service
        return {
            "pools": [pool_row(helm, changes=LAST_CHANGES) for helm in service.helms.values()],
            "agents": agent_rows(service.agents, service.heard_unix_s),
        }

    async def one(self, request: Request) -> Response:
        """Show how many replicas one pool should have, as the number `wanted`, and why."""
        return json_response(pool_row(self._helm(request)))

    async def hold(self, request: Request) -> Response:
        """Have a pool keep to a number of replicas for a while, whatever is asked for."""
        helm, body = self._helm(request), await _decoded(request, HoldBody)
        least, most = helm.scaling.min, helm.ceiling
        if not least <= body.count <= most:
            raise InvalidRequest(
                f"count must be from {least} to {most}, as scaling of {helm.pool} says.", param="count"
            )
        if not 0 < body.for_s <= LONGEST_HOLD_S:
            raise InvalidRequest(f"for_s must be above 0 and at most {LONGEST_HOLD_S:g} seconds.", param="for_s")
        before = None if helm.hold is None else helm.hold.count
        diff = {"count": [before, body.count], "for_s": body.for_s}
        await self._desk.audit.note(request, "scaling.hold", helm.pool, diff)
        try:
            await self._service.hold(helm.pool, body.count, body.for_s, operator_of(request).name)
        except Silent as error:
            raise _away() from error
        return json_response(pool_row(helm, changes=LAST_CHANGES))

    async def release(self, request: Request) -> Response:
        """Have the number of replicas follow what is asked for again."""
        helm = self._helm(request)
        before = None if helm.hold is None else helm.hold.count
        await self._desk.audit.note(request, "scaling.release", helm.pool, {"count": [before, None]})
        try:
            held = await self._service.release_hold(helm.pool)
        except Silent as error:
            raise _away() from error
        return json_response({"pool": helm.pool, "released": held is not None})

    async def agents(self, request: Request) -> Response:
        """Show who launches engines, and what they have."""
        return json_response({"agents": agent_rows(self._service.agents, self._service.heard_unix_s)})

    async def report(self, request: Request) -> Response:
        """Say what an agent has launched, and be told what it should have."""
        agent = request.path_params["agent"]
        if not _AGENT.fullmatch(agent):
            raise InvalidRequest("agent must be 1 to 128 letters, digits, dots, dashes and underscores.", param="agent")
        body = await _decoded(request, Report)
        for pool, has in body.pools.items():
            if not 0 <= min(numbers := (has.launched, has.ready, has.max, has.roll)) <= max(numbers) <= MAX_NUMBER:
                raise InvalidRequest(f"pools.{pool} has a number below 0 or above {MAX_NUMBER}.", param="pools")
        known = self._service.agents.get(agent)
        # Whoever speaks for some pools may neither launch for others nor speak in the name of an agent that does.
        for pool in (*body.pools, *(() if known is None else known.pools)):
            operator_of(request).speak_for(pool)
        most = {pool: has.max for pool, has in body.pools.items()}
        if known is None or {pool: has.max for pool, has in known.pools.items()} != most:
            await self._desk.audit.note(request, "agent.report", agent, {"max": most})
        try:
            orders = await self._service.reported(agent, body)
        except Silent as error:
            raise _away() from error
        return json_response(msgspec.to_builtins(orders))

    async def roll(self, request: Request) -> Response:
        """Have the servers of a pool restarted one by one, without a request lost."""
        pool = request.path_params["pool"]
        backend = self._desk.settings.backends.get(pool)
        if backend is None:
            raise _unknown(pool)
        helm = self._service.helms.get(pool)
        if backend.launch is None and (helm is None or not isinstance(helm.provider, Kubernetes)):
            raise NotRollable(
                f"Nobody is known who could restart the servers of {pool}: it has no `launch`, and its scaling.provider"
                " is not kubernetes."
            )
        await self._desk.audit.note(request, "pool.roll", pool, {})
        try:
            number = await self._service.roll(pool)
        except ProviderError as error:
            raise ProviderFailed(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
        except Silent as error:
            raise _away() from error
        return json_response({"pool": pool, "roll": number})

    def _helm(self, request: Request) -> Helm:
        pool = request.path_params["pool"]
        helm = self._service.helms.get(pool)
        if helm is None:
            backend = self._desk.settings.backends.get(pool)
            if backend is None:
                raise _unknown(pool)
            soon = "" if backend.scaling is None else " yet; it was told to a moment ago"
            raise NotScaled(f"Nobody decides how many replicas {pool} has{soon}: see backends.{pool}.scaling.")
        return helm


def _unknown(pool: str) -> UnknownPool:
    return UnknownPool(f"There is no pool {pool}.")


def _away() -> NoWorkerAnswers:
    return NoWorkerAnswers("No worker answers; they may be starting.", retry_after_s=1.0)


async def _decoded(request: Request, kind: type[Any]) -> Any:
    body = await body_of(request, MAX_BODY_BYTES)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The body cannot be used: {error}.") from error
