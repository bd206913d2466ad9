"""Who was refused by which limit, and who would have been: for the operators' view of limits, bounded."""

from __future__ import annotations

from gateway.store.limits import Refusal

MAX_HOLDERS = 4096
"""Those that were refused last."""

_NAMES = {
    "requests": "requests_per_minute",
    "input": "input_tokens_per_minute",
    "output": "output_tokens_per_minute",
    "total": "tokens_per_minute",
    "concurrent": "concurrent_requests",
    "d": "usd_per_day",
    "m": "usd_per_month",
}


class RefusalsByHolder:
    """One worker's counts since it began. Costs nothing where nobody is refused."""

    def __init__(self) -> None:
        self._holders: dict[str, dict[tuple[str, bool], int]] = {}

    def note(self, scope: str, refusal: Refusal) -> None:
        """Count a limit of this scope that said no."""
        counts = self._holders.pop(scope, None)
        if counts is None:
            counts = {}
            if len(self._holders) >= MAX_HOLDERS:
                del self._holders[next(iter(self._holders))]
        self._holders[scope] = counts
        what = (limit_name(refusal.limit), refusal.shadow)
        counts[what] = counts.get(what, 0) + 1

    def of(self, scope: str, limit: str) -> tuple[int, int]:
        """How often a limit, by its name in the configuration, has refused, and how often it would have in shadow."""
        counts = self._holders.get(scope)
        return (0, 0) if counts is None else (counts.get((limit, False), 0), counts.get((limit, True), 0))


def limit_name(limit: str) -> str:
    """What the configuration calls what a store calls `requests`, `total` or by a period such as `d20261122`."""
    return _NAMES.get(limit) or _NAMES[limit[:1]]
