"""One process of the hammer: reads jobs from standard input, answers each with what exactly happened.

``python -m loadtests.hammer_worker FOLDER`` says ``ready``, then a line for each line: the file that has the answer.
Answers are megabytes long, and a file is either there or not. It ends when its standard input does,
in the middle of a job too: whoever started it may die in any way and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from loadtests.hammer_jobs import Job, LimitJob, PlaceJob, Result

LATE_S = 15.0
"""After the end that a job was given. Whoever waits for the answer gives up later than this, and reads then why."""


async def work(job: Job) -> Result:
    # Imported here, so that a broken half of the store does not keep the other from being hammered.
    if isinstance(job, PlaceJob):
        from loadtests.hammer_places import hammer_places

        return await hammer_places(job)
    from loadtests.hammer_limits import hammer_limits

    assert isinstance(job, LimitJob)
    return await hammer_limits(job)


async def work_or_say(job: Job) -> Result:
    """The same; a job that does not end says on standard error where each of its tasks is."""
    left_s = max(0.0, job.begin_at_s - time.monotonic()) + job.seconds
    timer = asyncio.get_running_loop().call_later(left_s + LATE_S, _say_what_is_left)
    try:
        return await work(job)
    finally:
        timer.cancel()


def _say_what_is_left() -> None:
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    sys.stderr.flush()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _read(jobs: queue.Queue[bytes]) -> None:
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)


def main() -> None:
    jobs: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    factory = _loop_factory()
    for number in itertools.count():
        job: Job = msgspec.json.decode(jobs.get(), type=Job)
        with asyncio.Runner(loop_factory=factory) as runner:
            result = runner.run(work_or_say(job))
        file = Path(sys.argv[1], f"{os.getpid()}-{number}.json")
        file.write_bytes(msgspec.json.encode(result))
        out.write(bytes(file) + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
