"""The pause of a key that is refused."""

from __future__ import annotations

from routing.credential import Credential
from routing.types import Replica


def test_a_401_pauses_at_once_and_ever_longer() -> None:
    credential = Credential()
    lengths = []
    for _ in range(6):
        now = credential.until
        assert credential.refused(now)
        lengths.append(credential.until - now)
    assert lengths == [30.0, 60.0, 120.0, 240.0, 300.0, 300.0]


def test_refusals_during_the_pause_do_not_lengthen_it() -> None:
    credential = Credential()
    credential.refused(0.0)
    assert not credential.refused(29.9)
    assert credential.unavailable_reason(29.9) == "credential_refused"
    assert credential.unavailable_reason(30.0) is None


def test_one_403_is_about_the_request_and_three_in_a_row_about_the_key() -> None:
    credential = Credential()
    assert not credential.refused(0.0, 403)
    assert not credential.refused(1.0, 403)
    credential.accepted()
    assert not credential.refused(2.0, 403)
    assert not credential.refused(3.0, 403)
    assert credential.refused(4.0, 403)
    assert credential.until == 34.0
    assert credential.refused(34.0, 403)
    assert credential.until == 94.0


def test_one_403_after_a_pause_is_about_the_request_again() -> None:
    credential = Credential()
    credential.refused(0.0, 401)
    assert not credential.refused(30.0, 403)
    assert credential.unavailable_reason(30.0) is None


def test_an_accepted_request_ends_the_pause_and_forgets_all() -> None:
    credential = Credential()
    credential.refused(0.0)
    credential.refused(30.0)
    credential.accepted()
    assert credential.unavailable_reason(31.0) is None
    credential.refused(100.0)
    assert credential.until == 130.0


def test_replicas_with_the_same_key_pause_together_and_their_health_is_untouched() -> None:
    credential = Credential()
    first, second = (Replica(name, "p", "http://x", "openai", credential=credential) for name in "ab")
    other = Replica("c", "p", "http://x", "openai", credential=Credential())
    credential.refused(0.0)
    assert [each.unavailable_reason(1.0) for each in (first, second, other)] == ["credential_refused"] * 2 + [None]
    assert [each.health.state(1.0) for each in (first, second)] == ["healthy", "healthy"]
