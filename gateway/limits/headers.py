"""OpenAI's `x-ratelimit-*` headers: what is left of the tightest limit of requests, and of tokens.

`limit` is the configured number a minute. `remaining` is what may come at once now, this request already taken off, so
it can be at most the burst (a sixth of the limit, unless configured otherwise). The tightest limit is the one with the
least remaining. `reset` is the time until its whole burst is there again, as a Go duration (`1s`, `6m0s`, `12ms`): this
is how OpenAI sends it and what client libraries parse. Kinds that are not limited have no headers, and limits in shadow
mode are not told of.
"""

from __future__ import annotations

from gateway.limits.plan import Plan, Shown
from gateway.store.limits import US_PER_MINUTE, Admission

Headers = list[tuple[bytes, bytes]]


def ratelimit_headers(plan: Plan, admission: Admission, share: int = 1) -> Headers:
    """Three headers for requests and three for tokens, as far as these are limited.

    `share`: the answer charged every request that many times, being one of so many gateways without their store.
    """
    found: Headers = []
    if plan.requests:
        limit, remaining, reset_us = _tightest(plan.requests, admission)
        found += (
            (b"x-ratelimit-limit-requests", b"%d" % limit),
            (b"x-ratelimit-remaining-requests", b"%d" % (remaining // share)),
            (b"x-ratelimit-reset-requests", go_duration(reset_us)),
        )
    if plan.tokens:
        limit, remaining, reset_us = _tightest(plan.tokens, admission)
        found += (
            (b"x-ratelimit-limit-tokens", b"%d" % limit),
            (b"x-ratelimit-remaining-tokens", b"%d" % (remaining // share)),
            (b"x-ratelimit-reset-tokens", go_duration(reset_us)),
        )
    return found


def go_duration(us: int) -> bytes:
    """Microseconds as Go writes a duration, rounded up to milliseconds: `0s`, `12ms`, `1.5s`, `6m0s`, `1h0m5s`."""
    if us <= 0:
        return b"0s"
    ms = -(-us // 1000)
    if ms < 1000:
        return b"%dms" % ms
    seconds, ms = divmod(ms, 1000)
    fraction = (b".%03d" % ms).rstrip(b"0") if ms else b""
    if seconds < 60:
        return b"%d%bs" % (seconds, fraction)
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return b"%dm%d%bs" % (minutes, seconds, fraction)
    return b"%dh%dm%d%bs" % (minutes // 60, minutes % 60, seconds, fraction)


def _tightest(rates: tuple[Shown, ...], admission: Admission) -> tuple[int, int, int]:
    """Limit, remaining, and microseconds until full, of the rate with the least remaining."""
    marks, now_us = admission.marks_us, admission.now_us
    tightest = rates[0]
    least = full_in_us = 0
    for rate in rates:
        owed_us = marks[rate.index] - now_us
        counted_us = owed_us - rate.rounding_us
        remaining = rate.burst
        if counted_us > 0:
            remaining += -counted_us * rate.per_minute // US_PER_MINUTE
        if remaining < least or rate is rates[0]:
            tightest, least, full_in_us = rate, remaining, owed_us
    return tightest.limit, least if least > 0 else 0, full_in_us if full_in_us > 0 else 0
