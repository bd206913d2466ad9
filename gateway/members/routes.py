"""Members as routes: replicas that register, and what all sources have found."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from backends.discovery.member import Member
from gateway.admin.desk import Desk
from gateway.errors import InvalidRequest
from gateway.members.merge import REGISTRATION
from gateway.members.places import accepting
from gateway.members.registering import LeaseAnswer, RegistrationRefused, UnknownPool
from gateway.operations import body_of, json_response
from gateway.policy import About, GuardedRoute, PoolRefused, Who

MAX_BODY_BYTES = 16_384
LIVE_S = 1.0


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area; and the live topic `members`."""
    view = _View(desk)
    desk.hub.topic("members", LIVE_S, view.live)
    path = "/admin/registrations/{pool}/{name}"
    errors = (UnknownPool, RegistrationRefused, PoolRefused)
    return [
        GuardedRoute("/admin/members", view.members, Who.READER, methods=["GET"]),
        GuardedRoute(
            path,
            view.register,
            Who.REGISTRAR,
            methods=["PUT"],
            about=About(body=Member, answer=LeaseAnswer, errors=errors),
        ),
        GuardedRoute(
            path, view.leave, Who.REGISTRAR, methods=["DELETE"], about=About(errors=(UnknownPool, PoolRefused))
        ),
    ]


class _View:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def members(self, request: Request) -> Response:
        """Show where replicas come from, and what became of each."""
        return json_response(await self.live())

    async def live(self) -> dict[str, Any]:
        settings = self._desk.settings
        return {"pools": [self._pool(pool) for pool in settings.backends]}

    def _pool(self, pool: str) -> dict[str, Any]:
        members, backend = self._desk.members, self._desk.settings.backends[pool]
        now_s = time.monotonic()
        placed = members.of(pool)
        leases = members.registry.of(pool)
        names = {(each.url, each.dp_rank): each.name for each in backend.replicas}
        found = {each.place for each in placed}
        sources = [
            {
                "kind": kind,
                "detail": told.detail,
                "members": len(told.members),
                "problem": told.problem,
                "told_unix_s": told.told_unix_s,
            }
            for (name, kind), told in members.told.items()
            if name == pool
        ]
        if accepting(backend) is not None:
            detail = "launched, or by themselves" if backend.launch else "by themselves"
            sources.append(_source(REGISTRATION, detail, len(leases)))
        written = [each for each in backend.replicas if (each.url, each.dp_rank) not in found]
        if written:
            sources.append(_source("configured", "written down", len(written)))
        shown = []
        for each in placed:
            lease = leases.get(each.name) if each.source == REGISTRATION else None
            in_pool = each.place is not None and names.get(each.place) is not None
            elsewhere = in_pool and names.get(each.place) != each.name  # type: ignore[arg-type]
            refused = f"the configuration calls it {names[each.place]}" if elsewhere else each.refused  # type: ignore[index]
            shown.append(
                {
                    **msgspec.to_builtins(each.member),
                    "state": each.member.state,
                    "name": each.name,
                    "source": each.source,
                    "in_pool": in_pool,
                    "refused": refused or members.left_out(pool, each.name) or None,
                    "for_s": None if lease is None else round(now_s - lease.since_s, 1),
                    "expires_in_s": None if lease is None else round(max(0.0, lease.until_s - now_s), 1),
                }
            )
        scaling = backend.scaling
        rolls = backend.launch is not None or (scaling is not None and scaling.provider == "kubernetes")
        return {"pool": pool, "rolls": rolls, "sources": sources, "members": shown}

    async def register(self, request: Request) -> Response:
        """Say that a replica is there, how its start goes, or that it is about to go; renew that in time."""
        pool, name = request.path_params["pool"], request.path_params["name"]
        try:
            given = msgspec.json.decode(await body_of(request, MAX_BODY_BYTES), type=Member)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"The body must be JSON about a replica: {error}.") from error
        registrations = self._desk.registrations
        member = registrations.checked(pool, name, given)
        before = registrations.before(pool, name)
        if before is None or (before.url, before.state) != (member.url, member.state):
            await self._desk.audit.note(
                request,
                "replica.register",
                f"{pool}/{name}",
                {
                    "url": [None if before is None else before.url, member.url],
                    "state": [None if before is None else before.state, member.state],
                },
            )
        return json_response(msgspec.to_builtins(await registrations.take(pool, member)))

    async def leave(self, request: Request) -> Response:
        """End a registration: the replica gets no new work, and ends what it has."""
        pool, name = request.path_params["pool"], request.path_params["name"]
        registrations = self._desk.registrations
        before = registrations.before(pool, name)
        await self._desk.audit.note(
            request,
            "replica.leave",
            f"{pool}/{name}",
            {"url": [None if before is None else before.url, None]},
        )
        return json_response({"removed": await registrations.end(pool, name)})


def _source(kind: str, detail: str, members: int) -> dict[str, Any]:
    return {"kind": kind, "detail": detail, "members": members, "problem": None, "told_unix_s": None}
