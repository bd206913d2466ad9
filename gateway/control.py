"""What the supervising process tells its workers, and what they answer, over a pair of connected sockets.

A pipe instead of signals, since a signal sent to a whole process group (Ctrl-C in a terminal, a service manager that
stops a unit) would reach a worker twice, and a second one means hurry. Its end also tells a worker that the parent is
gone. Configuration travels as an object, so that every worker, a restarted one too, serves exactly what was checked.
"""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import dataclass

from gateway.config import Settings

_LENGTH_BYTES = 4
READY = "ready"
FAILED = "failed "
SERVED = "served"
"""It has served its last request, and waits a moment to be asked what it has counted."""


@dataclass(frozen=True, slots=True)
class Begin:
    """First message: who is asking, and what to serve."""

    parent_pid: int
    settings: Settings
    workers: int
    store_path: str | None
    """The socket of the store that all workers share; None where that is a Redis."""
    trial_secret: str = ""
    """What requests of the gateway's own playground show."""


@dataclass(frozen=True, slots=True)
class Reload:
    settings: Settings


@dataclass(frozen=True, slots=True)
class Stop:
    graceful: bool
    """Whether requests are still taken for `grace_s`."""


@dataclass(frozen=True, slots=True)
class Hurry:
    """Skip what is being waited for."""


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """An operator has changed keys or tenants through this gateway."""


@dataclass(frozen=True, slots=True)
class ReloadRefused:
    """The configuration was read again and cannot be used."""


@dataclass(frozen=True, slots=True)
class Read:
    """What it has counted was read: it may end."""


Message = Begin | Reload | ReloadRefused | Stop | Hurry | KeysChanged | Read


def encode(message: Message) -> bytes:
    """A message as it is written. Pickled: both ends are this program, and nobody else has the socket."""
    data = pickle.dumps(message)
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None when the parent is gone."""
    try:
        size = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
        message: Message = pickle.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message
