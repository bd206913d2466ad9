"""Packages that can be imported and not used.

SGLang imports GPU libraries at module level, to define kernels and image processors that a text model on a CPU never
runs. Each stub package beside this file says with `provide` which of its submodules exist and what their attributes
are. Using one of those raises `NotImplementedError` with its name: nothing here pretends to compute.

The folder of this file goes on the PYTHONPATH of the engine, and only there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Absent(type):
    """The class of stand-ins: each is a class, so it can be subclassed, subscripted, nested, or put in a union."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(f"{cls.__qualname__}.{name}")

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    def __ror__(cls, other: Any) -> Any:
        return cls


def absent(name: str) -> Any:
    """A stand-in for a class, function or constant called `name`."""

    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise NotImplementedError(f"{name} is not installed: this SGLang runs on a CPU, with import-only stubs")

    def accept_subclass(cls: Any, /, **options: Any) -> None:
        """Class options of the real base class are its own business."""

    return Absent(name, (), {"__init__": refuse, "__init_subclass__": classmethod(accept_subclass)})


class Hollow(ModuleType):
    """A module whose every attribute exists; each is made once, by `make(name)`."""

    make: Callable[[str], Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self.make(name)
        setattr(self, name, value)
        return value


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str, make: Callable[[str], Any], exists: Callable[[str], bool]) -> None:
        self._prefix = package + "."
        self._make = make
        self._exists = exists

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.startswith(self._prefix) and self._exists(fullname.removeprefix(self._prefix)):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = Hollow(spec.name)
        module.make = self._make
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the attributes are made when asked for."""


def provide(package: str, make: Callable[[str], Any], exists: Callable[[str], bool] = lambda name: True) -> None:
    """Make the submodules of `package` importable for which `exists(name)` holds. The others raise ImportError."""
    sys.meta_path.insert(0, _Finder(package, make, exists))
