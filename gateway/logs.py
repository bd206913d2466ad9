"""What a log line looks like: one line of text or one JSON object, on standard error.

Exceptions are shown as their type and where they came from, never with their text: that may quote a prompt, a header
or a URL with a credential in it. Errors of the operating system are the exception, their text is about files, sockets
and limits.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import asyncio

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")

_CHATTY = ("alembic", "uvicorn", "asyncio", "httpx2")
"""Libraries whose informational lines repeat what ours say."""


def configure(log_format: LogFormat, level: str, worker: int | None = None) -> None:
    """Set up logging for this process; `worker` is its index where there are several."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(worker) if log_format == "json" else TextLines(worker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class TextLines(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO tidegate[1]: the message`; the number is the worker's."""

    def __init__(self, worker: int | None = None) -> None:
        number = "" if worker is None else f"[{worker}]"
        super().__init__(f"%(asctime)s %(levelname)s %(name)s{number}: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _time(record)

    def formatException(self, ei: Any) -> str:
        return describe_exception(ei[1])


class JsonLines(logging.Formatter):
    """One JSON object a line, whatever is in the message."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._worker,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info is not None and record.exc_info[1] is not None:
            fields["exception"] = describe_exception(record.exc_info[1])
        return json.dumps(fields, ensure_ascii=False)


def describe_exception(error: BaseException | None) -> str:
    """The exception, what caused it, and the lines of code they passed, without anything they quote."""
    lines: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = f": {error.strerror or error}" if isinstance(error, OSError) else ""
        lines.append(f"{'caused by ' if lines else ''}{type(error).__qualname__}{text}")
        frames = traceback.extract_tb(error.__traceback__)
        lines += [f"  at {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(lines)


def log_loop_problem(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler. The default one prints tasks and transports with all that they hold."""
    error = context.get("exception")
    logging.getLogger("asyncio").error("%s", context.get("message", "unhandled exception"), exc_info=error)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
