"""Classes: a request may lower its key's, and never raise it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.keys.records import PRIORITY_CLASSES
from gateway.limits.classes import BANDS, band_of, urgency, waits_long
from gateway.store.places import Band


@pytest.mark.parametrize(
    ("key_class", "tier", "header", "band"),
    [
        (None, None, None, Band.STANDARD),
        ("critical", None, None, Band.CRITICAL),
        ("sheddable", None, None, Band.SHEDDABLE),
        ("critical", "priority", None, Band.CRITICAL),
        ("standard", "priority", None, Band.STANDARD),
        ("critical", "default", None, Band.CRITICAL),
        ("batch", "auto", None, Band.BATCH),
        ("critical", "flex", None, Band.BATCH),
        ("sheddable", "flex", None, Band.SHEDDABLE),
        ("standard", "scale", None, Band.STANDARD),
        ("standard", 7, None, Band.STANDARD),
        ("standard", None, b"critical", Band.STANDARD),
        ("critical", None, b" Batch ", Band.BATCH),
        ("critical", "flex", b"sheddable", Band.SHEDDABLE),
        ("critical", "flex", b"standard", Band.BATCH),
        (None, None, b"sheddable", Band.SHEDDABLE),
    ],
)
def test_the_least_urgent_of_key_tier_and_header_counts(
    key_class: str | None, tier: object, header: bytes | None, band: Band
) -> None:
    assert band_of(key_class, tier, header) is band


@given(
    key_class=st.sampled_from(PRIORITY_CLASSES),
    tier=st.none() | st.text() | st.sampled_from(["priority", "flex", "auto"]),
    header=st.none() | st.sampled_from([name.encode() for name in PRIORITY_CLASSES]),
)
def test_nothing_a_request_says_makes_it_more_urgent(key_class: str, tier: str | None, header: bytes | None) -> None:
    assert band_of(key_class, tier, header) >= BANDS[key_class]


@pytest.mark.parametrize("header", [b"", b"urgent", b"standard,batch", b"\xff"])
def test_a_class_that_does_not_exist_is_refused(header: bytes) -> None:
    with pytest.raises(InvalidRequest, match="critical, standard, batch, sheddable") as caught:
        band_of("critical", None, header)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_header", "x-tidegate-class")


def test_names_of_classes_are_those_of_keys() -> None:
    assert tuple(BANDS) == PRIORITY_CLASSES


def test_flex_waits_and_nothing_else_does() -> None:
    assert waits_long("flex") is True
    assert [waits_long(tier) for tier in (None, "default", "priority", 5, ["flex"])] == [False] * 5


def test_more_urgent_classes_have_higher_numbers() -> None:
    assert [urgency(band) for band in Band] == [1, 0, -1, -2]
