"""Reading and writing `traceparent` and `tracestate`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry.context import (
    MAX_STATE_BYTES,
    Parent,
    TraceContext,
    new_span_id,
    new_trace_id,
    parent_in,
    parsed,
)

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01".encode()
READ = Parent(int(TRACE, 16), int(SPAN, 16), True)


@pytest.mark.parametrize(
    ("value", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{SPAN}-00".encode(), False),
        (f"00-{TRACE}-{SPAN}-02".encode(), False),
        (f"00-{TRACE}-{SPAN}-ff".encode(), True),
        (f"cc-{TRACE}-{SPAN}-01".encode(), True),
        (f"01-{TRACE}-{SPAN}-01-later".encode(), True),
        (b" " + GOOD + b"\t", True),
    ],
)
def test_what_is_well_formed_is_read_of_later_versions_too(value: bytes, sampled: bool) -> None:
    assert parsed(value) == Parent(READ.trace_id, READ.span_id, sampled)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        GOOD[:-1],
        GOOD + b"0",
        GOOD + b"-x",
        GOOD.upper(),
        GOOD.replace(b"-", b"_"),
        b"ff" + GOOD[2:],
        f"00-{'0' * 32}-{SPAN}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        f"cc-{TRACE}-{SPAN}-01later".encode(),
        GOOD + b"\n",
        b"\xff" * 55,
    ],
)
def test_what_is_malformed_is_none(value: bytes) -> None:
    assert parsed(value) is None


@given(st.binary(max_size=80))
def test_no_bytes_raise(value: bytes) -> None:
    parsed(value)
    parent_in([(b"traceparent", value), (b"tracestate", value)])


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_what_is_written_is_read_again(trace_id: int, span_id: int, sampled: bool) -> None:
    context = TraceContext(trace_id, 7, 0, sampled)
    ((name, value),) = context.headers(span_id, hosted=False)
    assert (name, len(value)) == (b"traceparent", 55)
    assert parsed(value) == Parent(trace_id, span_id, sampled)


def test_two_parents_are_none_and_states_are_one_list() -> None:
    assert parent_in([(b"traceparent", GOOD), (b"traceparent", GOOD)]) == (None, b"")
    assert parent_in([(b"tracestate", b"a=1")]) == (None, b"")
    states = [(b"tracestate", b"a=1"), (b"traceparent", GOOD), (b"tracestate", b"b=2")]
    assert parent_in(states) == (READ, b"a=1,b=2")


@pytest.mark.parametrize("state", [b"a=" + b"1" * MAX_STATE_BYTES, b"a=\xe4", b"a=\x00"])
def test_a_state_that_is_too_long_or_no_text_is_dropped_and_the_parent_is_not(state: bytes) -> None:
    assert parent_in([(b"traceparent", GOOD), (b"tracestate", state)]) == (READ, b"")


def test_who_is_told_is_a_matter_of_whose_server_it_is() -> None:
    told = {
        (own, hosted): [
            bool(TraceContext(1, 2, 0, True, own=own, hosted=hosted).headers(3, hosted=at)) for at in (False, True)
        ]
        for own in (True, False)
        for hosted in (True, False)
    }
    assert told == {
        (True, True): [True, True],
        (True, False): [True, False],
        (False, True): [False, True],
        (False, False): [False, False],
    }


def test_ids_have_their_bits_and_are_never_zero() -> None:
    assert max(new_trace_id() for _ in range(100)) >= 1 << 120
    assert max(new_span_id() for _ in range(100)) >= 1 << 56
    assert min(new_span_id() for _ in range(100)) > 0
