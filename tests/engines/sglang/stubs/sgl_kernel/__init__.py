"""SGLang's compiled kernels, import-only: they are published for CUDA, and for CPUs only as source.

With `--attention-backend torch_native` the model runs on PyTorch's own operators. Most callers have a fallback for a
kernel package that cannot be imported, so only the submodules that are imported without one exist.

Every process of SGLang imports this package early, so the one change that LoRA needs in torch is made here too.
"""

from __future__ import annotations

from typing import Any

from import_only import absent, provide  # type: ignore[import-not-found]
from page_locking import ignore_page_locking  # type: ignore[import-not-found]

__version__ = "0.0.0+stub"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return absent(f"sgl_kernel.{name}")


provide(__name__, __getattr__, lambda name: name in ("kvcacheio", "mamba"))

ignore_page_locking()
