"""Opens the store as a worker of the gateway does, from an address."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.store.limits import Limits
from gateway.store.memory_limits import MemoryLimits
from gateway.store.places import Places
from gateway.store.redis.address import parse_address
from gateway.store.redis.client import RedisClient
from gateway.store.redis.limits import RedisLimits
from gateway.store.redis.places import RedisPlaces
from loadtests.hammer_jobs import Reach


@dataclass(frozen=True, slots=True)
class Opened:
    client: RedisClient
    limits: Limits
    places: Places


def open_store(reach: Reach) -> Opened:
    client = RedisClient(parse_address(reach.url), timeout_s=reach.timeout_s, connections=reach.connections)
    return Opened(client, RedisLimits(client, reach.prefix), RedisPlaces(client, reach.prefix))


def local_limits() -> Limits:
    """The same limiter in this process' memory, for when Redis is away."""
    return MemoryLimits()
