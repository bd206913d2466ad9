"""Policies that users bring: found by a Python path, and never trusted.

    package.module:attribute

The attribute is a function `(request, candidates, view) -> Replica`, or a class or function that is called with a
`random.Random` and returns such a callable. `name` (the route reason) and `wants_prefix` (True unless it says
otherwise) are read from it where it has them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from importlib import import_module
from inspect import isclass, iscoroutinefunction, signature
from math import isfinite
from random import Random
from typing import Any

from routing.policies.balanced import LeastOutstanding
from routing.types import Chooser, InferenceRequest, Replica, View

logger = logging.getLogger(__name__)

LONGEST_REASON = 64


class PolicyError(ValueError):
    """A policy's name that means none, or a Python path that leads to none; says which and why."""


def load(path: str, rng: Random) -> Chooser:
    """The policy at `package.module:attribute`, guarded. Raises `PolicyError`."""
    found = _find(path)
    try:
        chooser = found if not isclass(found) and _takes(found, 3) else _made(path, found, rng)
        if not _takes(chooser, 3) or iscoroutinefunction(chooser) or iscoroutinefunction(type(chooser).__call__):
            raise PolicyError(f"{path}: not an ordinary callable of (request, candidates, view)")
        return Guarded(path, chooser, rng)
    except PolicyError:
        raise
    except Exception as error:  # whatever a foreign __getattr__ or __signature__ may raise
        raise PolicyError(f"{path}: {type(error).__name__}: {error}") from error


def _find(path: str) -> Any:
    module_name, colon, attribute = path.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise PolicyError(f"{path}: not of the form package.module:attribute")
    try:
        found: Any = import_module(module_name)
    except (Exception, SystemExit) as error:  # a foreign module may raise anything as it is imported, a script exits
        raise PolicyError(f"{path}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise PolicyError(f"{path}: {module_name} has no {attribute}") from error
    if not callable(found):
        raise PolicyError(f"{path}: not callable but {type(found).__name__}")
    return found


def _made(path: str, factory: Callable[[Random], Any], rng: Random) -> Any:
    if not _takes(factory, 1):
        raise PolicyError(f"{path}: takes neither (request, candidates, view) nor a random.Random alone")
    try:
        made = factory(rng)
    except (Exception, SystemExit) as error:
        raise PolicyError(f"{path}: raised {type(error).__name__} when called with a random.Random: {error}") from error
    if not callable(made):
        raise PolicyError(f"{path}: returned no callable but {type(made).__name__}")
    return made


def _takes(called: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many positional arguments."""
    try:
        signature(called).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


class Guarded:
    """A policy that may raise or answer nonsense: the least outstanding replica is chosen in its place, and the first
    failure is logged."""

    def __init__(self, path: str, chooser: Callable[..., Any], rng: Random) -> None:
        name = getattr(chooser, "name", None)
        self.name = name if isinstance(name, str) and _is_reason(name) else path[:LONGEST_REASON]
        self.wants_prefix = bool(getattr(chooser, "wants_prefix", True))
        self._path = path
        self._chooser = chooser
        self._instead = LeastOutstanding(rng)
        self._complained = False
        self.failures = 0
        """How often another policy had to decide in its place."""

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        # Copies, so that whatever is done to them, the request keeps its region lock and there is something left to
        # choose from.
        shown = replace(view, matches=dict(view.matches))
        try:
            chosen = self._chooser(copy(request), tuple(candidates), shown)
            if isinstance(chosen, Replica) and chosen in candidates:
                self._tidy(shown)
                view.reason, view.predicted_ttft_ms = shown.reason, shown.predicted_ttft_ms
                return chosen
            problem = f"returned {_shown(chosen)}, which is not among the candidates"
        except Exception as error:
            problem = f"raised {type(error).__name__}"
            self._complain(problem, error)
        else:
            self._complain(problem, None)
        return self._instead(request, candidates, view)

    def _complain(self, problem: str, error: Exception | None) -> None:
        self.failures += 1
        if not self._complained:
            self._complained = True
            logger.error(
                "policy %s %s; least_outstanding decides in its place, and this is not logged again",
                self._path,
                problem,
                exc_info=error,
            )

    @staticmethod
    def _tidy(view: View) -> None:
        """What it left in the view goes into headers and metrics."""
        reason: object = view.reason
        if not isinstance(reason, str) or not _is_reason(reason):
            view.reason = ""
        predicted: object = view.predicted_ttft_ms
        if not isinstance(predicted, int | float) or not isfinite(predicted):
            view.predicted_ttft_ms = None


def _is_reason(text: str) -> bool:
    return 0 < len(text) <= LONGEST_REASON and text.isascii() and text.isprintable()


def _shown(value: object) -> str:
    return f"replica {value.name}" if isinstance(value, Replica) else f"a {type(value).__name__}"
