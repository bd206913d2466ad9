"""Which Tidegate this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def tidegate_version() -> str:
    """The installed version, or a placeholder when run from a work tree that was never installed."""
    try:
        return version("tidegate")
    except PackageNotFoundError:
        return "0+unknown"
