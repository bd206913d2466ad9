"""How long things take at one replica, in milliseconds: the constants of the cost model, learned by
`routing.calibration`.

The model: an engine works in steps. A step takes `step_ms`, plus `request_ms` for each running request, plus `kv_ms`
for each KV token these hold, plus `prefill_ms` for each prompt token that it processes; of those it takes up to `chunk`
at once. A prompt token costs more the further back it has to look: `prefill_ms * (1 + curve * position)`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Speed:
    """Start values are those of an 8B model on a current GPU; what is observed replaces them within a few requests."""

    prefill_ms: float = 0.04
    """Per uncached prompt token."""
    curve: float = 0.0
    """Growth of that per token of position."""
    step_ms: float = 8.0
    request_ms: float = 0.05
    kv_ms: float = 4e-5
    chunk: int = 2048
    """Prompt tokens per step."""
    rtt_ms: float = 0.0
    """Round trip to the replica and whatever else is paid once per request."""
    network_ms: float = 0.0
    """The part of it that is the way there and back, as opening connections shows (`routing.geo`)."""
    failure: float = 0.0
    """Chance that a request fails there, 0 to 1."""
    adapter_ms: float = 250.0
    """To load a LoRA adapter."""
    version: int = 0
    """Grows with every change, for whoever keeps something computed from these."""
