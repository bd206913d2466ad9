"""The lease of the one gateway that may use a database while its limits are counted in its own memory.

Two such gateways would each enforce every limit, and so let through twice what it says. The lease is one row, changed
under the database's own locks; it has to be renewed, and runs out when that stops. Time is the database server's on
PostgreSQL and this machine's for a SQLite file, which only one machine can use: gateways need not agree on the time.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import sqlalchemy as sa

from gateway.database.engine import Engine
from gateway.database.tables import sole

LEASE_S = 12.0
"""How long a lease holds after its last renewal."""


class Holder(msgspec.Struct, frozen=True):
    """A gateway process that asks for the lease, or has it."""

    gateway: str
    """Its id, new at every start."""
    host: str
    """For messages."""
    pid: int
    machine: str = ""
    """Names the kernel and the name space in which `pid` means something; empty where nobody can say."""
    process_started: int = 0
    """When the process began, in its kernel's own count; tells it from a later one with the same number. 0: unknown."""
    since_unix_s: float = 0.0
    """When it took the lease, by the database's clock."""
    renewals: int = 0
    """Grows as long as it is alive."""


class Sole:
    """The lease. Every method is one transaction and blocks."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def take(
        self, me: Holder, is_gone: Callable[[Holder], bool] = lambda _: False, over: Holder | None = None
    ) -> Holder | None:
        """Take the lease, or renew it. None: it is mine now; else who has it.

        Another's is taken when it has run out, when `is_gone` says that its process has ended, or when it is `over`:
        exactly as it was when the caller saw it last, a lease's time ago.
        """
        row = sa.select(sole).where(sole.c.id == 1).with_for_update()
        with self._engine.write() as connection:
            found = connection.execute(row).one_or_none()
            now_unix_s = self._now(connection)
            mine = {
                "gateway": me.gateway,
                "host": me.host,
                "pid": me.pid,
                "machine": me.machine,
                "process_started": me.process_started,
                "renewed_unix_s": now_unix_s,
            }
            if found is None:
                # Two that find no row at once: the second one's insertion is a `Conflict`, and it asks again.
                connection.execute(sole.insert().values(id=1, since_unix_s=now_unix_s, renewals=0, **mine))
                return None
            other = _holder(found)
            if other.gateway == me.gateway:
                mine["renewals"] = other.renewals + 1
            elif found.renewed_unix_s + LEASE_S <= now_unix_s or other == over or is_gone(other):
                mine |= {"since_unix_s": now_unix_s, "renewals": 0}
            else:
                return other
            connection.execute(sole.update().where(sole.c.id == 1).values(**mine))
            return None

    def give_up(self, gateway: str) -> None:
        """Let the next one have it at once. Nothing, if this gateway does not have it."""
        with self._engine.write() as connection:
            connection.execute(sole.delete().where(sole.c.id == 1, sole.c.gateway == gateway))

    def _now(self, connection: sa.Connection) -> float:
        if self._engine.sqlite:
            return self._clock()
        return float(connection.execute(sa.select(sa.func.extract("epoch", sa.func.clock_timestamp()))).scalar_one())


def _holder(row: sa.Row[tuple[object, ...]]) -> Holder:
    fields = row._mapping
    return Holder(**{name: fields[name] for name in Holder.__struct_fields__})
