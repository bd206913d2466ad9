"""A whole gateway with keys, in the test's own event loop."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.config import Settings
from tests.support.serving import Serving, serving, settings_for

KEY = "tgk-test-key-of-sufficient-length"
OTHER = "tgk-other-key-of-sufficient-length"


def static(name: str = "ci", key: str = KEY, **fields: Any) -> dict[str, Any]:
    """A key of the configuration."""
    return {"name": name, "key": key, **fields}


def keyed(folder: Path, urls: Sequence[str], *keys: dict[str, Any], **sections: Any) -> Settings:
    """Settings with these static keys, by default one; pepper and database lie in the folder."""
    return settings_for(
        urls,
        auth="keys",
        database=f"sqlite:///{folder / 'tidegate.db'}",
        keys={"static": list(keys or [static()]), "pepper": "0123456789abcdef0123456789abcdef"},
        **sections,
    )


@asynccontextmanager
async def admitting(settings: Settings) -> AsyncIterator[Serving]:
    """Serve with the database and the store of the settings open."""
    async with serving(settings) as gate:
        await gate.runtime.admission.start()
        yield gate


def bearer(key: str = KEY) -> str:
    return f"authorization: Bearer {key}"


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
