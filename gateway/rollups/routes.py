"""The overview and the live events, as routes."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.admin.desk import Desk
from gateway.admin.guard import session_of
from gateway.errors import InvalidRequest
from gateway.policy import About, GuardedRoute, Who
from gateway.rollups.hub import Hub, TooManyStreams, Viewer
from gateway.rollups.service import WINDOWS

STALLED_S = 30.0
"""A viewer that takes nothing for so long is left."""


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area."""

    async def overview(request: Request) -> Response:
        """Is the gateway healthy, and if not, where: findings, figures of this moment and of a window, its series."""
        window = request.query_params.get("window", "hour")
        if window not in WINDOWS:
            raise InvalidRequest(f"window must be one of {', '.join(WINDOWS)}.", param="window")
        return _json(await desk.rollups.overview(window))

    async def events(request: Request) -> Response:
        """Server-Sent Events: each topic's data when it has changed, at most once in its period."""
        asked = [name for name in request.query_params.get("topics", "").split(",") if name]
        unknown = [name for name in asked if name not in desk.hub.topics]
        if unknown or not asked:
            raise InvalidRequest(f"topics must be some of {', '.join(desk.hub.topics)}.", param="topics")
        session = session_of(request)
        return EventStream(desk.hub, desk.hub.join(asked), None if session is None else session.ended)

    return [
        GuardedRoute(
            "/admin/overview",
            overview,
            Who.READER,
            methods=["GET"],
            about=About(query={"window": "`live` (5 minutes), `hour`, `day` or `week`; `hour` if left out."}),
        ),
        GuardedRoute(
            "/admin/events",
            events,
            Who.READER,
            methods=["GET"],
            about=About(
                query={"topics": "Names of live topics, with commas between them."},
                media="text/event-stream",
                errors=(TooManyStreams,),
            ),
        ),
    ]


class EventStream(Response):
    """Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html) until the viewer goes, its
    session ends, or the hub closes."""

    def __init__(self, hub: Hub, viewer: Viewer, ended: asyncio.Event | None) -> None:
        """`viewer` has joined, and leaves with this. `ended`: set when its session is over."""
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._hub = hub
        self._viewer = viewer
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, viewer = asyncio.get_running_loop(), self._viewer
        watching = [loop.create_task(_left(receive, viewer), name="viewer")]
        if self._ended is not None:
            watching.append(loop.create_task(_over(self._ended, viewer), name="viewer's session"))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._hub.events(viewer):
                async with asyncio.timeout(STALLED_S):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            pass
        finally:
            self._hub.leave(viewer)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)


async def _left(receive: Receive, viewer: Viewer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    viewer.end()


async def _over(ended: asyncio.Event, viewer: Viewer) -> None:
    await ended.wait()
    viewer.end()


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json", headers={"cache-control": "no-store"})
