"""Places and the queue for them in Redis, for any number of gateways: a script per operation, `line` has the rules."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from msgspec import msgpack

from gateway.store.places import Entry, Granted, Renewal, Room, Standing, State, Ticket
from gateway.store.redis.scripts import load

if TYPE_CHECKING:  # what the answers look like is also read where there is no Redis
    from gateway.store.redis.client import RedisClient

KEYS = (
    *("state", "held", "ends", "queued", "line", "siblings", "seen", "gone", "gone_before"),
    *(f"heads{band}" for band in range(4)),
    *(f"finish{band}" for band in range(4)),
)
MAX_KEPT_ROOMS = 256


def granted_channel(prefix: str, gateway: str) -> str:
    """Where a gateway hears of its requests that others' calls granted. Messages are `<pool>\\n<request id>`."""
    return f"{prefix}:granted:{gateway}"


class RedisPlaces:
    """See `Places`. Time is Redis'. Grants to other gateways are published on their `granted_channel`.

    A message may get lost: `renew` tells as well. A Redis that has lost its data, or one key of a pool, begins the
    pool anew; `renew` puts back what runs, and tells the waiting requests that they are lost.
    """

    def __init__(self, client: RedisClient, prefix: str = "tidegate") -> None:
        self._client = client
        self._prefix = prefix
        self._enter = load("enter")
        self._leave = load("leave")
        self._renew = load("renew_places")
        self._standing = load("standing")
        self._keys: dict[str, tuple[str, ...]] = {}
        self._rooms: dict[Room, bytes] = {}
        self._encoder = msgpack.Encoder()

    async def enter(self, pool: str, ticket: Ticket, room: Room) -> Entry:
        return unpack_entry(await self.begin_enter(pool, ticket, room))

    async def leave(self, pool: str, id: str, gateway: str, used: int | None, room: Room) -> Granted:
        return unpack_granted(await self.begin_leave(pool, id, gateway, used, room))

    def begin_enter(self, pool: str, ticket: Ticket, room: Room) -> asyncio.Future[Any]:
        """Ask at once, in the pipeline of this loop turn; read the answer with `unpack_entry`."""
        args = (self._prefix, pool, self._room(room), self._encoder.encode(ticket))
        return self._client.run(self._enter, self._keys_of(pool), args)

    def begin_leave(self, pool: str, id: str, gateway: str, used: int | None, room: Room) -> asyncio.Future[Any]:
        """Ask at once, in the pipeline of this loop turn; read the answer with `unpack_granted`."""
        args = (self._prefix, pool, self._room(room), id, gateway, "" if used is None else used)
        return self._client.run(self._leave, self._keys_of(pool), args)

    async def renew(
        self, pool: str, gateway: str, held: Sequence[Ticket], waiting: Sequence[str], room: Room
    ) -> Renewal:
        args: list[str | int | bytes] = [self._prefix, pool, self._room(room), gateway, len(held)]
        for ticket in held:
            args += (ticket.id, self._encoder.encode(ticket))
        args += waiting
        granted, lost = await self._client.run(self._renew, self._keys_of(pool), args)
        return Renewal(_ids(granted), _ids(lost))

    async def standing(self, pool: str) -> Standing:
        running, tokens, waiting, interval_us = await self._client.run(self._standing, self._keys_of(pool), ())
        return Standing(tuple(running), tokens, tuple(waiting), interval_us)

    def _keys_of(self, pool: str) -> tuple[str, ...]:
        keys = self._keys.get(pool)
        if keys is None:
            keys = tuple(f"{self._prefix}:{{pool:{pool}}}:{name}" for name in KEYS)
            self._keys[pool] = keys
        return keys

    def _room(self, room: Room) -> bytes:
        encoded = self._rooms.get(room)
        if encoded is None:
            if len(self._rooms) >= MAX_KEPT_ROOMS:
                self._rooms.clear()
            encoded = self._rooms[room] = self._encoder.encode(room)
        return encoded


def unpack_entry(reply: Any) -> Entry:
    """What the enter script answered."""
    state, position, wait_us, reason = reply
    return Entry(State(state.decode()), position, wait_us, reason.decode())


def unpack_granted(reply: Any) -> Granted:
    """What the leave script answered."""
    return Granted(_ids(reply))


def _ids(reply: Sequence[Any]) -> tuple[str, ...]:
    return tuple(id.decode() for id in reply)
