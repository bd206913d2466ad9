"""What a log line looks like: one line of text or one JSON object, on standard error.

A thread writes the lines (`gateway.log_writer`), so that nobody waits for whoever reads standard error.

Exceptions are shown as their type and where they came from, never with their text: that may quote a prompt, a header
or a URL with a credential in it. Errors of the operating system are the exception, their text is about files, sockets
and limits.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO

from gateway.log_writer import LineWriter

if TYPE_CHECKING:
    import asyncio

LogFormat = Literal["text", "json", "auto"]
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json", "auto")
LOG_LEVELS = ("debug", "info", "warning", "error")

_CHATTY = ("alembic", "uvicorn", "asyncio", "httpx2")
"""Libraries whose informational lines repeat what ours say."""


_LAST_LINES_S = 2.0
"""How long a process that ends waits for its last lines to be taken."""
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "31"}
"""Dim, green, yellow, red: of the terminal's own (ECMA-48, SGR)."""


@dataclass(frozen=True, slots=True)
class LogStyle:
    """How this process writes its log lines."""

    json: bool = False
    colour: bool = False
    worker: int | None = None
    """The process' index where there are several."""


def style_of(log_format: LogFormat, stream: TextIO, environ: Mapping[str, str], worker: int | None = None) -> LogStyle:
    """The style for this stream. Colours are for terminals alone, and not for those that want none
    (https://no-color.org)."""
    terminal = stream.isatty()
    as_json = log_format == "json" or (log_format == "auto" and not terminal)
    wanted = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    return LogStyle(as_json, terminal and wanted and not as_json, worker)


class LineHandler(logging.Handler):
    """Hands formatted records to the thread that writes them."""

    def __init__(self, writer: LineWriter, style: LogStyle) -> None:
        super().__init__()
        self.writer = writer
        self.style = style
        self.setFormatter(JsonLines(style.worker) if style.json else TextLines(style.worker, colour=style.colour))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.put(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Called by `logging.shutdown` at the end of the process."""
        self.writer.flush(_LAST_LINES_S)


def handler_in_use() -> LineHandler | None:
    """What `configure` has set up; None where logging was set up by somebody else."""
    return next((each for each in logging.getLogger().handlers if isinstance(each, LineHandler)), None)


def configure(log_format: LogFormat, level: str, worker: int | None = None) -> None:
    """Set up logging for this process; `worker` is its index where there are several."""
    style = style_of(log_format, sys.stderr, os.environ, worker)
    handler: logging.Handler
    try:
        handler = LineHandler(LineWriter(sys.stderr.fileno()), style)
    except (OSError, ValueError):  # it was replaced by something that is no file
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines(worker) if style.json else TextLines(worker))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def about(request_id: str) -> dict[str, str]:
    """`extra` of a line that is about one request: a field of its own where lines are JSON."""
    return {"request_id": request_id}


def painted(text: str, level: str) -> str:
    """The text in a level's colour, for a terminal."""
    return f"\x1b[{_COLOURS.get(level, '0')}m{text}\x1b[0m"


class TextLines(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO tidegate[1]: the message`; the number is the worker's."""

    def __init__(self, worker: int | None = None, *, colour: bool = False) -> None:
        number = "" if worker is None else f"[{worker}]"
        super().__init__(f"%(asctime)s %(levelname)s %(name)s{number}: %(message)s")
        self._colour = colour

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = _harmless(super().formatMessage(record))
        return painted(line, record.levelname.lower()) if self._colour else line

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
        request_id = getattr(record, "request_id", None)
        if request_id is not None:
            fields["request_id"] = request_id
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


def _harmless(text: str) -> str:
    """What a terminal would obey is shown instead; a line that goes on is indented, so that it passes for no other."""
    if text.isprintable():
        return text
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown.replace("\n", "\n  ")


def log_loop_problem(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler. The default one prints tasks and transports with all that they hold."""
    error = context.get("exception")
    logging.getLogger("asyncio").error("%s", context.get("message", "unhandled exception"), exc_info=error)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
