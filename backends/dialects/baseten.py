"""Baseten: its Model APIs (`https://inference.baseten.co/v1`) and dedicated deployments.

A deployment is reached below `https://model-ID.api.baseten.co/environments/production/sync/v1`, with
`/deployment/ID/sync/v1` instead, or, in a region, `https://model-ID-ENVIRONMENT.api.baseten.co/sync/v1`. Whatever is
sent there goes to its container, and starts one if it has scaled to zero: minutes of waiting, and money. So a
deployment is never asked anything aside. A request that finds none running is held until one does, so `first_token_s`
has to cover the start.
Sources: docs.baseten.co, "Inference errors", "Request lifecycle", "Cold starts", "Call your model" and the
"Inference API" specification; both `Authorization: Bearer` and `Authorization: Api-Key` are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.dialects.openai import OpenAI
from backends.dialects.protocol import EngineInfo, NotOffered, Readiness
from backends.side import SideChannel

_DEDICATED = ".api.baseten.co"


class Baseten(OpenAI):
    """OpenAI's API, behind a door that bills for being knocked at."""

    name = "baseten"
    hosted = True

    def is_overload(self, status: int, error: Mapping[str, Any]) -> bool:
        """503 is a container that is just coming or going, which is documented as passing."""
        return status == 503 or super().is_overload(status, error)

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """Model APIs as plain OpenAI. Raises `NotOffered` for a deployment: the question would start it."""
        _refuse_to_wake(side)
        return await super().probe(side, model)

    async def info(self, side: SideChannel) -> EngineInfo:
        """Model APIs as plain OpenAI. Raises `NotOffered` for a deployment."""
        _refuse_to_wake(side)
        return await super().info(side)


def _refuse_to_wake(side: SideChannel) -> None:
    if side.host is not None and side.host.rstrip(".").endswith(_DEDICATED):
        raise NotOffered("a dedicated deployment of Baseten is not asked aside: that would start it when it sleeps")
