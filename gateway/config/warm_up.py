"""The part of the schema about replicas that are new to a pool."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.config.values import HOUR_S, Number, Section, Whole


class WarmUp(Section):
    """What a replica gets before its first request, when it joins a pool that is at work or begins anew."""

    prefixes: Annotated[Whole, Field(ge=0, le=64)] = Field(
        default=8,
        description="How many of the pool's most used prompt beginnings it is sent, with one token to answer each. "
        "Eight: system prompts and tools are few. 0: none, and no prompt is kept for that.",
    )
    adapters: Annotated[Whole, Field(ge=0, le=64)] = Field(
        default=4, description="How many of the most used LoRA adapters it is told to load, where it can be. 0: none."
    )
    within_s: Annotated[Number, Field(ge=0, le=HOUR_S)] = Field(
        default=30.0,
        description="Seconds that may take; then it gets requests all the same, a few at first "
        "(`health.slow_start_s`). 0: no waiting.",
    )

    @property
    def hold_s(self) -> float:
        """How long a replica is held back for that; 0 where it gets nothing."""
        return self.within_s if self.prefixes or self.adapters else 0.0
