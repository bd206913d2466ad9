"""Is the gateway healthy, and if not, where: each trouble as one finding, with what to do about it.

Everything here is computed from what workers have told; nothing is asked of anybody. A finding begins when it is first
seen and keeps that time as long as it is seen again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from gateway.rollups.pulse import Pulse
from gateway.rollups.speeds import Slow
from gateway.rollups.tally import Tally

CRITICAL, WARNING, NOTICE = "critical", "warning", "notice"
"""Clients feel it now; they will, or something has to be done; good to know."""
_RANK = {CRITICAL: 0, WARNING: 1, NOTICE: 2}
MOST_FINDINGS = 50
NAMED = 3
"""Replicas of one pool with the same trouble that get a finding each; more share one."""
SHOWN_NAMES = 5
KEYS_AGED_S = 5.0
"""As `gateway.keys.sync.AGED_AFTER_S`: readings that old mean that the database does not answer."""
LATENESS_S = 0.25

_TROUBLES = {
    "cooling_down": ("refuses connections", "Is the process there, and is its address right? It is tried again."),
    "ejected": ("is ejected: its requests fail", "Read the engine's log. It gets trial requests from time to time."),
    "half_open": ("is on trial after an ejection", "Nothing: three good answers bring it back."),
    "not_ready": ("says that it is not ready", "Wait if it is loading; else read the engine's log."),
    "unresponsive": ("does not answer probes", "Is the machine or the network overloaded? Read the engine's log."),
    "stalled": ("has stopped making progress", "The engine hangs: restart it. Its requests are moved or ended."),
    "credential_refused": ("refuses its key", "Check the pool's api_key; the provider may have revoked it."),
    "draining": ("is drained", "Undrain it when it should work again."),
    "cordoned": ("is cordoned", "Uncordon it when it should take new prompts again."),
}
"""What is said of each reason for getting no work, and what to do."""
_SERIOUS = frozenset(_TROUBLES) - {"draining", "cordoned", "half_open"}
_OUT = frozenset(_TROUBLES) - {"cordoned", "half_open"}
"""Of these a replica gets nothing at all."""


class Finding(msgspec.Struct, omit_defaults=True):
    """One trouble."""

    id: str
    """The same for as long as it is the same trouble."""
    severity: str
    what: str
    where: str
    advice: str
    link: str = ""
    """The dashboard's page about it, without the `#`."""
    since_unix_s: float = 0.0


@dataclass(slots=True)
class View:
    """What is known at this moment."""

    pulses: Sequence[tuple[int, Pulse | None]]
    """Of each worker; None of one that did not answer."""
    minute: Tally
    """What happened in the last minute or so."""
    slow: Sequence[Slow] = ()
    lines: Sequence[tuple[float, dict[str, int]]] = ()
    """Requests in line by pool, at times (seconds of one clock, rising) up to now."""
    pools_configured: Sequence[tuple[str, int]] = ()
    """Pools by name, and how many replicas the configuration gives each."""
    redis: bool = False
    """A Redis is configured."""
    notes: Sequence[str] = ()
    """What went wrong with the rollups themselves."""
    burning: Sequence[Finding] = ()
    _troubled: dict[str, tuple[int, dict[str, Counter[str]]]] | None = None

    @property
    def up(self) -> list[Pulse]:
        return [pulse for _, pulse in self.pulses if pulse is not None]

    def troubled(self) -> dict[str, tuple[int, dict[str, Counter[str]]]]:
        """Of each pool how many replicas it has, and those with a trouble: by reason, how many workers see it."""
        if self._troubled is None:
            self._troubled = {}
            for pulse in self.up:
                for pool in pulse.pools:
                    count, known = self._troubled.get(pool.name, (0, {}))
                    for each in pool.replicas:
                        reason = each.reason or each.state
                        if reason in _TROUBLES:
                            known.setdefault(each.name, Counter())[reason] += 1
                    self._troubled[pool.name] = (max(count, len(pool.replicas)), known)
        return self._troubled


class Since:
    """When each finding was first seen."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}

    def note(self, findings: Iterable[Finding], now_unix_s: float) -> list[Finding]:
        """Worst first, each with its time; those that are gone are forgotten."""
        found = list(findings)
        self._first = {each.id: self._first.get(each.id, each.since_unix_s or now_unix_s) for each in found}
        for each in found:
            each.since_unix_s = round(self._first[each.id], 1)
        found.sort(key=lambda each: (_RANK[each.severity], each.since_unix_s, each.id))
        return found[:MOST_FINDINGS]


def findings(view: View, now_unix_s: float) -> list[Finding]:
    """Every trouble that shows, in no order."""
    checks: tuple[Callable[[View, float], Iterable[Finding]], ...] = (
        _workers,
        _store,
        _pools,
        _slow,
        _queues,
        _budgets,
        _overload,
        _database,
        _losses,
    )
    return [*view.burning, *(each for check in checks for each in check(view, now_unix_s))]


def _workers(view: View, now_unix_s: float) -> Iterable[Finding]:
    down = [index for index, pulse in view.pulses if pulse is None]
    if down:
        all_down = len(down) == len(view.pulses)
        yield Finding(
            "workers",
            CRITICAL if all_down else WARNING,
            "No worker answers" if all_down else f"{len(down)} of {len(view.pulses)} workers do not answer",
            "worker " + ", ".join(map(str, down[:SHOWN_NAMES])),
            "They are started again by themselves; the gateway's log says why they ended.",
        )
    draining = [pulse.worker for pulse in view.up if pulse.draining]
    if draining:
        yield Finding("stopping", NOTICE, "The gateway is stopping", "this gateway", "Nothing: it was told to.")
    if any(pulse.reload_refused for pulse in view.up):
        yield Finding(
            "reload",
            WARNING,
            "The last configuration could not be used",
            "configuration",
            "The log has every problem with its line; `tidegate check FILE` shows the same. The old one is in force.",
            "settings",
        )


def _store(view: View, now_unix_s: float) -> Iterable[Finding]:
    alone = [pulse for pulse in view.up if pulse.store_mode == "local"]
    if view.redis and alone:
        yield Finding(
            "store",
            CRITICAL,
            "Redis does not answer: each gateway counts limits and queues alone",
            "Redis" if len(alone) == len(view.up) else f"Redis, as {len(alone)} of {len(view.up)} workers see it",
            "Is it running and reachable at `store`? Limits hold by each gateway's part until it is back.",
            "limits",
            now_unix_s - max(pulse.store_mode_s for pulse in alone),
        )


def _pools(view: View, now_unix_s: float) -> Iterable[Finding]:
    for name, count in view.pools_configured:
        if not count:
            yield Finding(
                f"pool {name} empty", WARNING, f"Pool {name} has no replicas", f"pool {name}",
                f"Add some to backends.{name}.replicas, or take the models away that use it.", f"fleet/{name}",
            )  # fmt: skip
    for pool, (of, replicas) in view.troubled().items():
        troubled: dict[str, list[str]] = {}
        out = 0
        for name, reasons in replicas.items():
            troubled.setdefault(max(reasons, key=lambda reason: reasons[reason]), []).append(name)
            out += sum(reasons[reason] for reason in _OUT) == len(view.up)
        if out and out == of:
            told = ", ".join(f"{len(names)} {reason.replace('_', ' ')}" for reason, names in troubled.items())
            yield Finding(
                f"pool {pool}", CRITICAL, f"Pool {pool} has no replica that takes work", f"pool {pool}: {told}",
                "Its models answer with 503. Bring one replica back first.", f"fleet/{pool}",
            )  # fmt: skip
        for reason, names in troubled.items():
            yield from _troubled(pool, reason, names, of)


def _troubled(pool: str, reason: str, names: list[str], of: int) -> Iterable[Finding]:
    """Replicas of one pool with the same trouble."""
    said, advice = _TROUBLES[reason]
    severity = WARNING if reason in _SERIOUS else NOTICE
    if len(names) <= NAMED:
        for name in names:
            yield Finding(
                f"replica {pool}/{name} {reason}", severity, f"Replica {name} {said}", f"pool {pool}",
                advice, f"fleet/{pool}/{name}",
            )  # fmt: skip
        return
    shown = ", ".join(names[:SHOWN_NAMES]) + ("" if len(names) <= SHOWN_NAMES else f", {len(names) - SHOWN_NAMES} more")
    yield Finding(
        f"replicas {pool} {reason}", severity, f"{len(names)} of {of} replicas: each {said}", f"pool {pool}: {shown}",
        advice, f"fleet/{pool}",
    )  # fmt: skip


def _slow(view: View, now_unix_s: float) -> Iterable[Finding]:
    by_pool: dict[str, list[Slow]] = {}
    for each in view.slow:
        by_pool.setdefault(each.pool, []).append(each)
    for pool, slow in by_pool.items():
        slow.sort(key=lambda each: each.peers_s / each.usual_s)
        for each in slow[:NAMED]:
            kind = "to first content" if each.streams else "for a whole answer"
            took = "a stream has waited" if each.waiting else "it takes"
            yield Finding(
                f"slow {pool}/{each.replica}",
                WARNING,
                f"Replica {each.replica} is slow: {took} {_time(each.usual_s)} {kind}, "
                f"its peers take {_time(each.peers_s)}",
                f"pool {pool}",
                "Look at its machine (clock, temperature, neighbours) and the engine's log; drain it meanwhile.",
                f"fleet/{pool}/{each.replica}",
            )
        if len(slow) > NAMED:
            yield Finding(
                f"slow {pool}", WARNING, f"{len(slow) - NAMED} more replicas of pool {pool} are slow", f"pool {pool}",
                "What do they share: a host, a rack, a version?", f"fleet/{pool}",
            )  # fmt: skip


def _queues(view: View, now_unix_s: float) -> Iterable[Finding]:
    if view.lines:
        now, waiting = view.lines[-1]
        before: dict[str, int] = next((lines for at, lines in view.lines if now - at <= 10.0), {})
        for pool, count in waiting.items():
            growing = count >= 5 and count >= before.get(pool, 0) + max(3, before.get(pool, 0) // 4)
            if count:
                yield Finding(
                    f"queue {pool}",
                    WARNING if growing else NOTICE,
                    f"{count} request{'s' * (count > 1)} wait{'s' * (count == 1)} in line"
                    + (f", {count - before.get(pool, 0)} more than a moment ago" if growing else ""),
                    f"pool {pool}",
                    "More comes than its replicas serve: add replicas, rent some (spill), or lower limits."
                    if growing
                    else "Nothing, unless it grows: they get their turn.",
                    f"fleet/{pool}",
                )
    for reason, count in view.minute.turned_away.items():
        yield Finding(
            f"turned away {reason}",
            WARNING,
            f"{count} requests of the last minute were turned away by a queue",
            reason.replace("_", " "),
            "The queue is full or too slow: see backends.*.queue, and how many replicas there are.",
            "requests?outcome=unavailable",
        )


def _budgets(view: View, now_unix_s: float) -> Iterable[Finding]:
    refused: Counter[tuple[str, str, str]] = Counter()
    for pulse in view.up:
        for spent in pulse.spent:
            refused[spent.scope, spent.label, spent.limit] += spent.refused
    for (scope, label, limit), count in refused.most_common(10):
        tenant, key = _holder(scope)
        period = "day" if limit == "usd_per_day" else "month"
        whose = f"tenant {tenant}, key {key}" if key else f"tenant {tenant}" if tenant else label
        yield Finding(
            f"budget {scope} {limit}",
            NOTICE,  # the gateway does what it was told to: with thousands of keys, somebody's is always spent
            f"The budget of the {period} is spent: {whose}",
            f"{count} request{'s' * (count > 1)} refused, {limit} of the {label}",
            f"Raise it for a while (`tidegate {'keys' if key else 'tenants'} raise`), or wait for the next {period} "
            "(UTC).",
            f"tenants/{tenant}" if tenant else "limits",
        )
    ceilings = {(each.model, each.window): each for pulse in view.up for each in pulse.ceilings}
    for pulse in view.up:
        for each in pulse.ceilings:
            known = ceilings[each.model, each.window]
            if each.used_usd - each.ceiling_usd > known.used_usd - known.ceiling_usd:
                ceilings[each.model, each.window] = each
    for each in ceilings.values():
        if each.ceiling_usd > 0 and each.used_usd >= 0.98 * each.ceiling_usd:
            yield Finding(
                f"ceiling {each.model} {each.window}",
                WARNING,
                f"The {each.window}'s money for rented replicas is spent: {each.used_usd:.2f} of "
                f"{each.ceiling_usd:.2f} USD",
                f"model {each.model}",
                f"Requests wait for own replicas again. Raise models.{each.model}.spill.usd_per_{each.window}, if you "
                "want to pay.",
                "cost",
            )


def _overload(view: View, now_unix_s: float) -> Iterable[Finding]:
    worst = max(view.up, key=lambda pulse: pulse.overload_level, default=None)
    shed = sum(view.minute.sheds.values())
    if worst is not None and (worst.overload_level or shed):
        cause = worst.overload_cause or max(view.minute.sheds, key=view.minute.sheds.__getitem__, default="")
        yield Finding(
            "overload",
            CRITICAL if worst.overload_level >= 3 else WARNING,
            f"The gateway is short of {cause.replace('_', ' ')}"
            + (f": {shed} requests of the last minute were refused" if shed else ""),
            f"worker {worst.worker}, overload level {worst.overload_level}",
            "Add workers or another gateway; docs/configuration.md, `overload`, says what counts.",
        )
    late = max(view.up, key=lambda pulse: pulse.loop_lag_s, default=None)
    if late is not None and late.loop_lag_s >= LATENESS_S and not late.overload_level:
        yield Finding(
            "lag", WARNING, f"An event loop is {late.loop_lag_s * 1000:.0f} ms late", f"worker {late.worker}",
            "The worker has more to do than its core can: add workers or another gateway.",
        )  # fmt: skip
    refused = view.minute.retries_refused
    if refused:
        yield Finding(
            "retries", WARNING, f"Failed requests are not tried again: {refused} in the last minute",
            "retry budget", "It is spent, so that retries make nothing worse. Look at the replicas that fail.", "fleet",
        )  # fmt: skip


def _database(view: View, now_unix_s: float) -> Iterable[Finding]:
    wanting = [pulse for pulse in view.up if pulse.keys_wanted]
    unread = any(pulse.keys_age_s is None for pulse in wanting)
    age_s = max((pulse.keys_age_s for pulse in wanting if pulse.keys_age_s is not None), default=0.0)
    if unread or age_s >= KEYS_AGED_S:
        yield Finding(
            "keys",
            CRITICAL,
            "The database of keys was never read"
            if unread
            else f"The database of keys does not answer for {age_s:.0f} s",
            "database",
            "Is it there? Keys that are known go on for keys.stale_s; new ones, and all after that, get a 503.",
            "settings",
            now_unix_s - age_s,
        )
    if any(pulse.spend_failing for pulse in view.up):
        yield Finding(
            "spend", WARNING, "What requests cost cannot be put on record", "database",
            "It is kept in memory until the database takes it: do not restart the gateway before.", "cost",
        )  # fmt: skip


def _losses(view: View, now_unix_s: float) -> Iterable[Finding]:
    for what, count in view.minute.lost.items():
        yield Finding(
            f"lost {what}", WARNING, f"{count:g} {what} were lost in the last minute", "records",
            "Can their file, database or collector be reached, and keep up? The log has the reason.",
        )  # fmt: skip
    for note in view.notes:
        yield Finding("rollups", NOTICE, "The overview's history is incomplete", note, "Nothing: it begins anew.")


def _holder(scope: str) -> tuple[str, str]:
    """Tenant and key of a store's name for a scope; empty where it has none."""
    if not scope.startswith("{t:"):
        return "", ""
    tenant, _, rest = scope[3:].partition("}:")
    return tenant, rest[2:] if rest.startswith("k:") else ""


def _time(seconds: float) -> str:
    """
    >>> _time(0.25), _time(12.0)
    ('250 ms', '12.0 s')
    """
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
