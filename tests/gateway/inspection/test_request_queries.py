"""Which requests a query means, where a page begins, and what cannot be asked."""

from __future__ import annotations

import pytest

from gateway.errors import InvalidRequest
from gateway.inspection.query import Query, cursor, place, place_of, read_query
from gateway.record import Attempt, Exchange, Outcome


def exchange(**fields: object) -> Exchange:
    known: dict[str, object] = {
        "tenant": "acme",
        "key_id": "key_1",
        "model": "chat",
        "status": 200,
        "outcome": Outcome.COMPLETED,
        "finished_at": 12.5,
        "tries": (Attempt("pool", "eu-0", "cold", 10.0), Attempt("pool", "eu-1", "cold", 11.0)),
        **fields,
    }
    return Exchange("req_0a", "/v1/chat/completions", 10.0, 1000.0, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        ({}, True),
        ({"tenant": "acme", "key": "key_1", "model": "chat"}, True),
        ({"tenant": "globex"}, False),
        ({"key": "key_2"}, False),
        ({"model": "code"}, False),
        ({"model": "asked-for"}, True),
        ({"replica": "eu-0"}, True),
        ({"replica": "pool/eu-1"}, True),
        ({"replica": "other/eu-1"}, False),
        ({"replica": "eu-2"}, False),
        ({"outcome": "completed"}, True),
        ({"outcome": "timeout"}, False),
        ({"status": "200"}, True),
        ({"status": "2xx"}, True),
        ({"status": "5xx"}, False),
        ({"since": "1000", "until": "1001"}, True),
        ({"since": "1000.5"}, False),
        ({"until": "1000"}, False),
        ({"slower_than_ms": "2499"}, True),
        ({"slower_than_ms": "2500"}, False),
    ],
)
def test_a_settled_request_is_meant_or_not(asked: dict[str, str], right: bool) -> None:
    assert read_query(asked).matches(exchange(fallback_from="asked-for"), 99.0) is right


def test_one_under_way_is_as_old_as_it_is_now() -> None:
    query = read_query({"slower_than_ms": "5000"})
    under_way = exchange(finished_at=None, outcome=None)
    assert not query.matches(under_way, 15.0)
    assert query.matches(under_way, 15.1)


@pytest.mark.parametrize("asked", [{"outcome": "timeout"}, {"status": "503"}, {"live": "false"}, {"before": "1-req_1"}])
def test_what_only_settled_requests_have_leaves_out_those_under_way(asked: dict[str, str]) -> None:
    assert read_query({}).wants_live
    assert not read_query(asked).wants_live


@pytest.mark.parametrize(
    "asked",
    [
        {"colour": "red"},
        {"live": "yes"},
        {"outcome": "sunny"},
        {"status": "6xx"},
        {"status": "20"},
        {"since": "yesterday"},
        {"since": "nan"},
        {"until": "-1"},
        {"slower_than_ms": "inf"},
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "²"},
        {"before": "../etc"},
        {"tenant": "x" * 501},
    ],
)
def test_what_cannot_be_asked_names_the_parameter(asked: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_query(asked)
    assert raised.value.param == next(iter(asked))


def test_an_empty_field_of_a_form_asks_nothing() -> None:
    assert read_query({"tenant": "", "limit": ""}) == Query()


def test_a_cursor_is_a_place_and_later_ones_come_before_it() -> None:
    first, later = exchange(), exchange(finished_at=12.500001)
    assert place_of(cursor(first)) == place(first) < place(later)
