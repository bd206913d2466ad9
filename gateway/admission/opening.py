"""Puts a worker's admission together from its settings: what it shares with others, who is known, the gate itself.

Nothing that the settings do not ask for is imported: no SQLAlchemy without keys or budgets, no Redis client without a
Redis.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway.admission.gate import Gate
from gateway.admission.home import Home
from gateway.admission.metrics import AdmissionMetrics
from gateway.admission.records import AdmissionError, Records, admin_routes, pepper_of
from gateway.admission.sole import SoleUse
from gateway.admission.spend import SpendKeeper
from gateway.config import Settings
from gateway.config.limits import DEFAULT_TENANT
from gateway.config.tls import tls_context
from gateway.keys.configured import static_records, tenant_records
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.limits.estimate import CountTokens, Estimator
from gateway.limits.plan import Planner, SpendBook
from gateway.policy import GuardedRoute
from gateway.store import MemoryStore, Store

if TYPE_CHECKING:
    from gateway.keys.directory import Directory
    from gateway.keys.sync import KeySync
    from gateway.store.redis.far import Far

logger = logging.getLogger(__name__)

KEYS_WITHIN_S = 3.0
"""How long the start waits for the database of keys. Afterwards requests get 503 until it has been read."""


class Admission:
    """What one worker needs to let requests in, and its life: `start`, `reload`, `aclose`. Belongs to one event loop.

    `store` is what the workers of this gateway share without Redis; with Redis that is made here. `workers`:
    processes of this gateway. Raises `AdmissionError`.
    """

    def __init__(self, settings: Settings, *, store: Store | None = None, workers: int = 1) -> None:
        self.id = f"gw_{secrets.token_hex(8)}"
        self.far: Far | None = open_far(settings)
        self.store: Store = self.far.store if self.far is not None else store or MemoryStore()
        self.directory: Directory | None = None
        self.sync: KeySync | None = None
        self.pepper = pepper_of(settings)
        if self.pepper is not None:
            from gateway.keys.directory import Directory

            self.directory = Directory(self.pepper)
        self.records = Records(settings, self.pepper) if needs_database(settings) else None
        self.sole: SoleUse | None = None
        if self.records is not None and self.far is None and workers == 1:
            self.sole = SoleUse(self.records, self.id)
        book = SpendBook()
        self.gate = Gate(
            settings,
            Home(
                self.id,
                self.far,
                visits=lambda: self.gate.everybody(),
                room_of=lambda visit: self.gate.room_of(visit),
                on_grant=lambda pool, id: self.gate.granted(pool, id),
                workers=workers,
            ),
            directory=self.directory,
            anonymous=anonymous(settings),
            planner=Planner(settings, book, secret=self.pepper or b""),
            estimator=Estimator(_tokenizers(settings)),
            spend=SpendKeeper(self.records, book, self.id),
            metrics=AdmissionMetrics(),
            queues=workers == 1 or self.far is not None,
            workers=workers,
        )
        if self.directory is not None:
            self._take_static(settings)
        self._stop = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    def _take_static(self, settings: Settings) -> None:
        assert self.directory is not None
        assert self.pepper is not None
        self.directory.replace_static(
            static_records(settings.keys.static, self.pepper), tenant_records(settings.tenants)
        )

    async def start(self) -> None:
        """Connect to what is there. What is not is asked again and again. Raises `AdmissionError`."""
        gate = self.gate
        if self.far is not None:
            self.far.client.on_change = self._store_changed
            await self._reach_redis(self.far)
        if self.records is not None:
            there = await self._open_records(self.records)
            if self.sole is not None:
                await self.sole.start(wait=there)
        if self.directory is not None and self.records is not None:
            from gateway.keys.sync import KeySync

            records = self.records
            self.sync = KeySync(
                self.directory,
                lambda version: records.database().keys.changed_since(version),
                stale_s=gate.settings.keys.stale_s,
            )
            self.sync.start()
            if not await self.sync.first_load(KEYS_WITHIN_S):
                logger.warning("keys: they could not be read yet; requests are answered with 503 until they are")
        gate.spend.start()
        self._keeping = asyncio.create_task(gate.keep(self._stop), name="gate")

    def _store_changed(self, available: bool) -> None:
        self.gate.store_changed(available)
        self.gate.spend.read_again()

    async def _reach_redis(self, far: Far) -> None:
        from gateway.store.protocol import StoreUnavailable

        try:
            await far.client.connect(2.0)
            await far.client.subscribe(f"{far.client.prefix}:granted:{self.id}", self._granted)
        except StoreUnavailable as error:
            logger.warning("limits: %s; going on alone until it answers", error)
            self.gate.store_changed(False)
            self.gate.home.subscribe_later = lambda: far.client.subscribe(
                f"{far.client.prefix}:granted:{self.id}", self._granted
            )

    def _granted(self, message: bytes) -> None:
        pool, _, id = message.decode().partition("\n")
        self.gate.home.granted_far(pool, id)

    async def _open_records(self, records: Records) -> bool:
        """Whether the database answers."""
        from gateway.database.errors import DatabaseError, DatabaseUnavailable

        try:
            async with asyncio.timeout(KEYS_WITHIN_S):
                await asyncio.to_thread(records.database)
            return True
        except DatabaseError as error:
            # A server may come up later than we do; a file that cannot be opened now will not.
            if self.gate.settings.database.startswith("sqlite:") or not isinstance(error, DatabaseUnavailable):
                raise AdmissionError(f"database: {error}") from error
            logger.warning("database: %s; it is asked again", error)
        except TimeoutError:
            logger.warning("database: no answer within %g s; it is asked again", KEYS_WITHIN_S)
        return False

    def admin_routes(self) -> list[GuardedRoute]:
        """The operators' routes for keys and tenants of this worker, when it is the only one."""
        return admin_routes(self.gate.settings, self._keys_changed, self.records)

    async def _keys_changed(self) -> None:
        if self.sync is not None:
            self.sync.nudge()

    def reload(self, settings: Settings) -> None:
        """Go by the new limits, tenants and static keys."""
        if self.records is None and needs_database(settings):
            logger.warning(
                "reload: this gateway began without limits of money: until a restart, new ones are counted in memory "
                "only, from zero"
            )
        self.gate.reload(settings, anonymous(settings))
        if self.directory is not None:
            self._take_static(settings)

    def stop_waiting(self) -> None:
        """End a start that waits for another gateway."""
        if self.sole is not None:
            self.sole.stop_waiting()

    async def aclose(self) -> None:
        """Settle with the database and close everything but the store."""
        self._stop.set()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self.far is not None:
            await self.gate.home.say_goodbye()
        if self.sync is not None:
            await self.sync.aclose()
        await self.gate.spend.aclose()
        if self.sole is not None:
            await self.sole.aclose()
        if self.records is not None:
            await asyncio.to_thread(self.records.close)


def open_far(settings: Settings) -> Far | None:
    """The client for the Redis of the settings; not connected yet. None: there is none."""
    if settings.store == "memory":
        return None
    from gateway.store.redis.address import parse_address
    from gateway.store.redis.client import RedisClient
    from gateway.store.redis.far import Far
    from gateway.store.redis.limits import RedisLimits
    from gateway.store.redis.places import RedisPlaces
    from gateway.store.redis.store import RedisStore

    redis = settings.redis
    client = RedisClient(
        parse_address(settings.store),
        timeout_s=redis.timeout_ms / 1000,
        connections=redis.connections,
        prefix=redis.prefix,
        username=redis.username or "",
        password="" if redis.password is None else redis.password.get_secret_value(),
        sentinel_password="" if redis.sentinel_password is None else redis.sentinel_password.get_secret_value(),
        tls=tls_context(redis.ca_file, redis.cert_file, redis.key_file),
    )
    return Far(client, RedisStore(client), RedisLimits(client, redis.prefix), RedisPlaces(client, redis.prefix))


def _tokenizers(settings: Settings) -> Mapping[str, CountTokens]:
    if all(model.tokenizer is None for model in settings.models.values()):
        return {}
    from gateway.limits.tokenizers import load_tokenizers

    return load_tokenizers(settings)


def needs_database(settings: Settings) -> bool:
    """Whether anything is on record: keys, or money that is limited."""
    if settings.auth == "keys":
        return True
    blocks = [settings.limits.key, settings.limits.tenant, settings.limits.user]
    for tenant in settings.tenants.values():
        blocks += [tenant.limits, tenant.user_limits, *tenant.model_limits.values()]
    for model in settings.models.values():
        blocks += [model.limits, model.tenant_limits]
    return any(block.usd_per_day is not None or block.usd_per_month is not None for block in blocks)


def anonymous(settings: Settings) -> Principal:
    """Who sends a request where nobody is asked for a key."""
    return Principal(None, tenant_records(settings.tenants).get(DEFAULT_TENANT, ANONYMOUS))
