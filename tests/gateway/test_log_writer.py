"""The thread that writes log lines: in order, bounded, and never waited for."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from gateway.log_writer import LineWriter
from gateway.logs import JsonLines, LineHandler, LogStyle, TextLines, about, style_of

WITHIN_S = 10.0


@contextmanager
def pipe(size_bytes: int = 4096) -> Iterator[tuple[int, int]]:
    """The reading and the writing end of a small pipe."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, size_bytes)
    try:
        yield reading, writing
    finally:
        for fd in (reading, writing):
            with suppress(OSError):
                os.close(fd)


def read_until(fd: int, end: bytes) -> bytes:
    """What comes, up to these bytes."""
    found, deadline = b"", time.monotonic() + WITHIN_S
    while end not in found and time.monotonic() < deadline:
        if select.select([fd], [], [], 0.1)[0]:
            found += os.read(fd, 65_536)
    return found


class Source:
    """Lines in batches."""

    def __init__(self, *batches: list[bytes]) -> None:
        self.batches = deque(batches)

    def lines(self) -> list[bytes]:
        return self.batches.popleft() if self.batches else []


def test_lines_are_written_in_their_order() -> None:
    with pipe() as (reading, writing):
        writer = LineWriter(writing)
        for number in range(100):
            writer.put(b"%d\n" % number)
        assert read_until(reading, b"99\n").split() == [b"%d" % number for number in range(100)]
        assert writer.flush(WITHIN_S)
        assert writer.lost == 0


def test_sources_are_asked_until_they_have_no_more() -> None:
    with pipe() as (reading, writing):
        writer = LineWriter(writing)
        writer.put(b"first\n")
        writer.follow(Source([b"a\n", b"b\n"], [b"c\n"]))
        assert writer.flush(WITHIN_S)
        assert read_until(reading, b"c\n").split() == [b"first", b"a", b"b", b"c"]


def test_a_full_pipe_is_waited_for_by_nobody_and_what_is_too_much_is_counted() -> None:
    with pipe() as (reading, writing):
        writer = LineWriter(writing, max_lines=50)
        line = b"x" * 99 + b"\n"
        began = time.monotonic()
        for _ in range(1000):
            writer.put(line)
        assert not writer.flush(0.05)
        assert time.monotonic() - began < WITHIN_S / 2
        lost = writer.lost
        assert lost > 700
        arrived = 0
        while arrived < (1000 - lost) * len(line):
            arrived += len(os.read(reading, 65_536))
        writer.put(b"again\n")
        assert read_until(reading, b"again\n").endswith(b"again\n")
        assert writer.lost == lost


def test_a_pipe_that_does_not_wait_loses_nothing() -> None:
    with pipe() as (reading, writing):
        os.set_blocking(writing, False)
        writer = LineWriter(writing)
        for number in range(500):
            writer.put(b"%099d\n" % number)
        found = read_until(reading, b"%099d\n" % 499).split()
        assert [int(line) for line in found] == list(range(500))
        assert writer.lost == 0


def test_a_reader_that_has_gone_costs_lines_and_nothing_else() -> None:
    with pipe() as (reading, writing):
        os.close(reading)
        writer = LineWriter(writing)
        for _ in range(3):
            writer.put(b"nobody\n")
        assert writer.flush(WITHIN_S)
        assert writer.lost == 3


def test_lines_of_several_writers_stay_whole() -> None:
    with pipe() as (reading, writing):
        writers = [LineWriter(writing) for _ in range(3)]

        def write(writer: LineWriter, letter: bytes) -> None:
            for _ in range(200):
                writer.put(letter * 700 + b"\n")

        threads = [threading.Thread(target=write, args=(each, bytes([65 + n]))) for n, each in enumerate(writers)]
        for thread in threads:
            thread.start()
        found = b""
        while found.count(b"\n") < 600:
            found += os.read(reading, 65_536)
        for thread in threads:
            thread.join()
    assert {line for line in found.split()} == {letter * 700 for letter in (b"A", b"B", b"C")}


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("tidegate", logging.WARNING, __file__, 1, message, (), None)
    made.__dict__.update(extra)
    return made


def test_a_line_about_a_request_has_its_id_as_a_field() -> None:
    said = json.loads(JsonLines().format(record("it fell back", **about("req_7"))))
    assert (said["request_id"], said["message"]) == ("req_7", "it fell back")
    assert "request_id" not in json.loads(JsonLines().format(record("something else")))


def test_a_handler_hands_lines_to_its_writer() -> None:
    with pipe() as (reading, writing):
        handler = LineHandler(LineWriter(writing), LogStyle(json=True, worker=2))
        handler.handle(record("h\u00e9 \ud800"))
        handler.flush()
        said = json.loads(read_until(reading, b"\n"))
        assert (said["message"], said["worker"]) == ("h\u00e9 \ud800", 2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("log_format", "stream", "environ", "expected"),
    [
        ("text", io.StringIO(), {}, (False, False)),
        ("text", Terminal(), {}, (False, True)),
        ("text", Terminal(), {"NO_COLOR": "1"}, (False, False)),
        ("text", Terminal(), {"NO_COLOR": ""}, (False, True)),
        ("text", Terminal(), {"TERM": "dumb"}, (False, False)),
        ("json", Terminal(), {}, (True, False)),
        ("auto", Terminal(), {}, (False, True)),
        ("auto", io.StringIO(), {}, (True, False)),
    ],
)
def test_colours_are_for_terminals_and_auto_is_text_there(
    log_format: str, stream: io.StringIO, environ: dict[str, str], expected: tuple[bool, bool]
) -> None:
    style = style_of(log_format, stream, environ)  # type: ignore[arg-type]
    assert (style.json, style.colour) == expected


def test_a_coloured_line_is_the_plain_one_in_a_colour() -> None:
    plain, coloured = TextLines(1).format(record("hello")), TextLines(1, colour=True).format(record("hello"))
    assert coloured.startswith("\x1b[33m")
    assert coloured.endswith(" WARNING tidegate[1]: hello\x1b[0m")
    assert plain.endswith(" WARNING tidegate[1]: hello")
