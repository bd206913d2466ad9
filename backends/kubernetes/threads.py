"""Running what blocks, the official client, in a thread that ends when it is told to.

Not an executor: its threads cannot be told to end, and the interpreter waits for them when it exits.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

GRACE_S = 2.0
"""Seconds for a thread to end after it was told to. One that is just connecting, or looking up a name, may take
longer, as long as its connect time-out; it ends then, and holds nothing up meanwhile."""

NAME = "tidegate-kubernetes"


async def blocking(work: Callable[[], T], give_up: Callable[[], None], limit_s: float | None = None) -> T:
    """Run `work` in a thread of its own and return what it returns.

    When the caller is cancelled, or `limit_s` seconds are over (`TimeoutError`), `give_up` is called, which must
    make `work` end soon; the thread is waited for before the exception goes on.
    """
    future = _start(work)
    try:
        async with asyncio.timeout(limit_s):
            return await asyncio.shield(future)
    except (asyncio.CancelledError, TimeoutError):
        future.add_done_callback(_retrieve)
        give_up()
        await asyncio.wait({future}, timeout=GRACE_S)
        raise


def _start(work: Callable[[], T]) -> asyncio.Future[T]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T) -> None:
        if not future.done():
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    def body() -> None:
        try:
            result = work()
        except BaseException as error:  # it is the caller's: raised where the future is awaited
            _post(loop, functools.partial(fail, error))
        else:
            _post(loop, functools.partial(finish, result))

    threading.Thread(target=body, name=NAME, daemon=True).start()
    return future


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():  # closed: nobody waits any more
            raise


def _retrieve(future: asyncio.Future[T]) -> None:
    """Look at the outcome that nobody wants, or asyncio complains that nobody did."""
    if not future.cancelled():
        future.exception()
