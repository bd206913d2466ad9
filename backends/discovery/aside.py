"""Questions that block (name servers, disks), asked off the event loop: one at a time, however long it takes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Answer = TypeVar("_Answer")


class Aside(Generic[_Answer]):
    """Asks in a thread of its own. A question that hangs is waited for again, and no second one is put beside it: what
    hangs for hours costs one thread, not one for each time that somebody lost patience. (`asyncio.to_thread` would fill
    its few threads, and then keep the process from ending.)"""

    def __init__(self, name: str) -> None:
        """`name`: of the threads."""
        self._name = name
        self._under_way: asyncio.Future[_Answer] | None = None

    async def ask(self, question: Callable[[], _Answer], within_s: float) -> _Answer:
        """Its answer, or that of the question still under way. Raises what it raises, and `TimeoutError`."""
        waiting = self._under_way or self._start(question)
        async with asyncio.timeout(within_s):
            return await asyncio.shield(waiting)

    def _start(self, question: Callable[[], _Answer]) -> asyncio.Future[_Answer]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Answer] = loop.create_future()
        future.add_done_callback(_seen)

        def answered(result: _Answer | None, error: Exception | None) -> None:
            self._under_way = None
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]  # of a question without error it is one
            else:
                future.set_exception(error)

        def run() -> None:
            result, problem = None, None
            try:
                result = question()
            except Exception as error:
                problem = error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(answered, result, problem)

        # A daemon, so that a name server that is silent does not hold up the exit.
        asking = threading.Thread(target=run, name=self._name, daemon=True)
        try:
            asking.start()
        except RuntimeError as error:
            raise OSError("no thread can be started to ask in") from error
        self._under_way = future
        return future


def _seen(future: asyncio.Future[_Answer]) -> None:
    """Nobody may be waiting any more for a question that fails, which asyncio would complain about."""
    if not future.cancelled():
        future.exception()
