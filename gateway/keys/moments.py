"""Times as operators write them: `30d`, `12h`, `now`, `2026-12-31`, `2026-12-31T18:00:00Z`."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DATE = r"\d{4}-\d\d-\d\d"
_TIME = r"[Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d)"
MAX_SPAN_S = 100 * 365.25 * 86_400
SPAN_FORM = "a number and s, m, h, d or w, such as 12h or 30d"
MOMENT_FORM = "a span from now such as 30d, a date such as 2026-12-31 (its beginning, UTC), or 2026-12-31T18:00:00Z"


def parse_span_s(text: str) -> float:
    """Seconds of `90s`, `1.5h`, `30d`; `0` needs no unit. Raises `ValueError`, whose text says what to write."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text) if text != "0" else None
    seconds = float(found[1]) * _UNITS_S[found[2]] if found else 0.0
    if seconds > MAX_SPAN_S:
        raise ValueError(f"{text[:80]!r} is too long: write at most 100 years, which are 36525d")
    if found is None and text != "0":
        raise ValueError(f"{text[:80]!r} is not a span of time: write {SPAN_FORM}")
    return seconds


def parse_moment(text: str, now_unix_s: float) -> float:
    """Seconds since 1970 of a moment. Raises `ValueError`, whose text says what to write."""
    if text == "now":
        return now_unix_s
    if re.fullmatch(r"[0-9.]+[a-z]", text):
        return now_unix_s + parse_span_s(text)
    try:
        if re.fullmatch(_DATE, text, re.ASCII):
            return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
        if re.fullmatch(_DATE + _TIME, text, re.ASCII):
            return datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{text[:80]!r} is not a time: write {MOMENT_FORM}")


def shown(moment_unix_s: float) -> str:
    """`2026-12-31T18:00:00Z`: what `parse_moment` reads."""
    try:
        moment = datetime.fromtimestamp(moment_unix_s, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{moment_unix_s:g}"
    precision = "seconds" if moment.microsecond == 0 else "milliseconds"
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")
