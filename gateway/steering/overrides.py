"""What operators may change while the gateway runs, and the book of what they have changed: plain data and rules.

An override is one setting of the configuration with another value. The book is a version, the overrides in force, and
the editions before, so that any of them can be restored. Whether a value is right is decided by the configuration's
own checks (`gateway.steering.reading`); here it is only decided what may be changed at all, and by whom.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.config.layer import Layer

MAX_OVERRIDES = 2_000
"""Twice a fleet of 200 replicas with weight and price, and models besides."""
MAX_HISTORY = 20
"""Editions that can be restored."""

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of setting that may be changed while the gateway runs."""

    pattern: Path
    """`*` stands for any name."""
    owner: bool
    """Whether it is about money, so that only an owner may change it."""
    what: str


RULES: tuple[Rule, ...] = (
    Rule(("backends", "*", "replicas", "*", "weight"), False, "a replica's share of the load"),
    Rule(("backends", "*", "replicas", "*", "price"), True, "what a replica's tokens cost"),
    Rule(("models", "*", "price"), True, "what a model's tokens cost"),
    Rule(("models", "*", "policy"), False, "how a model's replicas are chosen"),
    Rule(("models", "*", "shadow"), False, "the policy that decides beside that"),
    Rule(("models", "*", "ms_per_usd"), False, "what a dollar is worth in time"),
    Rule(("models", "*", "spill", "usd_per_hour"), True, "what may be spent on rented replicas in an hour"),
    Rule(("models", "*", "spill", "usd_per_day"), True, "what may be spent on rented replicas in a day"),
    Rule(("models", "*", "spill", "enter"), False, "when requests begin to leave for rented replicas"),
    Rule(("models", "*", "spill", "leave"), False, "when they stay again"),
    Rule(("models", "*", "spill", "ttft_target_ms", "*"), False, "how long a class should wait for its first token"),
    Rule(("overload", "enabled"), False, "whether anything is shed"),
    Rule(("overload", "shed_sheddable_at"), False, "when sheddable requests are refused"),
    Rule(("overload", "shed_batch_at"), False, "when batch requests are refused"),
    Rule(("overload", "critical_only_at"), False, "when only critical requests are served"),
    Rule(("overload", "max_loop_lag_ms"), False, "how late the event loop may be"),
)
"""Nothing that needs a restart, no address, no secret, nothing of who may come in."""


def rule_for(path: Sequence[str]) -> Rule | None:
    """The rule that allows a path to be changed; None: it may not be."""
    for rule in RULES:
        if len(rule.pattern) == len(path) and all(
            wanted in ("*", part) for wanted, part in zip(rule.pattern, path, strict=True)
        ):
            return rule
    return None


class Override(msgspec.Struct, frozen=True):
    """One setting with another value than file and environment give it."""

    path: Path
    value: Any
    """As JSON has it."""
    by: str
    at_unix_s: float


class Edition(msgspec.Struct, frozen=True):
    """The overrides as they were at one version."""

    version: int
    overrides: tuple[Override, ...]
    by: str
    """Who ended it, by the change that came next."""
    at_unix_s: float
    """When."""
    what: str
    """What that change was."""


class Book(msgspec.Struct, frozen=True):
    """All overrides of one gateway. `version` grows with every change and is never used twice."""

    version: int = 0
    overrides: tuple[Override, ...] = ()
    history: tuple[Edition, ...] = ()
    """The newest first."""

    @property
    def layer(self) -> Layer:
        return [(each.path, each.value) for each in self.overrides]

    def get(self, path: Path) -> Override | None:
        return next((each for each in self.overrides if each.path == path), None)


@dataclass(frozen=True, slots=True)
class Change:
    """Settings to change, and settings to leave to file and environment again; all of it, or none."""

    set: Mapping[Path, Any]
    drop: frozenset[Path] = frozenset()

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset(self.set) | self.drop


def changed(book: Book, change: Change, by: str, now_unix_s: float, what: str) -> Book:
    """The book after a change. Those that stay keep their place: the order is that of their first setting."""
    overrides: list[Override] = []
    waiting = dict(change.set)
    for each in book.overrides:
        if each.path in waiting:
            overrides.append(Override(each.path, waiting.pop(each.path), by, now_unix_s))
        elif each.path not in change.drop:
            overrides.append(each)
    overrides += [Override(path, value, by, now_unix_s) for path, value in waiting.items()]
    return _next(book, tuple(overrides), by, now_unix_s, what)


def restored(book: Book, version: int, by: str, now_unix_s: float) -> Book | None:
    """The book with the overrides of a former version, as a new one; None: that version is not kept."""
    for edition in book.history:
        if edition.version == version:
            return _next(book, edition.overrides, by, now_unix_s, f"restored version {version}")
    return None


def _next(book: Book, overrides: tuple[Override, ...], by: str, now_unix_s: float, what: str) -> Book:
    ended = Edition(book.version, book.overrides, by, now_unix_s, what)
    return Book(book.version + 1, overrides, (ended, *book.history)[:MAX_HISTORY])


def differences(before: Book, after: Book) -> dict[Path, tuple[Any, Any]]:
    """What became of each path that changed: the values before and after; `NOT_SET` where there was none."""
    old = {each.path: each.value for each in before.overrides}
    new = {each.path: each.value for each in after.overrides}
    return {
        path: (old.get(path, NOT_SET), new.get(path, NOT_SET))
        for path in dict.fromkeys((*old, *new))
        if old.get(path, NOT_SET) != new.get(path, NOT_SET)
    }


class _NotSet:
    """Of a path that has no override; null is a value."""

    def __repr__(self) -> str:
        return "NOT_SET"


NOT_SET = _NotSet()


def undoing(differing: Mapping[Path, tuple[Any, Any]]) -> Change:
    """The change that takes others back."""
    return Change(
        {path: before for path, (before, _) in differing.items() if before is not NOT_SET},
        frozenset(path for path, (before, _) in differing.items() if before is NOT_SET),
    )


def shown(path: Iterable[str]) -> str:
    """A path as documentation writes it; names with dots are quoted."""
    return ".".join(part if part.replace("-", "").replace("_", "").isalnum() else f'"{part}"' for part in path)
