"""Sessions and the throttle of logins, as plain objects with a clock of the test's."""

from __future__ import annotations

import asyncio

import pytest

from gateway.admin.guard import session_id
from gateway.admin.sessions import COOKIE, MAX_SESSIONS, Sessions, cookie, no_cookie
from gateway.admin.throttle import MAX_ADDRESSES, OVERALL_BURST, PER_ADDRESS_BURST, Throttle
from gateway.config.operators import Sessions as Settings
from gateway.policy import Who


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sessions(**settings: float) -> tuple[Sessions, Clock]:
    clock, chosen = Clock(), Settings(**settings)  # type: ignore[arg-type]
    return Sessions(lambda: chosen, clock), clock


async def test_an_id_has_256_bits_and_is_kept_as_a_digest_only() -> None:
    known, _ = sessions()
    ids = {known.open("jo", Who.READER)[0] for _ in range(10)}
    assert len(ids) == 10
    assert all(len(id) == 43 for id in ids)
    for session in known:
        assert len(session.key) == 32
        assert not any(id.encode() in session.key for id in ids)
    assert known.find("x" * 43) is None
    assert known.find("ü" * 43) is None
    known.end_all()


async def test_a_session_ends_eight_hours_after_it_began_however_busy_it_is() -> None:
    known, clock = sessions()
    id, session = known.open("jo", Who.OWNER)
    for _ in range(48):
        clock.now += 599
        assert known.find(id) is session
    clock.now = 1000.0 + 8 * 3600
    assert known.find(id) is None
    assert session.ended.is_set()
    assert len(known) == 0


async def test_a_session_that_is_not_used_ends_before() -> None:
    known, clock = sessions(idle_s=60)
    id, session = known.open("jo", Who.OWNER)
    clock.now += 59
    assert known.find(id) is session
    clock.now += 59
    assert known.find(id) is session
    clock.now += 60
    assert known.find(id) is None
    assert session.ended.is_set()


async def test_what_waits_for_the_end_hears_of_it_though_nobody_asks() -> None:
    """The loop's own clock: the timer has to be armed again where the session was used in between."""
    chosen = Settings.model_construct(lifetime_s=3600.0, idle_s=1.0, max_per_name=20)
    known = Sessions(lambda: chosen)
    id, session = known.open("jo", Who.OWNER)
    begin = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(session.ended.wait(), 0.3)
    assert known.find(id) is session
    async with asyncio.timeout(10):
        await session.ended.wait()
    assert asyncio.get_running_loop().time() - begin >= 1.2
    assert len(known) == 0


async def test_the_least_recently_used_session_of_a_name_makes_room_and_no_other() -> None:
    known, clock = sessions(max_per_name=2)
    other, _ = known.open("other", Who.OWNER)
    first, _ = known.open("jo", Who.READER)
    second, _ = known.open("jo", Who.READER)
    clock.now += 1
    known.find(first)
    third, _ = known.open("jo", Who.READER)
    assert known.find(second) is None
    assert all(known.find(id) for id in (other, first, third))
    for index in range(MAX_SESSIONS + 5):
        known.open(f"oidc:{index}", Who.READER)
    assert len(known) == MAX_SESSIONS
    assert known.end_all() == MAX_SESSIONS


async def test_ended_is_ended_for_whoever_has_a_copy() -> None:
    known, _ = sessions()
    id, session = known.open("jo", Who.OWNER)
    known.end(session)
    known.end(session)
    assert known.find(id) is None


def test_the_cookie_can_neither_be_read_by_scripts_nor_go_over_plain_http_nor_be_planted() -> None:
    parts = cookie("i" * 43, 28800).split("; ")
    assert parts[0] == "__Host-tidegate=" + "i" * 43
    assert set(parts[1:]) == {"Path=/", "Max-Age=28800", "Secure", "HttpOnly", "SameSite=Strict"}
    assert "Max-Age=0" in no_cookie()
    assert not any("domain" in part.lower() for part in parts)


@pytest.mark.parametrize(
    ("cookies", "found"),
    [
        ([b"__Host-tidegate=" + b"a" * 43], "a" * 43),
        ([b"x=1; __Host-tidegate=" + b"a" * 43 + b"; y=2"], "a" * 43),
        ([b"x=1", b"__Host-tidegate=" + b"a" * 43], "a" * 43),
        ([b"__Host-tidegate=" + b"a" * 43 + b"; __Host-tidegate=" + b"b" * 43], None),
        ([b"__Host-tidegate=" + b"a" * 43, b"__Host-tidegate=" + b"a" * 43], None),
        ([b"__host-tidegate=" + b"a" * 43], None),
        ([b"tidegate=" + b"a" * 43], None),
        ([b"__Host-tidegate=" + b"a" * 42], None),
        ([b'__Host-tidegate="' + b"a" * 43 + b'"'], None),
        ([b"__Host-tidegate=" + b"a" * 43 + b";" + b"x" * 9000], None),
        ([b"\xff\xfe"], None),
        ([], None),
    ],
)
def test_a_cookie_counts_when_there_is_exactly_one_of_the_right_form(cookies: list[bytes], found: str | None) -> None:
    assert session_id(cookies, COOKIE) == found


# -- the throttle


def test_an_address_that_fails_too_often_waits_and_others_do_not() -> None:
    throttle = Throttle(0.0)
    for _ in range(int(PER_ADDRESS_BURST)):
        assert throttle.wait_s("10.0.0.1", 0.0) == 0
        throttle.failed("10.0.0.1", 0.0)
    assert throttle.wait_s("10.0.0.1", 0.0) == pytest.approx(12.0)
    assert throttle.wait_s("10.0.0.2", 0.0) == 0
    assert throttle.wait_s("10.0.0.1", 11.9) > 0
    assert throttle.wait_s("10.0.0.1", 12.0) == pytest.approx(0.0)


def test_an_address_of_ipv6_is_its_network() -> None:
    throttle = Throttle(0.0)
    for index in range(int(PER_ADDRESS_BURST)):
        throttle.failed(f"2001:db8::{index:x}", 0.0)
    assert throttle.wait_s("2001:db8::ffff", 0.0) > 0
    assert throttle.wait_s("2001:db8:0:1::1", 0.0) == 0


def test_many_addresses_together_are_bounded_in_tries_and_in_memory() -> None:
    throttle = Throttle(0.0)
    for index in range(MAX_ADDRESSES + 100):
        throttle.failed(f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}", 0.0)
    assert len(throttle) == MAX_ADDRESSES
    assert throttle.wait_s("192.0.2.1", 0.0) == pytest.approx(2.0)
    assert throttle.wait_s("192.0.2.1", 2.0) == pytest.approx(0.0)
    throttle.failed("192.0.2.1", 1000.0)
    assert throttle._overall.tokens == OVERALL_BURST - 1
