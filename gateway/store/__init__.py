"""State that the workers of a gateway share. `protocol` says what any store does; `memory` is the one of one process.

With several workers the memory store lives in the supervisor (`server`) and they reach it over a socket (`remote`).
The supervising process imports this package, so nothing here imports the request path.
"""

from gateway.store.memory import MemoryStore
from gateway.store.protocol import START, Fact, Facts, Store, StoreError, StoreFull, StoreUnavailable

__all__ = [
    "START",
    "Fact",
    "Facts",
    "MemoryStore",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
]
