"""Reads what NVIDIA's DCGM exporter says of GPUs: engines report their KV cache, and nothing of the device below it.

https://github.com/NVIDIA/dcgm-exporter (the fields are those of its `default-counters.csv`)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from backends.prometheus import read_page

MAX_GPUS = 64
"""Of one replica. The largest engines run on 32."""
_MIB = 1 << 20

_BUSY = "DCGM_FI_DEV_GPU_UTIL"
_ENGINE_ACTIVE = "DCGM_FI_PROF_GR_ENGINE_ACTIVE"
"""A ratio; the only one of the two that there is for a slice of a GPU (MIG)."""
_USED, _FREE, _RESERVED = "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_RESERVED"
_POWER = "DCGM_FI_DEV_POWER_USAGE"
_LARGEST: Mapping[str, float] = {
    _BUSY: 100,
    _ENGINE_ACTIVE: 1,
    _USED: 1 << 30,
    _FREE: 1 << 30,
    _RESERVED: 1 << 30,
    _POWER: 100_000,
}
"""DCGM has numbers for "no value" in each of its types: 2^31 - 16, 2^47, 2^63 - 16. All are beyond these."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU, or a slice of one, at the last look. None: the exporter does not say."""

    index: str
    """Its number on its machine, and that of the slice after a slash."""
    use: float | None = None
    """Share of the time in which something ran on it, 0 to 1."""
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    power_watts: float | None = None


def read_gpus(
    page: bytes, indices: Collection[int] | None = None, labels: Mapping[str, str] | None = None
) -> tuple[Gpu, ...]:
    """The GPUs on an exporter's page, by their index; at most `MAX_GPUS`.

    `indices`: only these numbers; None: all. `labels`: only samples that have these (`Hostname`, `pod`, `UUID`, ...).
    """
    wanted = None if indices is None else {str(index) for index in indices}
    found: dict[str, dict[str, float]] = {}
    for name, samples in read_page(page, _LARGEST).items():
        for given, value in samples:
            number = given.get("gpu", "")
            if not number or (wanted is not None and number not in wanted) or not 0 <= value <= _LARGEST[name]:
                continue
            if labels and any(given.get(label) != text for label, text in labels.items()):
                continue
            part = given.get("GPU_I_ID")
            index = f"{number}/{part}" if part else number
            if index in found or len(found) < MAX_GPUS:
                found.setdefault(index, {})[name] = value
    return tuple(_gpu(index, found[index]) for index in sorted(found, key=_place))


def _gpu(index: str, said: Mapping[str, float]) -> Gpu:
    use = said.get(_ENGINE_ACTIVE) if _BUSY not in said else said[_BUSY] / 100
    used, free = said.get(_USED), said.get(_FREE)
    whole = None if used is None or free is None else used + free + said.get(_RESERVED, 0.0)
    return Gpu(
        index=index,
        use=use,
        memory_used_bytes=None if used is None else int(used * _MIB),
        memory_bytes=None if whole is None else int(whole * _MIB),
        power_watts=said.get(_POWER),
    )


def _place(index: str) -> tuple[int, str]:
    """Numbers in their order: 2 before 10."""
    return len(index.partition("/")[0]), index
