"""What operators can order and ask about replicas and adapters, over all workers, as routes of the admin listener.

An order is checked against what all workers say, carried out by one of them, and answered when the others have heard of
it through the store, or after `SETTLE_S`; the reply says what is true then.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.config.values import ADAPTER_NAME
from gateway.errors import BodyTooLarge, GatewayError, InvalidRequest
from gateway.policy import About, GuardedRoute, Who
from gateway.roster import Roster, unknown_adapter
from gateway.sources import AdapterChange, AdapterResult, Silent, Source, ask_all

SETTLE_S = 2.0
"""How long workers have to hear of a change before the reply goes out without them."""
MAX_BODY_BYTES = 65_536
MAX_PATH_CHARACTERS = 4096
"""As in the configuration."""
_POLL_S = 0.02

T = TypeVar("T")
Note = Callable[[Request, str, str, Mapping[str, Any]], Awaitable[None]]
"""Request, action, subject, and field: [before, after]."""


class LastReplica(InvalidRequest):
    status = 409
    code = "last_replica"


class NoWorkerAnswers(GatewayError):
    status = 503
    code = "no_worker_answers"


class AdapterUnchanged(GatewayError):
    """No replica did what it was told; `status` is that of the gravest reason."""

    code = "adapter_unchanged"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Operations:
    """The handlers. One instance for each admin app, so that orders given there follow one another."""

    def __init__(self, sources: Sequence[Source], note: Note | None = None) -> None:
        """`note` writes down who has ordered what; None: whoever passes the order on has done so."""
        self._sources = sources
        self._note = note
        self._draining = asyncio.Lock()
        """Held from looking whether a replica is the last until all have heard: two drains must not take two halves."""
        self._changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By pool: one change of adapters after the other, as the engines themselves do it."""

    def routes(self) -> list[GuardedRoute]:
        replica = "/admin/replicas/{pool}/{replica}"
        return [
            GuardedRoute("/admin/replicas", self.replicas, Who.READER, methods=["GET"]),
            GuardedRoute(replica, self.replica, Who.READER, methods=["GET"]),
            GuardedRoute(
                f"{replica}/drain",
                self.drain,
                Who.OPERATOR,
                methods=["POST"],
                about=About(query={"force": "`true`: also if it is the last of its pool."}, errors=(LastReplica,)),
            ),
            GuardedRoute(f"{replica}/undrain", self.undrain, Who.OPERATOR, methods=["POST"]),
            GuardedRoute(f"{replica}/cordon", self.cordon, Who.OPERATOR, methods=["POST"]),
            GuardedRoute(f"{replica}/uncordon", self.uncordon, Who.OPERATOR, methods=["POST"]),
            GuardedRoute(
                "/admin/adapters",
                self.adapters,
                Who.READER,
                methods=["GET"],
                about=About(query={"pool": "Only of this one."}),
            ),
            GuardedRoute(
                "/admin/adapters",
                self.load,
                Who.OPERATOR,
                methods=["POST"],
                about=About(body=AdapterChange, errors=(AdapterUnchanged,)),
            ),
            GuardedRoute(
                "/admin/adapters/{pool}/{name:path}",
                self.unload,
                Who.OPERATOR,
                methods=["DELETE"],
                about=About(query={"replica": "Only at this one."}, errors=(AdapterUnchanged,)),
            ),
        ]

    # -- replicas

    async def replicas(self, request: Request) -> Response:
        """Every replica, all workers taken together."""
        roster = await self._roster()
        return json_response({"replicas": list(roster.all_merged()), "silent_workers": roster.silent})

    async def replica(self, request: Request) -> Response:
        """One replica, all workers taken together."""
        roster = await self._roster()
        return json_response(roster.merged(request.path_params["pool"], request.path_params["replica"]))

    async def drain(self, request: Request) -> Response:
        """Give a replica no new work."""
        force = _switch(request, "force")
        return await self._set_draining(request, True, force)

    async def undrain(self, request: Request) -> Response:
        """Give a replica work again."""
        return await self._set_draining(request, False, True)

    async def cordon(self, request: Request) -> Response:
        """Give a replica no new prompts: only those that it is believed to hold, and any where nobody else is left."""
        return await self._set_cordoned(request, True)

    async def uncordon(self, request: Request) -> Response:
        """Give a replica new prompts again."""
        return await self._set_cordoned(request, False)

    async def _set_cordoned(self, request: Request, wanted: bool) -> Response:
        pool, replica = request.path_params["pool"], request.path_params["replica"]
        roster = await self._roster()
        before = roster.merged(pool, replica)["cordoned"]
        action = "replica.cordon" if wanted else "replica.uncordon"
        await self._noted(request, action, f"{pool}/{replica}", {"cordoned": [before, wanted]})
        await self._by_one(roster, lambda source: source.cordon(pool, replica, wanted))
        roster = await self._until(lambda now: now.is_cordoned(pool, replica, wanted))
        merged = roster.merged(pool, replica)
        names = ("pool", "replica", "cordoned", "in_flight", "empty", "silent_workers")
        return json_response({name: merged[name] for name in names})

    async def _set_draining(self, request: Request, wanted: bool, force: bool) -> Response:
        pool, replica = request.path_params["pool"], request.path_params["replica"]
        async with self._draining:
            roster = await self._roster()
            if not force and not roster.is_draining(pool, replica, wanted) and roster.is_last(pool, replica):
                raise LastReplica(
                    f"{pool}/{replica} is the last replica of its pool that takes work; drained, requests for the pool "
                    "would be refused. Order it with force=true if that is meant.",
                    param="force",
                )
            before = roster.merged(pool, replica)["draining"]
            await self._noted(
                request,
                "replica.drain" if wanted else "replica.undrain",
                f"{pool}/{replica}",
                {"draining": [before, wanted]},
            )
            await self._by_one(roster, lambda source: source.drain(pool, replica, wanted))
            roster = await self._until(lambda now: now.is_draining(pool, replica, wanted))
        merged = roster.merged(pool, replica)
        names = ("pool", "replica", "draining", "in_flight", "empty", "silent_workers")
        return json_response({name: merged[name] for name in names})

    # -- adapters

    async def adapters(self, request: Request) -> Response:
        """LoRA adapters, and who holds them."""
        pool = request.query_params.get("pool")
        roster = await self._roster()
        if pool is not None:
            roster.replicas_of(pool)
        return json_response(roster.adapters(roster.pools if pool is None else [pool]))

    async def load(self, request: Request) -> Response:
        """Have the replicas of a pool load an adapter."""
        try:
            change = msgspec.json.decode(await body_of(request, MAX_BODY_BYTES), type=AdapterChange)
        except msgspec.MsgspecError as error:
            raise InvalidRequest(
                f"The body must be JSON with pool, name, path and perhaps replica: {error}."
            ) from error
        if not re.fullmatch(ADAPTER_NAME, change.name):
            raise InvalidRequest(
                "name must have 1 to 200 letters, digits, dots, dashes, underscores and slashes, the first a letter or "
                "a digit.",
                param="name",
            )
        if change.path is None or not 1 <= len(change.path) <= MAX_PATH_CHARACTERS or not change.path.isprintable():
            raise InvalidRequest(
                f"path must be a path or hub name that the engines can read, of at most {MAX_PATH_CHARACTERS} "
                "printable characters.",
                param="path",
            )
        return await self._change(request, change)

    async def unload(self, request: Request) -> Response:
        """Have the replicas of a pool drop an adapter."""
        names = request.path_params
        return await self._change(
            request, AdapterChange(names["pool"], names["name"], None, request.query_params.get("replica"))
        )

    async def _change(self, request: Request, change: AdapterChange) -> Response:
        pool, name, loading = change.pool, change.name, change.path is not None
        roster = await self._roster()
        roster.replicas_of(pool)
        if change.replica is not None:
            roster.seen(pool, change.replica)
        async with self._changing[pool]:
            await self._noted(
                request,
                "adapter.load" if loading else "adapter.unload",
                f"{pool}/{name}",
                {"path": [None, change.path], "replica": [None, change.replica]} if loading else {},
            )
            # Not tried at another worker: the engines may be at it already.
            results = await self._by_one(roster, lambda source: source.change_adapter(change), tries=1)
            done = [result.replica for result in results if result.ok]
            roster = await self._until(lambda now: all(now.holds(pool, each, name, loading) for each in done))
        if not loading and len(done) == len(results) and not any(result.changed for result in results):
            raise unknown_adapter(pool, name, {each["name"] for each in roster.adapters([pool])["adapters"]} - {name})
        reply: dict[str, Any] = {"pool": pool, "name": name, "ok": len(done) == len(results), "replicas": results}
        if not loading and done and name in roster.configured[pool]:
            reply["note"] = "the configuration lists it, so that it will be loaded again; take it out there too"
        if done or not results:
            return json_response(reply)
        failure = _failure(change, results)
        return json_response({**msgspec.json.decode(failure.body()), **reply}, failure.status)

    # -- all workers

    async def _noted(self, request: Request, action: str, subject: str, diff: Mapping[str, Any]) -> None:
        """Before it is done: what then fails has been tried."""
        if self._note is not None:
            await self._note(request, action, subject, diff)

    async def _roster(self) -> Roster:
        """Raises `NoWorkerAnswers`."""
        roster = Roster.of(await ask_all(self._sources, lambda source: source.fleet()))
        if self._sources and not roster.answering:
            raise NoWorkerAnswers("No worker answers; they may be starting.", retry_after_s=1.0)
        return roster

    async def _by_one(
        self, roster: Roster, order: Callable[[Source], Coroutine[Any, Any, T]], *, tries: int | None = None
    ) -> T:
        """Have the first worker that answers carry out an order; where it fell silent over it, the next one."""
        able = [source for source in self._sources if source.index in roster.answering]
        for source in able[:tries]:
            try:
                return await order(source)
            except Silent:
                continue
        raise NoWorkerAnswers("The worker that was to do it did not answer; whether it was done is not known.")

    async def _until(self, settled: Callable[[Roster], bool]) -> Roster:
        """The state of all workers, once it is as wanted or `SETTLE_S` have passed."""
        end = time.monotonic() + SETTLE_S
        while True:
            roster = await self._roster()
            if settled(roster) or time.monotonic() >= end:
                return roster
            await asyncio.sleep(_POLL_S)


def json_response(content: dict[str, Any], status: int = 200) -> Response:
    """A reply that nobody keeps a copy of."""
    body = msgspec.json.encode(content)
    return Response(body, status, media_type="application/json", headers={"cache-control": "no-store"})


def _failure(change: AdapterChange, results: Sequence[AdapterResult]) -> AdapterUnchanged:
    statuses = {result.status for result in results}
    status = next((each for each in (502, 409) if each in statuses), 501)
    reasons = "; ".join(f"{result.replica}: {result.reason}" for result in results[:5])
    verb = "unload" if change.path is None else "load"
    return AdapterUnchanged(
        f"No replica of {change.pool!r} could {verb} the adapter {change.name!r}: {reasons}", status
    )


async def body_of(request: Request, limit_bytes: int) -> bytes:
    """Raises `BodyTooLarge`."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit_bytes:
            raise BodyTooLarge(f"The body may have {limit_bytes} bytes.")
    return bytes(body)


def _switch(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false.", param=name)
    return value == "true"
