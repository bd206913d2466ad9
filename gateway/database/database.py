"""The database as a whole: open it, and what is in it."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable

import sqlalchemy as sa
from pydantic import SecretStr

from gateway.database.address import parse
from gateway.database.audit import Audit
from gateway.database.engine import WITHIN_S, Engine
from gateway.database.errors import DatabaseInvalid
from gateway.database.finding import Finding
from gateway.database.keys import Keys, Tenants
from gateway.database.migrate import migrate
from gateway.database.sole import Sole
from gateway.database.spend import Spend
from gateway.database.tables import counters


class Database:
    """Open, and of this version's revision. Every method blocks, and may be called from any thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float], made: bool = False) -> None:
        self._engine = engine
        self.url_shown = engine.address.shown
        """For messages."""
        self.place = engine.address.place
        """The same for operators: the absolute path of a SQLite file."""
        self.made = made
        """Whether there was nothing in it when it was opened."""
        self.keys = Keys(engine, clock)
        self.tenants = Tenants(engine, clock)
        self.finding = Finding(engine, clock)
        self.spend = Spend(engine, clock)
        self.audit = Audit(engine, clock)
        self.sole = Sole(engine, clock)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        password: SecretStr | None = None,
        clock: Callable[[], float] = time.time,
        within_s: float = WITHIN_S,
    ) -> Database:
        """Connect, and make or migrate the tables; several processes may do so at once.

        `clock` gives seconds since 1970. Raises `DatabaseUnavailable`, which may pass, and `DatabaseInvalid`.
        """
        engine = Engine(parse(url), password, within_s)
        try:
            made = migrate(engine)
        except BaseException:
            engine.close()
            raise
        return cls(engine, clock, made)

    def confirm_pepper(self, pepper: bytes) -> None:
        """Make sure that the keys in here were made with this pepper. Raises `DatabaseInvalid` if they were not.

        With another one no key would be known, as if all had been revoked: a lost file, or nodes that differ.
        Without keys any pepper will do, and is the right one from then on.
        """
        check = hmac.digest(pepper, b"tidegate pepper check", "sha256")[:16]
        with self._engine.write() as connection:
            row = connection.execute(sa.select(counters).where(counters.c.id == 1).with_for_update()).one()
            if row.pepper_check is not None and hmac.compare_digest(bytes(row.pepper_check), check):
                return
            if row.pepper_check is not None and row.live_keys:
                raise DatabaseInvalid(
                    self.url_shown,
                    f"its {row.live_keys} keys were made with another pepper: put keys.pepper, or the file that held "
                    "it, back as it was; if it is lost, revoke them all and issue new ones",
                )
            connection.execute(counters.update().where(counters.c.id == 1).values(pepper_check=check))

    def close(self) -> None:
        """Give the connections back. A call that is under way in another thread may fail."""
        self._engine.close()
