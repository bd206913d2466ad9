"""torchvision, import-only: the published wheels do not load beside this CPU build of PyTorch; text needs none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from import_only import absent, provide  # type: ignore[import-not-found]

__version__ = "0.0.0+stub"

# transformers reads the members of this enum when it is imported.
_INTERPOLATION = SimpleNamespace(
    **{name.upper(): name for name in ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")}
)


def _make(name: str) -> Any:
    return _INTERPOLATION if name == "InterpolationMode" else absent(f"torchvision.{name}")


provide(__name__, _make)

from torchvision import io, ops, transforms  # type: ignore[import-not-found]  # noqa: E402, F401
