"""The soak's books find what does not agree, each kind of it; and its slope finds a leak."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from loadtests.served_log import Line
from loadtests.soak import Footprint, Plan, Result, residue, too_steep
from loadtests.soak_books import Books, Slope, slope
from loadtests.soak_traffic import Seen, state_of_stream, state_of_whole


def test_a_slope_is_found_in_noise_and_says_how_sure_it_is() -> None:
    rng = Random(1)
    flat = slope([(second, 200 + rng.gauss(0, 0.5)) for second in range(600)])
    assert abs(flat.mb_per_hour) <= flat.error_mb_per_hour < 3
    leak = slope([(second, 200 + second * 30 / 3600 + rng.gauss(0, 0.5)) for second in range(600)])
    assert leak.mb_per_hour - leak.error_mb_per_hour > 20
    with pytest.raises(ValueError, match="too few"):
        slope([(0.0, 1.0)] * 20)


RECORD: dict[str, Any] = {
    "id": "a", "outcome": "completed", "error_code": None, "prompt_tokens": 7, "completion_tokens": 5,
    "usage_estimated": False, "content_events": 5,
}  # fmt: skip
SEEN = Seen("stream", "completed", 200, "a", 7, 5)
LINE = Line("answered", "a", 1.0, 5, status=200)


def problems(**changed: Any) -> list[str]:
    """Of books in which one request succeeded, with something changed in them."""
    books = Books([SEEN], [RECORD], {"completed": 1.0}, 0.0, [LINE])
    for name, value in changed.items():
        setattr(books, name, value)
    books.audit()
    return books.problems


def test_books_that_agree() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"usage": [RECORD, RECORD]}, "twice"),
        ({"counted": {"completed": 2.0}}, "counted"),
        ({"counted": {"client_left": 1.0}}, "counted"),
        ({"usage": [{**RECORD, "outcome": "internal"}], "counted": {"internal": 1.0}}, "inside the gateway"),
        ({"usage": [{**RECORD, "outcome": "timeout"}], "counted": {"timeout": 1.0}}, "the log says timeout"),
        ({"usage": [{**RECORD, "completion_tokens": 6}]}, "charged"),
        ({"served": [Line("answered", "a", 1.0, 4, status=200)]}, "other tokens"),
        ({"served": []}, "other tokens"),
        ({"seen": [replace(SEEN, state="wrong")]}, "wrong"),
        ({"seen": [replace(SEEN, state="broken")]}, "broken"),
        ({"seen": []}, "more requests are on record"),
        ({"seen": [replace(SEEN, id="b", state="refused")], "refused": 0.0}, "were refused"),
    ],
)  # fmt: skip
def test_books_that_do_not(changed: dict[str, Any], said: str) -> None:
    assert said in " ".join(problems(**changed))


def test_who_leaves_may_be_on_record_or_not_and_is_counted() -> None:
    left = Seen("leaves", "left")
    books = Books([left, left], [{**RECORD, "outcome": "client_left"}], {"client_left": 1.0}, 0.0, [])
    assert books.audit()["vanished"] == 1
    assert books.problems == []


def test_what_clients_are_told() -> None:
    def stream(*datas: str) -> str:
        return state_of_stream("".join(f"data: {data}\n\n" for data in datas).encode(), Seen("", "broken"))

    finish = '{"choices":[{"finish_reason":"stop"}]}'
    assert stream(finish, "[DONE]") == "completed"
    assert stream('{"error":{}}') == "error_event"
    for wrong in ((), (finish,), ("[DONE]",), ('{"error":{}}', "[DONE]"), (finish, "[DONE]", "[DONE]")):
        assert stream(*wrong) == "wrong"
    assert (
        state_of_whole(200, b'{"choices":[{}],"usage":{"prompt_tokens":1,"completion_tokens":2}}', Seen("", "broken"))
        == "completed"
    )
    assert state_of_whole(503, b'{"error":{}}', SEEN) == "refused"
    assert state_of_whole(503, b"oh", SEEN) == state_of_whole(200, b"{", SEEN) == "wrong"


def test_what_is_left_over_is_named() -> None:
    rest = Footprint(40, 5, 30)
    good = Result(Plan(), rest, rest, Slope(0.5, 2.0), (100.0, 100.0), 0.0, 0, {}, {}, {}, {})
    assert residue(good) == []
    assert too_steep(good, 1.0) == ""
    bad = replace(
        good, after=Footprint(60, 20, 50), leases_left=2, gauges_left={"tidegate_in_flight": 1.0},
        killed={"longest_left_s": 45.0, "left": 3}, slope=Slope(9.0, 2.0),
    )  # fmt: skip
    assert len(residue(bad)) == 7
    assert "9.0 ± 2.0" in too_steep(bad, 1.0)
