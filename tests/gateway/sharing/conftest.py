"""Workers that share, over every implementation of the store."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.store.halves import HALVES, Half


@pytest.fixture(params=HALVES)
async def half(request: pytest.FixtureRequest) -> AsyncIterator[Half]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are too long for a socket's path
        made: Half = HALVES[request.param](Path(folder))
        await made.start()
        yield made
        await made.stop()
