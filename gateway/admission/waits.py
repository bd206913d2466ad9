"""How long a request may stand in line, and how long the next one would."""

from __future__ import annotations

from gateway.config.limits import Queue
from gateway.order import Order
from gateway.store.places import Band

SHARE_OF_DEADLINE = 0.25
"""What is waited for of the time there is; the rest is for the answer."""


def longest_wait_s(order: Order, queue: Queue, ttft_s: float, spent_s: float) -> float:
    """Seconds in line, at most: what is left of the deadline after `spent_s` and a usual time to first token, a quarter
    of the deadline, and the pool's `max_wait_s`, whichever is least. Flexible requests (`service_tier: flex`) wait as
    long as the first allows.

    The deadline is the header's, else the key's, and never later than the model's `total_s`. Of a request without
    streaming the client's own read time-out counts as well, since nothing reaches it before the answer is whole; a
    stream is kept open by heartbeats.
    """
    deadline_s = _deadline_s(order)
    left_s = max(0.0, deadline_s - spent_s - ttft_s)
    if order.flexible:
        return left_s
    return min(left_s, max(0.0, deadline_s * SHARE_OF_DEADLINE - spent_s), queue.max_wait_s)


START_WAIT_S = 300.0
"""For the first replica of a pool, where its settings name no time: most models are loaded by then."""


def longest_start_wait_s(order: Order, queue: Queue, ttft_s: float, spent_s: float) -> float:
    """The same for a pool that has no replica yet: as long as `start_wait_s` allows, and what is left of the deadline
    after `spent_s` and a usual time to first token. Flexible requests wait as long as the last allows."""
    left_s = max(0.0, _deadline_s(order) - spent_s - ttft_s)
    if order.flexible:
        return left_s
    return min(left_s, START_WAIT_S if queue.start_wait_s is None else queue.start_wait_s)


def _deadline_s(order: Order) -> float:
    """What whoever asked allows, from the first byte to the last."""
    if order.read_timeout_s is not None and not order.request.stream:
        return min(order.total_s, order.read_timeout_s)
    return order.total_s


class ToldWaits:
    """What the lines have said last of how long a request would wait, by pool and class. One worker's."""

    __slots__ = ("_told",)

    def __init__(self) -> None:
        self._told: dict[tuple[str, Band], tuple[float, float]] = {}

    def note(self, pool: str, band: Band, wait_s: float, now: float) -> None:
        """A request was told this wait when it came; 0 when it had its place at once. `now`: monotonic seconds."""
        self._told[pool, band] = (wait_s, now)

    def expected_s(self, pool: str, band: Band, now: float) -> float:
        """What the next one would be told, if nobody has come since: a line gets shorter by a second a second."""
        told = self._told.get((pool, band))
        return 0.0 if told is None else max(0.0, told[0] - (now - told[1]))
