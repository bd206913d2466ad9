"""An engine of nothing but answers to questions, for the watch over replicas."""

from __future__ import annotations

from dataclasses import dataclass, field

from backends.dialects.openai import OpenAI
from backends.dialects.protocol import Adapter, EngineInfo, EngineLoad, NotOffered, Readiness
from backends.side import SideChannel, SideChannelError, Trouble


@dataclass
class Scripted(OpenAI):
    """Says what the test has written down, and remembers what it was asked."""

    readiness: Readiness | Trouble = Readiness.READY
    told: EngineInfo | None = field(default_factory=lambda: EngineInfo(epoch="one"))
    loads: list[EngineLoad] = field(default_factory=list)
    """One per question; the last stays. None at all: it does not say."""
    held: list[Adapter] | None = None
    asked: list[str] = field(default_factory=list)
    loaded: list[tuple[str, str]] = field(default_factory=list)
    broken_loads: int = 0
    """How many attempts to load an adapter break off."""

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        self.asked.append(f"probe {model}")
        if isinstance(self.readiness, Trouble):
            raise SideChannelError(self.readiness, "somewhere:1 did not answer")
        return self.readiness

    async def info(self, side: SideChannel) -> EngineInfo:
        self.asked.append("info")
        if self.told is None:
            raise SideChannelError(Trouble.STATUS, "somewhere:1 answered 500", 500)
        return self.told

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        self.asked.append("load")
        if not self.loads:
            raise NotOffered("it has no such page")
        return self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        self.asked.append("adapters")
        if self.held is None:
            raise NotOffered("it knows no adapters")
        return tuple(self.held)

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        if self.broken_loads:
            self.broken_loads -= 1
            raise SideChannelError(Trouble.TIMEOUT, "somewhere:1 did not answer")
        self.loaded.append((name, path))
        assert self.held is not None
        self.held.append(Adapter(name, path))
