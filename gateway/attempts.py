"""The attempts of one request: which replicas failed it, whether it may go on, and who is to blame."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from backends.upstream import Upstream
from gateway.errors import GatewayError
from gateway.verdict import Again, Verdict
from gateway.watch.witness import Witness
from routing.types import Replica

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How often a request is sent or a connection waited for in vain. Replicas that are not even there do not count."""


class Attempts:
    """What has become of a request so far. `close` it at its end.

    A replica that answered with a failure is not blamed before another one has tried: when that one fails in the same
    way, it is the request (a template that cannot take it, a defect that it touches), and neither is blamed. Else one
    client could have half of a pool ejected with a handful of such requests.
    """

    __slots__ = ("_held", "_pool", "_stale", "_witness", "_worked_on", "counted", "error", "tried")

    def __init__(self, pool: Sequence[Replica], witness: Witness) -> None:
        self._pool = pool
        self._witness = witness
        self.tried: list[Replica] = []
        self.counted = 0
        self.error: GatewayError | None = None
        """What the client gets when nothing else is left."""
        self._worked_on = False
        self._stale = False
        self._held: tuple[Replica, Verdict] | None = None

    def goes_on(self, upstream: Upstream, verdict: Verdict, *, in_panic: bool) -> bool:
        """Take note of a failed attempt; whether there may be another. `in_panic`: no replica looked well."""
        replica = upstream.replica
        again = verdict.again
        if verdict.answered and self._held is None:
            self._held = (replica, verdict)
        elif verdict.answered:
            self._held = None
            logger.info("a request failed at two replicas, %s the second; it is blamed, and they are not", replica.name)
        else:
            self._witness.failed(replica, self._pool, verdict)
        if self.error is None or again is not Again.UNCOUNTED or verdict.cause is not None:
            self.error = verdict.error  # what one engine has no words for is no reason to hide that another is busy
        if again is Again.ANYWHERE:
            if self._stale:  # one kept-alive connection may die under a request; two are no coincidence
                again = Again.NEVER if upstream.hosted else Again.ONCE
            self._stale = True
            upstream.pool.drop_idle()  # they are as old as that one
        # Of a fleet that looks dead as a whole, not every replica is knocked at for every request.
        self.counted += again is not Again.UNCOUNTED or in_panic
        if again is Again.NEVER or (self._worked_on and again is Again.ONCE):
            return False
        self._worked_on |= again is Again.ONCE
        if again is not Again.ANYWHERE:
            self.tried.append(replica)
        return True

    def close(self) -> None:
        """Blame whoever is left to be blamed."""
        if self._held is not None:
            replica, verdict = self._held
            self._held = None
            self._witness.failed(replica, self._pool, verdict)
