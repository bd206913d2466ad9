"""When the breaker opens, by counts alone."""

from __future__ import annotations

from gateway.store.redis.breaker import AT_LEAST, WINDOW_S, Breaker


def test_five_failures_in_a_row_open_it() -> None:
    breaker = Breaker()
    assert not breaker.failed(4, 0.0)
    assert breaker.failed(1, 60.0)
    assert breaker.open
    assert not breaker.failed(1, 60.0)  # it is open already


def test_a_success_ends_the_row() -> None:
    breaker = Breaker()
    for now in range(100):
        assert not breaker.failed(4, now * 10.0)
        breaker.succeeded(1, now * 10.0)


def test_more_than_half_of_twenty_within_two_seconds_open_it() -> None:
    breaker = Breaker()
    for number in range(AT_LEAST // 2 - 1):
        assert not breaker.failed(1, number * 0.1)
        breaker.succeeded(1, number * 0.1)
    assert not breaker.failed(1, 1.0)  # 10 of 19
    breaker.succeeded(1, 1.0)  # 10 of 20 are not more than half
    assert breaker.failed(1, 1.0)


def test_old_calls_do_not_count() -> None:
    breaker = Breaker()
    for now in (0.0, WINDOW_S, 2 * WINDOW_S):
        for _ in range(4):
            assert not breaker.failed(2, now)
            breaker.succeeded(1, now)


def test_many_successes_outweigh_failures_but_not_a_row() -> None:
    breaker = Breaker()
    breaker.succeeded(1000, 0.0)
    assert not breaker.failed(4, 0.1)
    assert breaker.failed(1, 0.1)


def test_what_comes_in_while_it_is_open_does_not_close_it() -> None:
    breaker = Breaker()
    assert breaker.failed(5, 0.0)
    breaker.succeeded(100, 0.1)
    assert (breaker.open, breaker.failed(5, 0.2)) == (True, False)
    breaker.close()
    assert not breaker.failed(4, 0.3)
    assert breaker.failed(1, 0.3)
