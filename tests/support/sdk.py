"""The stock OpenAI SDK on a gateway on a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai

from loadtests.behaviour import Behaviour
from loadtests.engine import FakeEngine
from tests.support.serving import Serving, serving, settings_for

MODELS = {
    "m": {"backend": "pool", "aliases": ["gpt-4o-mini", "org/name:tag"]},
    "renamed": {"backend": "pool", "upstream_model": "org/real"},
}


@asynccontextmanager
async def sdk(
    edge: str, script: Behaviour | None = None, **sections: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeEngine, Serving]]:
    """The stock client, not retrying, on a gateway on a fake engine."""
    sections.setdefault("models", MODELS)
    async with (
        FakeEngine(script) as engine,
        serving(settings_for([engine.url], edge=edge, **sections)) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-secret", max_retries=0) as client,
    ):
        yield client, engine, gateway
