"""Which requests an operator wants to see."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.record import Exchange, Outcome

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
"""What a worker keeps in memory."""
MAX_LIVE = 5000
"""Requests under way that a worker shows, the oldest first."""
_STATUS = re.compile(r"[1-5](?:xx|\d\d)|0")
_CURSOR = re.compile(r"([0-9a-f]{1,16})-(\w{1,64})", re.ASCII)
PARAMETERS: Mapping[str, str] = {
    "live": "true: only requests under way; false: only settled ones.",
    "tenant": "Only of this tenant.",
    "key": "Only with the key of this id.",
    "model": "Only for this model, or whose fallback answered for it.",
    "replica": "Only those that this replica was asked for: its name, or POOL/NAME.",
    "outcome": "Only with this outcome; settled ones only.",
    "status": "Only with this HTTP status, such as 503 or 5xx; settled ones only.",
    "since": "Only those that began at this time or later, in seconds since 1970.",
    "until": "Only those that began before this time, in seconds since 1970.",
    "slower_than_ms": "Only those that took, or have taken, longer than this.",
    "limit": f"Settled requests to return, 1 to {MAX_LIMIT}; {DEFAULT_LIMIT} unless it is given.",
    "before": "`next` of the page before: only those that were settled earlier.",
}


class Query(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to show. None: anything."""

    live: bool | None = None
    """True: only what is under way; False: only what is settled."""
    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    replica: str | None = None
    """A name, or pool and name with a slash between."""
    outcome: str | None = None
    status: str | None = None
    """Three digits, or one and `xx`; `0`: none was sent."""
    since: float | None = None
    """When it began, in seconds since 1970."""
    until: float | None = None
    slower_than_ms: float | None = None
    limit: int = DEFAULT_LIMIT
    before: str | None = None
    """A `cursor`."""
    live_limit: int = MAX_LIVE
    """Of each worker's requests under way; not to be set from outside."""

    @property
    def wants_live(self) -> bool:
        return self.live is not False and self.outcome is None and self.status is None and self.before is None

    def matches(self, exchange: Exchange, now: float) -> bool:
        """Whether this request is meant. `now`: monotonic seconds, for one that is under way."""
        if self.tenant is not None and exchange.tenant != self.tenant:
            return False
        if self.key is not None and exchange.key_id != self.key:
            return False
        if self.model is not None and self.model not in (exchange.model, exchange.fallback_from):
            return False
        if self.replica is not None and not _was_at(exchange, self.replica):
            return False
        if self.outcome is not None and exchange.outcome != self.outcome:
            return False
        if self.status is not None and not _has_status(exchange.status, self.status):
            return False
        if self.since is not None and exchange.started_unix_s < self.since:
            return False
        if self.until is not None and exchange.started_unix_s >= self.until:
            return False
        if self.slower_than_ms is None:
            return True
        return ((exchange.finished_at or now) - exchange.started_at) * 1000 > self.slower_than_ms


def _was_at(exchange: Exchange, replica: str) -> bool:
    pool, slash, name = replica.rpartition("/")
    return any(each.replica == name and (not slash or each.pool == pool) for each in exchange.tries)


def _has_status(status: int, wanted: str) -> bool:
    return str(status // 100) == wanted[0] if wanted.endswith("xx") else str(status) == wanted


def cursor(exchange: Exchange) -> str:
    """The place of a settled request among all of this gateway's: whatever is settled later comes before it.

    The workers are on one machine, whose monotonic clock they share.
    """
    finished_at, id = place(exchange)
    return f"{finished_at:x}-{id}"


def place(exchange: Exchange) -> tuple[int, str]:
    """What settled requests are ordered by: nanoseconds of the monotonic clock, and the id."""
    return int((exchange.finished_at or 0.0) * 1e9), exchange.request_id


def place_of(text: str) -> tuple[int, str]:
    """The place that a cursor names. Raises `InvalidRequest`."""
    found = _CURSOR.fullmatch(text)
    if found is None:
        raise InvalidRequest("before must be the next of another page.", param="before")
    return int(found[1], 16), found[2]


def read_query(parameters: Mapping[str, str]) -> Query:
    """Of the address of a request. Raises `InvalidRequest` for a parameter that is not known or cannot be used."""
    found: dict[str, Any] = {}
    for name, text in parameters.items():
        if name not in PARAMETERS:
            raise InvalidRequest(f"{name[:50]!r} is no filter; there are {', '.join(PARAMETERS)}.", param=name[:50])
        if not text:
            continue  # a form that leaves a field empty
        if len(text) > 500:
            raise InvalidRequest(f"{name} is too long.", param=name)
        found[name] = _READERS.get(name, _text)(name, text)
    return Query(**found)


def _text(name: str, text: str) -> str:
    return text


def _switch(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false.", param=name)
    return text == "true"


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1e12:
        raise InvalidRequest(f"{name} must be a number.", param=name)
    return number


def _limit(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MAX_LIMIT):
        raise InvalidRequest(f"limit must be a whole number from 1 to {MAX_LIMIT}.", param=name)
    return int(text)


def _outcome(name: str, text: str) -> str:
    if text not in list(Outcome):
        raise InvalidRequest(f"outcome must be one of {', '.join(Outcome)}.", param=name)
    return text


def _status(name: str, text: str) -> str:
    if not _STATUS.fullmatch(text):
        raise InvalidRequest("status must be an HTTP status such as 503, or 5xx for all of its kind.", param=name)
    return text


def _before(name: str, text: str) -> str:
    place_of(text)
    return text


_READERS: Mapping[str, Callable[[str, str], Any]] = {
    "live": _switch,
    "outcome": _outcome,
    "status": _status,
    "since": _number,
    "until": _number,
    "slower_than_ms": _number,
    "limit": _limit,
    "before": _before,
}
