"""The attempts of one request: which replicas failed it, whether it may go on, with which key, and who is to blame."""

from __future__ import annotations

import logging
import time

from backends.upstream import Upstream
from gateway.answers import none_left
from gateway.errors import GatewayError
from gateway.fleet import Pool
from gateway.logs import about
from gateway.record import Outcome
from gateway.verdict import Again, Verdict
from gateway.watch.witness import Witness
from routing.credential import Credential
from routing.retry_budget import Ruling
from routing.types import Decision, Replica

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
SAME_TARGET_BACKOFF_S = 0.25
"""Most that a request waits before it goes to the same rented address again; another of its servers may take it."""
UNSAID_LIMIT_S = 1.0
"""How long a key is left alone that is limited, nobody says for how long, while there are others to go on with."""
FORBIDDEN = 403
SPREAD = 0.2
"""By how much of itself a `Retry-After` may be longer than the pause it tells of, so that not all come back at once."""
_SICK = frozenset({Outcome.UPSTREAM_ERROR, Outcome.UPSTREAM_INTERRUPTED, Outcome.TIMEOUT})


class Attempts:
    """What has become of a request so far. `close` it at its end.

    A replica that answered with a failure is not blamed before another one has tried: when that one fails in the same
    way, it is the request (a template that cannot take it, a defect that it touches), and neither is blamed. Else one
    client could have half of a pool ejected with a handful of such requests.
    """

    __slots__ = (
        "_avoided",
        "_backoffs",
        "_began_at",
        "_forbidden",
        "_held",
        "_key",
        "_model",
        "_pool",
        "_repeats",
        "_request_id",
        "_retries",
        "_stale",
        "_witness",
        "_worked_on",
        "counted",
        "error",
        "pause_s",
        "refunds",
        "refused",
        "served",
        "tried",
    )

    def __init__(self, pool: Pool, witness: Witness, model: str, request_id: str) -> None:
        """`model`: what the routing request calls it, by which rate limits are kept."""
        self._pool = pool
        self._witness = witness
        self._model = model
        self._request_id = request_id
        self._retries = pool.retries
        self.tried: list[Replica] = []
        self.counted = 0
        """Attempts that failed. Replicas that are not even there do not count, nor do keys that are refused."""
        self.error: GatewayError | None = None
        """What the client gets when nothing else is left."""
        self.refused = False
        """There might be another attempt if the pool's retry budget were not spent."""
        self._worked_on = False
        self._stale = False
        self._held: tuple[Replica, Verdict] | None = None
        self._forbidden: tuple[tuple[Replica, Verdict, Credential], ...] = ()
        """Refusals of one of several keys that may be the request's own doing."""
        self.served = False
        """An attempt after a failed one has brought the answer."""
        self._began_at = 0.0
        self._key: Credential | None = None
        self._avoided: tuple[Credential, ...] = ()
        """Keys that this request was refused or limited with."""
        self.refunds: tuple[float, ...] = ()
        """When attempts were charged that followed a refusal: to be paid back (`Retries.pay_back`) with an answer."""
        self._repeats = 0
        """Attempts after the first that were granted."""
        self._backoffs = 0
        """Of these, the ones that count for the backoff."""
        self.pause_s = 0.0
        """Seconds to wait before the attempt that `goes_on` has granted: none before the first one elsewhere, then full
        jitter of 50 ms, 100 ms and so on up to 1 s (AWS: Exponential Backoff and Jitter)."""

    @property
    def exhausted(self) -> bool:
        """It was sent as often as a request may be."""
        return self.counted >= self._retries.attempts

    def begins(self, upstream: Upstream, now: float) -> Credential | None:
        """An attempt is about to be made. The key to make it with; None where the upstream has one at most."""
        if not self._began_at:
            self._retries.budget.request(now)
        self._began_at = now
        keys = upstream.keys
        if keys is None:
            return None
        model = self._model
        self._key = keys.pick(model, now, self._avoided) or keys.pick(model, now) or keys.chosen(model)
        return self._key

    def goes_on(self, upstream: Upstream, verdict: Verdict, *, in_panic: bool, seen: bool = False) -> bool:
        """Take note of a failed attempt; whether there may be another, which is charged to the budget here and now.

        `in_panic`: no replica looked well. `seen`: the client has seen content, so that only a continuation can follow:
        that is no retry, and bounded by itself.
        """
        now = time.monotonic()
        replica, again, error = upstream.replica, verdict.again, verdict.error
        self._blame(replica, verdict)
        self._note_limit(upstream, verdict, now)
        if self.error is None or again is not Again.UNCOUNTED or verdict.cause is not None:
            self.error = error  # what one engine has no words for is no reason to hide that another is busy
        if again is Again.ANYWHERE:
            if self._stale:  # one kept-alive connection may die under a request; two are no coincidence
                again = Again.ONCE
            self._stale = True
            upstream.pool.drop_idle()  # they are as old as that one
        rotates = self._rotates(upstream, verdict, now)
        # Of a fleet that looks dead as a whole, not every replica is knocked at for every request.
        self.counted += (again is not Again.UNCOUNTED or in_panic) and not rotates
        if again is Again.NEVER or (self._worked_on and again is Again.ONCE):
            self._discourage(error)
            return False
        self._worked_on |= again is Again.ONCE
        same = rotates or again is Again.ANYWHERE or self._only_address(upstream, again)
        if not same:
            self.tried.append(replica)
        if not seen and not self._granted(replica, verdict, again, rotates, now):
            self._discourage(error)
            return False
        self._repeats += 1
        if rotates or again is Again.ANYWHERE or (again is Again.UNCOUNTED and not in_panic):
            self.pause_s = 0.0
        else:
            self.pause_s = self._backoff_s(same)
        return True

    def nothing_left(self, decision: Decision, now: float) -> GatewayError:
        """What the client gets when no replica can take the request: the last failure, if there was one.

        Where rate limits keep it out, `Retry-After` is when the first of them ends, and up to a fifth later.
        """
        spread = 1.0 + SPREAD * self._retries.rng.random()
        full = any(each.reason == "full" for each in decision.excluded)
        if self.error is None or (full and self.error.code == "upstream_unreachable"):
            # One that is not there says nothing of those that are merely busy.
            return none_left(decision, self._model, now, spread)
        if decision.replica is None and self.error.status in (429, 503):
            ends = [each.replica.limited_until(self._model, now) for each in decision.excluded]
            if any(ends):
                self.error.retry_after_s = spread * (min(end for end in ends if end) - now)
        self._discourage(self.error)
        return self.error

    def close(self) -> None:
        """Blame whoever is left to be blamed."""
        if self._held is not None:
            replica, verdict = self._held
            self._held = None
            self._witness.failed(replica, self._pool.replicas, verdict)
        forbidden, self._forbidden = self._forbidden, ()
        if len({key for _, _, key in forbidden}) > 1 and not self.served:
            # 403 is said of prompts and models as well: one client must not be able to have all keys left unused.
            self._log("was forbidden with %d keys; it is blamed, and they are not", len(forbidden))
            return
        for replica, verdict, key in forbidden:
            self._witness.failed(replica, self._pool.replicas, verdict, key)

    def _blame(self, replica: Replica, verdict: Verdict) -> None:
        if verdict.credential_refused == FORBIDDEN and self._key is not None:
            self._forbidden = (*self._forbidden, (replica, verdict, self._key))
            return
        if verdict.answered and self._held is None:
            self._held = (replica, verdict)
        elif verdict.answered:
            self._held = None
            self._log("failed at two replicas, %s the second; it is blamed, and they are not", replica.name)
        else:
            self._witness.failed(replica, self._pool.replicas, verdict, self._key)

    def _note_limit(self, upstream: Upstream, verdict: Verdict, now: float) -> None:
        """Have nobody ask again before the time that the server has named.

        A rate limit is the key's where the server is rented, or where there are several keys; else, and when a server
        says of itself that it is busy, the replica's. An engine of your own that names no time is not paused: what it
        has to do is known better from its load.
        """
        replica, ring, wait_s = upstream.replica, upstream.replica.credential, verdict.pause_s
        if verdict.limits_key and ring is not None and (upstream.hosted or len(ring.keys) > 1):
            key = self._key or ring.keys[0]
            if wait_s is None:
                if len(ring.keys) == 1:
                    return
                wait_s = UNSAID_LIMIT_S
            until, paused, who = key.limits.begin(self._model, wait_s, now), self._pool.replicas, "the key"
            where = key.position
        elif wait_s is not None:
            until, paused, who = replica.limits.begin(self._model, wait_s, now), (replica,), "replica"
            where = 0
        else:
            return
        for each in paused:
            each.paused_until = max(each.paused_until, until)
        logger.debug(
            "pool %s: %s %s is not asked for %s for %.1f s",
            replica.pool,
            who,
            replica.name if who == "replica" else where,
            self._model,
            until - now,
            extra=about(self._request_id),
        )

    def _log(self, text: str, value: object) -> None:
        logger.info(f"request %s {text}", self._request_id, value, extra=about(self._request_id))

    def _rotates(self, upstream: Upstream, verdict: Verdict, now: float) -> bool:
        """Whether the same replica can be asked with another key."""
        if upstream.keys is None or self._key is None or not (verdict.credential_refused or verdict.limits_key):
            return False
        self._avoided = (*self._avoided, self._key)
        return upstream.keys.pick(self._model, now, self._avoided) is not None

    def _granted(self, replica: Replica, verdict: Verdict, again: Again, rotates: bool, now: float) -> bool:
        """Whether the budget allows another attempt, where there is anything to allow.

        A kept-alive connection that has died is free: it had served somebody before. So is a replica at which nothing
        was tried, because its engine has no words for the request.
        """
        if again is Again.ANYWHERE or (verdict.evidence is None and verdict.cause is None):
            return True
        if not rotates and (self.exhausted or len(self.tried) >= len(self._pool.replicas)):
            return True  # nobody is left to be asked: that is no retry, and told as what it is
        target: Replica | Credential = replica
        in_flight = replica.in_flight
        if rotates and self._key is not None:
            target = self._key
            in_flight = sum(each.in_flight for each in self._pool.replicas)
        # This request's own place is given back already.
        ruling = self._retries.rule(target, self._began_at, in_flight + 1, now)
        if ruling is Ruling.ALLOWED and (verdict.answered or again in (Again.SAFELY, Again.UNCOUNTED)):
            self.refunds = (*self.refunds, now)
        self.refused = ruling is Ruling.REFUSED
        if self.refused:
            self._held = None  # no other could be asked for its opinion, and without one nobody is to blame
        return not self.refused

    def _only_address(self, upstream: Upstream, again: Again) -> bool:
        """Whether it goes to the same replica again, there being no other and no other pool either.

        An address of a rented API stands for many servers, one of your own engines for one.
        """
        if again is not Again.ONCE or not upstream.hosted or not self._pool.alone:
            return False
        return len(self._pool.replicas) <= len(self.tried) + 1

    def _backoff_s(self, same: bool) -> float:
        number = self._backoffs
        self._backoffs += 1
        most_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (number - 1)) if number else 0.0
        return (SAME_TARGET_BACKOFF_S if same else most_s) * self._retries.rng.random()

    def _discourage(self, error: GatewayError) -> None:
        """Have the client's library not try again what was tried again here: three layers of three make 27 sends.

        Where a server has said when to come back, and the budget is not spent, that is the better answer.
        """
        if error.should_retry is not None or error.outcome not in _SICK:
            return
        if self.refused or (self._repeats and error.retry_after_s is None):
            error.should_retry = False
