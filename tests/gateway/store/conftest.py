"""Every implementation of the store, made in the same way, for the tests that all of them have to pass."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.gateway.store.halves import HALVES, Half


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: pytest's own folders are too long for a socket's path."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@pytest.fixture(params=HALVES)
async def half(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Half]:
    made: Half = HALVES[request.param](folder)
    await made.start()
    yield made
    await made.stop()
