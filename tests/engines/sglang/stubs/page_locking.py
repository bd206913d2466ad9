"""Lets PyTorch's CPU build accept `pin_memory`, and do nothing for it.

SGLang's LoRA code asks for page-locked memory whatever device it runs on. Page-locking speeds up copies to a GPU and
changes no value; a PyTorch without an accelerator refuses it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch  # type: ignore[import-not-found]

_MAKERS = ("tensor", "empty", "zeros", "ones", "full", "arange")


def ignore_page_locking() -> None:
    """Change torch itself, in this process."""
    for name in _MAKERS:
        setattr(torch, name, _without_pin_memory(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *args, **options: tensor


def _without_pin_memory(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def made(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return make(*args, **options)

    return made
