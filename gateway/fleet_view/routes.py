"""The fleet as the dashboard shows it, as routes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.desk import Desk
from gateway.fleet_view.chart import Chart
from gateway.fleet_view.detail import detail
from gateway.operations import NoWorkerAnswers, json_response
from gateway.policy import About, GuardedRoute, Who
from gateway.roster import Roster, UnknownReplica
from gateway.sources import ask_all

PERIOD_S = 1.0
"""A replica that goes away is seen within as long."""


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area; and the live topic `fleet`."""
    view = _View(desk)
    desk.hub.topic("fleet", PERIOD_S, view.live)
    return [
        GuardedRoute("/admin/fleet/map", view.map, Who.READER, methods=["GET"]),
        GuardedRoute(
            "/admin/fleet/replicas/{pool}/{replica}",
            view.replica,
            Who.READER,
            methods=["GET"],
            about=About(errors=(UnknownReplica, NoWorkerAnswers)),
        ),
    ]


class _View:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def map(self, request: Request) -> Response:
        """Show every replica, briefly, as a map needs it."""
        return json_response((await self._chart()).whole())

    async def live(self) -> dict[str, Any]:
        return (await self._chart()).now()

    async def _chart(self) -> Chart:
        return Chart(await ask_all(self._desk.sources, lambda source: source.glance()))

    async def replica(self, request: Request) -> Response:
        """Show all that is known of one replica."""
        sources = self._desk.sources
        answers = await ask_all(sources, lambda source: source.fleet())
        roster = Roster.of(answers)
        if sources and not roster.answering:
            raise NoWorkerAnswers("No worker answers; they may be starting.", retry_after_s=1.0)
        return json_response(detail(roster, request.path_params["pool"], request.path_params["replica"]))
