"""GB and GiB, and how figures are printed."""

from __future__ import annotations

KB = 10**3
GB = 10**9
TB = 10**12
MIB = 2**20
GIB = 2**30


def gb(size_bytes: float) -> str:
    """In units of 10^9 bytes: `688.6 GB`."""
    return f"{size_bytes / GB:,.1f} GB"


def gib(size_bytes: float) -> str:
    """In units of 2^30 bytes: `641.3 GiB`."""
    return f"{size_bytes / GIB:,.1f} GiB"


def billions(count: float) -> str:
    """Parameters: `671.03 B`."""
    return f"{count / 1e9:,.2f} B"


def whole(count: float) -> str:
    """With commas, without a fraction: `1,127,412`."""
    return f"{int(count):,}"
