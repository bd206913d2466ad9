"""Goes on elsewhere with an answer that broke off in the middle, where the model's settings allow it.

No request is carried from one replica that it has killed to the next: a leg that brings nothing before it dies ends the
answer, honestly. Replicas that only refuse (full, or not there) may be followed by others.
"""

from __future__ import annotations

import logging

from backends.dialects.protocol import Dialect, NotOffered
from gateway.body import Body
from gateway.bounds import bounding
from gateway.continuation import Continuation
from gateway.errors import GatewayError
from gateway.fleet import Pool
from gateway.leg import Leg
from gateway.order import Order
from gateway.sse import Observe
from gateway.verdict import Again, Verdict
from routing.health import Evidence
from routing.types import Replica

logger = logging.getLogger(__name__)

_BROKEN = frozenset({Evidence.FAILED, Evidence.STALLED, Evidence.OVERLOADED})
"""What a replica shows that breaks off an answer; anything else is the client's, or this gateway's own end."""
_UNTOUCHED = frozenset({Again.UNCOUNTED, Again.SAFELY, Again.ANYWHERE})
"""Of a replica that did not begin to work on it."""


class Resumption:
    """What one request would need to be gone on with. Made for every stream of a model that has continuation on."""

    __slots__ = ("_bodies", "_bounded", "_fields", "_order", "_rival", "continuation", "error", "unable")

    def __init__(self, order: Order, bound: int | None) -> None:
        """`bound`: output tokens that the gateway lets it have, where it sets that itself."""
        self._order = order
        self._bounded = bound is not None
        self._fields = order.body.fields
        if bound is not None:
            self._fields = {**self._fields, **bounding(order.path, self._fields, bound, "")}
        self.continuation = self._new()
        self._rival: Continuation | None = None
        """That of the second of two attempts at once, which may yet become the answer."""
        self.error: GatewayError | None = None
        """Why the answer broke off the last time; None before it has."""
        self.unable: list[Replica] = []
        """Replicas that broke off, or whose engines cannot go on with a text."""
        self._bodies: dict[str, Body] = {}

    def _new(self) -> Continuation:
        order = self._order
        return Continuation.of(order.path, self._fields, order.expected_choices)

    def begin_leg(self, *, first: bool, rival: bool) -> Observe | None:
        """An attempt comes, the first one or another, perhaps beside the one under way: who is to look at its stream.

        Nobody, where the answer can never be gone on with.
        """
        if rival:
            self._rival = continuation = self._new()
        else:
            if not first and not self.begun:
                self.continuation = self._new()  # what an attempt without content has left there is nobody's
            continuation = self.continuation
        return None if continuation.refusal else continuation.observe

    def rival_won(self) -> None:
        """The second of two attempts is the answer."""
        if self._rival is not None:
            self.continuation, self._rival = self._rival, None

    def counting(self, dialect: Dialect, *, rival: bool) -> dict[str, bytes]:
        """Top-level values to send, so that the chunks of an attempt count their tokens."""
        continuation = self._rival if rival and self._rival is not None else self.continuation
        if self.begun or continuation.refusal:
            return {}  # when it has begun, they are in the body that `put` gives
        return continuation.counting(dialect)

    @property
    def begun(self) -> bool:
        """An answer has broken off, and is being gone on with."""
        return self.error is not None

    def goes_on(self, leg: Leg, verdict: Verdict, pool: Pool) -> str:
        """A leg has failed after the client had seen content: "" when another may go on, else why none can."""
        if not leg.passing:
            return "" if verdict.again in _UNTOUCHED or verdict.answered else "no_progress"
        if verdict.evidence not in _BROKEN:
            return "ended"
        if self._bounded and self.continuation.uncounted:
            return "uncounted"  # the bound is a limit's, which more tokens than were counted would pass
        refusal = self.continuation.cut()
        if refusal:
            return refusal
        self.error = verdict.error
        self._bodies = {}
        unable = {leg.replica, *self.unable}
        for replica, upstream in pool.upstreams.items():
            trims = upstream.info is not None and upstream.info.trims_text and self.continuation.ends_blank
            if upstream.hosted or trims or not self._can(upstream.dialect):
                unable.add(replica)
        self.unable = list(unable)
        return "" if self._bodies else "not_offered"

    def _can(self, dialect: Dialect) -> bool:
        if dialect.name not in self._bodies:
            try:
                self._bodies[dialect.name] = self.continuation.body(dialect)
            except NotOffered as error:
                logger.debug("%s cannot go on with an answer: %s", dialect.name, error)
        return dialect.name in self._bodies

    def put(self, dialect: Dialect) -> Body:
        """The body for the next leg, which is bounded by what is left."""
        return self._bodies[dialect.name]
