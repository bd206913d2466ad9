"""Server-sent events taken apart, whatever the chunking."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.sse import EventSplitter, EventTooLarge

STREAM = b'\xef\xbb\xbfdata: {"a":1}\n\n: ping\n\nevent: x\ndata: one\ndata: two\n\ndata: [DONE]\n\n'
EVENTS = [(b"", b'{"a":1}'), (b"x", b"one\ntwo"), (b"", b"[DONE]")]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@given(data=st.data())
def test_any_chunking_gives_the_same_events(line_end: bytes, data: st.DataObject) -> None:
    stream = STREAM.replace(b"\n", line_end)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    splitter = EventSplitter()
    found: list[tuple[bytes, bytes]] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += splitter.feed(stream[begin:end])
    assert found == EVENTS


@pytest.mark.parametrize("pieces", [[b"data: " + b"x" * 100 + b"\n\n"], [b"data: ", b"x" * 100]])
def test_an_event_beyond_the_limit_is_refused(pieces: list[bytes]) -> None:
    splitter = EventSplitter(max_event_bytes=50)
    with pytest.raises(EventTooLarge):
        _ = [splitter.feed(piece) for piece in pieces]


def test_many_small_events_in_one_read_are_not_one_large_one() -> None:
    assert len(EventSplitter(max_event_bytes=50).feed(b"data: abc\n\n" * 100)) == 100
