"""What an engine says about its own load, reduced to what a decision may read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """One report of an engine. None everywhere means that this engine does not say, never zero.

    A report is a second old or more: it corrects what the gateway counts itself, and never replaces it.
    """

    observed_at: float
    """When it was read, in the seconds of the caller's monotonic clock."""
    running: int | None = None
    """Requests in the running batch, those of other clients included."""
    max_running: int | None = None
    """Requests that the engine runs at once at most, where a report says so."""
    waiting: int | None = None
    """Requests that the engine has accepted and not begun."""
    waiting_uncached_tokens: int | None = None
    """Prompt tokens of the waiting requests that are not in the cache: prefill work ahead of a newcomer."""
    kv_use: float | None = None
    """Share of the KV cache that running requests hold, 0 to 1."""
    kv_used_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    """Tokens that the KV cache can hold. llama.cpp: slots times context."""
    prefill_us_per_token: float | None = None
    """Microseconds per uncached prompt token, from the engine's own counters over the last reports."""
    adapter_slots: int | None = None
    """LoRA adapters that can be in memory at once."""
    adapter_slots_used: int | None = None
