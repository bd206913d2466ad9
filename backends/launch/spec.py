"""What one server of an engine is to be: the words that the engines share, before any of them is spoken to.

`gateway.config.launch` is the same as settings; `gateway.agent.specs` makes the one of the other.
`backends.launch.commands` says it in an engine's own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


class LaunchError(Exception):
    """A server cannot be started as it is asked for; the message names the setting and the engine."""

    def __init__(self, message: str, setting: str = "") -> None:
        """`setting` is the field of `LaunchSpec` that is wrong, empty where it is not one."""
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeSpec:
    """Speculative decoding. `None` leaves a number to the engine."""

    algorithm: str
    draft_model: str | None = None
    steps: int | None = None  # tokens drafted one after the other
    topk: int | None = None  # branches at each step
    draft_tokens: int | None = None  # tokens checked at once, of all branches


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One server, or this machine's part of one. `None` always means: the engine's own default."""

    engine: str
    model: str
    served_name: str
    host: str = "127.0.0.1"
    port: int = 30000
    name: str = ""
    index: int = 0  # which of the pool's servers on this machine
    revision: str | None = None
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    nodes: int = 1
    node_rank: int = 0
    node_address: str | None = None  # host:port of rank 0
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    context_tokens: int | None = None
    max_running: int | None = None
    memory_fraction: float | None = None
    speculative: SpeculativeSpec | None = None
    adapters: tuple[tuple[str, str], ...] = ()  # (name, path)
    lora: bool = False  # adapters can be loaded later, though there are none yet
    max_loras: int | None = None
    max_lora_rank: int | None = None
    gpus: tuple[int, ...] | None = None  # of this machine; None: nothing is set
    python: str | None = None
    command: tuple[str, ...] | None = None
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)  # may hold secrets
