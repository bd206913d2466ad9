"""Triton, import-only: a gigabyte of compiler for GPUs. SGLang's kernels can be defined with it and not launched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from import_only import absent, provide  # type: ignore[import-not-found]

__version__ = "3.9.0"


def _let_torch_look_away() -> None:
    """Have PyTorch find out now that there is no Triton: it asks once, and would else generate code for this one."""
    this = sys.modules[__name__]
    sys.modules[__name__] = None  # type: ignore[assignment]  # an import of it now fails
    try:
        import torch._inductor.runtime.triton_compat  # type: ignore[import-not-found]
        import torch.utils._triton  # type: ignore[import-not-found]

        torch.utils._triton.has_triton_package()
    finally:
        sys.modules[__name__] = this


_let_torch_look_away()


class Kernel:
    """What `@triton.jit` leaves: it can be decorated further, subscripted with a grid and stored, never run."""

    def __init__(self, function: Any = None, *args: Any, **options: Any) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: Any) -> Kernel:
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"the Triton kernel {self.__name__} cannot run: there is no Triton here")


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Works as `@jit` and as `@jit(...)`."""
    return Kernel if function is None else Kernel(function)


def autotune(*args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda kernel: kernel


def cdiv(x: int, y: int) -> int:
    """Division rounded up. Plain arithmetic, also called outside kernels."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Config:
    """One candidate of an autotuner's; kept, never tried."""

    def __init__(self, kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        self.kwargs = kwargs or {}


class constexpr:
    """A constant for kernels, made when their module is imported. Also used as an annotation."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _make(name: str) -> Any:
    if name == "constexpr":
        return constexpr
    if name == "AttrsDescriptor":  # PyTorch tells Triton's versions apart by whether this exists
        raise AttributeError(name)
    return jit if name in ("jit", "constexpr_function", "builtin") else absent(f"triton.{name}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _make(name)


heuristics = autotune
constexpr_function = jit
JITFunction = Kernel

# Without `knobs`, like a Triton before 3.4: SGLang would hang its own hooks on them.
provide(__name__, _make, lambda name: name != "knobs")

from triton import language, runtime, testing  # type: ignore[import-not-found]  # noqa: E402, F401
