"""What became of a request when: its phases and attempts, in milliseconds since its first byte."""

from __future__ import annotations

from typing import Any

from gateway.record import Attempt, Exchange

READ, QUEUE, DECIDE, CONNECT, FIRST_TOKEN, ANSWER, STREAM, PAUSE, END = (
    "read",
    "queue",
    "decide",
    "connect",
    "first_token",
    "answer",
    "stream",
    "pause",
    "end",
)


def timeline(exchange: Exchange, now: float, queued_since: float | None = None) -> dict[str, Any]:
    """`phases` follow one another, those of a hedged pair excepted; the last one of a request under way has no end.

    `now` and `queued_since` (of one that stands in line at this moment) are monotonic seconds.

        read         its bytes came
        queue        it stood in line
        decide       understood, admitted, its prompt read; up to the choice of a replica
        connect      a connection was got, or an adapter loaded
        first_token  sent; the prompt is computed (`answer` instead, where the answer comes whole)
        stream       tokens come
        pause        between two attempts
        end          the last of it was written, and the record closed
    """
    start, over = exchange.started_at, exchange.finished_at

    def ms(at: float | None) -> float | None:
        return None if at is None else round((at - start) * 1000, 3)

    phases: list[dict[str, Any]] = []

    def phase(name: str, begun_at: float, ended_at: float | None, attempt: int | None = None) -> None:
        phases.append({"name": name, "start_ms": ms(begun_at), "end_ms": ms(ended_at), "attempt": attempt})

    read_at = max(exchange.read_at, start)
    phase(READ, start, read_at)
    ready_at = read_at
    queued_at = exchange.queued_at if queued_since is None else queued_since
    tries = exchange.tries
    early = queued_at is not None and (not tries or queued_at < tries[0].begun_at)
    if early and queued_at is not None:
        ready_at = queued_at if queued_since is not None else queued_at + exchange.queue_s
        phase(DECIDE, read_at, queued_at)
        phase(QUEUE, queued_at, None if queued_since is not None else ready_at)
    if queued_since is None or tries:
        phase(DECIDE, ready_at, tries[0].begun_at if tries else over)
    latest = ready_at
    for number, each in enumerate(tries):
        if number and each.begun_at > latest:
            phase(PAUSE, latest, each.begun_at)
        _phases_of(each, number, phase, stream=exchange.stream)
        latest = max(latest, each.ended_at or over or now)
    if tries and over is not None:
        phase(END, min(latest, over), over)
    elif tries and queued_since is None and tries[-1].ended_at is not None:
        phase(PAUSE, latest, None)
    return {
        "duration_ms": ms(over or now),
        "phases": phases,
        "attempts": [
            {
                "pool": each.pool,
                "replica": each.replica,
                "reason": each.reason,
                "code": each.code or None,
                "begun_ms": ms(each.begun_at),
                "connected_ms": ms(each.connected_at),
                "sent_ms": ms(each.sent_at),
                "first_content_ms": ms(each.first_content_at),
                "ended_ms": ms(each.ended_at),
            }
            for each in tries
        ],
    }


def _phases_of(attempt: Attempt, number: int, phase: Any, *, stream: bool) -> None:
    ended_at, sent_at, came_at = attempt.ended_at, attempt.sent_at, attempt.first_content_at
    phase(CONNECT, attempt.begun_at, sent_at or ended_at, number)
    if sent_at is None:
        return
    phase(FIRST_TOKEN if stream else ANSWER, sent_at, came_at or ended_at, number)
    if came_at is not None:
        phase(STREAM, came_at, ended_at, number)
