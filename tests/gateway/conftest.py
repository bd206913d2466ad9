"""The gateway runs on uvloop in production; tests about sockets run there, or on both loops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

_FACTORIES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A test module chooses with `LOOPS = ("uvloop",)`; all others run on the default loop."""
    chosen = getattr(item.module, "LOOPS", ("asyncio",)) if isinstance(item, pytest.Function) else ("asyncio",)
    return {name: _FACTORIES[name] for name in chosen}
