"""One change at a time: the row that every change of keys, tenants and audit passes through.

Whoever changes something locks `tidegate_counters` first and holds it until the commit. So versions become visible in
their order: who has read version 7 will never find a 6 that came later, which is what makes "everything above 7" a
complete answer. (A PostgreSQL sequence hands its numbers out before the commit, and commits come in any order.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import sqlalchemy as sa

from gateway.database import checked
from gateway.database.answers import MAX_KEYS
from gateway.database.engine import Engine
from gateway.database.errors import Conflict, DatabaseInvalid
from gateway.database.tables import audit, counters


@dataclass
class Turn:
    """The right to make one change, and its number."""

    connection: sa.Connection
    version: int
    """What the changed rows get."""
    audit_id: int
    live_keys: int
    now_unix_s: float
    actor: str
    recorded: bool = False

    def record(self, action: str, subject: str, diff: Mapping[str, Any]) -> None:
        """Write the change into the audit, in the change's own transaction. Without this nothing counts as changed."""
        self.connection.execute(
            audit.insert().values(
                id=self.audit_id,
                time_unix_s=self.now_unix_s,
                actor=self.actor,
                action=action,
                object=subject,
                diff=msgspec.json.encode(diff).decode(),
            )
        )
        self.recorded = True

    def room_for_a_key(self) -> None:
        """Count one more. Raises `Conflict` when there are as many as a gateway can hold."""
        if self.live_keys >= MAX_KEYS:
            raise Conflict(f"there are {MAX_KEYS} keys already, and no more can be held: remove those that expired")
        self.live_keys += 1


@contextmanager
def turn(engine: Engine, clock: Callable[[], float], actor: str, *, directory: bool = True) -> Iterator[Turn]:
    """Wait for the turn to change something. With `directory` it is keys or tenants, and gateways will read it."""
    checked.text("actor", actor, 1)
    with engine.write() as connection:
        row = connection.execute(sa.select(counters).where(counters.c.id == 1).with_for_update()).one_or_none()
        if row is None:
            raise DatabaseInvalid(engine.address.shown, "its counters are gone")
        mine = Turn(connection, row.version + directory, row.audit_id + 1, row.live_keys, clock(), actor)
        yield mine
        if mine.recorded:
            values = {"version": mine.version, "audit_id": mine.audit_id, "live_keys": mine.live_keys}
            connection.execute(counters.update().where(counters.c.id == 1).values(**values))
