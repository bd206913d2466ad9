"""The pause of a key that is refused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from routing.credential import Credential, Credentials
from routing.filters import RATE_LIMITED, exclusion_reason
from routing.types import InferenceRequest, Replica


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
    credentials = Credentials([Credential()])
    first, second = (Replica(name, "p", "http://x", "openai", credential=credentials) for name in "ab")
    other = Replica("c", "p", "http://x", "openai", credential=Credentials([Credential()]))
    credentials.refused(0.0)
    assert [each.unavailable_reason(1.0) for each in (first, second, other)] == ["credential_refused"] * 2 + [None]
    assert [each.health.state(1.0) for each in (first, second)] == ["healthy", "healthy"]


def ring(count: int = 3) -> Credentials:
    return Credentials([Credential(position) for position in range(count)])


def place(key: Credential | None) -> int | None:
    return None if key is None else key.position


def test_one_key_is_used_until_it_is_refused_and_then_the_next_for_good() -> None:
    keys = ring()
    assert [place(keys.pick("m", now)) for now in (0.0, 1.0, 2.0)] == [0, 0, 0]
    keys.refused(2.0, 401, keys.keys[0])
    assert place(keys.pick("m", 3.0)) == 1
    assert place(keys.pick("m", 40.0)) == 1, "the first is good again, and the prompts are cached with the second"
    keys.refused(40.0, 401, keys.keys[1])
    assert place(keys.pick("m", 40.0)) == 2
    keys.refused(40.0, 401, keys.keys[2])
    assert place(keys.pick("m", 40.0)) == 0, "and round"


def test_all_refused_is_a_reason_of_the_replica_until_the_first_pause_ends() -> None:
    keys = ring(2)
    replica = Replica("r", "p", "http://x", "openai", credential=keys)
    keys.refused(0.0, 401, keys.keys[0])
    assert replica.unavailable_reason(1.0) is None
    keys.refused(5.0, 402, keys.keys[1])
    assert replica.unavailable_reason(6.0) == "credential_refused"
    assert keys.pick("m", 6.0) is None
    assert replica.unavailable_reason(30.0) is None
    assert place(keys.pick("m", 30.0)) == 0
    keys.refused(30.0, 401, keys.keys[0])
    assert replica.unavailable_reason(31.0) == "credential_refused"
    keys.accepted(keys.keys[1])
    assert replica.unavailable_reason(31.0) is None


def test_a_limited_key_is_passed_over_for_that_model_only() -> None:
    keys = ring(2)
    keys.keys[0].limits.begin("m", 10.0, 0.0)
    assert (place(keys.pick("m", 1.0)), place(keys.pick("other", 1.0))) == (1, 0)
    assert keys.limited_until("m", 1.0) == 0.0
    keys.keys[1].limits.begin("m", 4.0, 1.0)
    assert keys.pick("m", 2.0) is None
    assert keys.limited_until("m", 2.0) == 5.0
    assert place(keys.pick("m", 5.0)) == 1
    keys.keys[1].limits.begin("m", 50.0, 6.0)
    assert keys.limited_until("m", 7.0) == 10.0


def test_a_key_that_is_only_avoided_stays_the_one_for_others() -> None:
    keys = ring(2)
    assert place(keys.pick("m", 0.0, [keys.keys[0]])) == 1
    assert place(keys.pick("m", 0.0)) == 0


def test_limits_are_told_as_such_and_refused_keys_not_as_limits() -> None:
    keys = ring(2)
    replica = Replica("r", "p", "http://x", "openai", credential=keys, paused_until=100.0)
    request = InferenceRequest("1", "m", False, 1)
    assert exclusion_reason(request, replica, 0.0, ()) is None
    keys.keys[0].limits.begin("m", 50.0, 0.0)
    keys.refused(0.0, 401, keys.keys[1])
    assert exclusion_reason(request, replica, 1.0, ()) == RATE_LIMITED
    assert replica.limited_until("m", 1.0) == 50.0
    keys.refused(1.0, 401, keys.keys[0])
    assert exclusion_reason(request, replica, 2.0, ()) == "credential_refused"


def test_a_new_ring_keeps_what_is_known_of_its_old_keys() -> None:
    old = ring(2)
    old.refused(0.0, 401, old.keys[0])
    assert place(old.pick("m", 1.0)) == 1
    new = old.carry([Credential(), old.keys[1], old.keys[0]])
    assert new.pick("m", 40.0) is old.keys[1]
    assert not new.keys[2].usable("m", 1.0)
    assert old.carry([Credential()]).pick("m", 40.0) is not old.keys[1]


@given(
    st.integers(1, 5),
    st.lists(
        st.tuples(
            st.sampled_from(["refused", "forbidden", "limited", "accepted", "pick"]),
            st.integers(0, 4),
            st.sampled_from("mn"),
            st.floats(0.0, 40.0),
        ),
        max_size=80,
    ),
)
def test_a_key_is_picked_exactly_when_one_is_usable(count: int, steps: list[tuple[str, int, str, float]]) -> None:
    keys = ring(count)
    now = 1.0
    for what, number, model, after_s in steps:
        now += after_s
        key = keys.keys[number % count]
        match what:
            case "refused":
                keys.refused(now, 401, key)
            case "forbidden":
                keys.refused(now, 403, key)
            case "limited":
                key.limits.begin(model, after_s, now)
            case "accepted":
                keys.accepted(key)
        before = keys.chosen(model)
        picked = keys.pick(model, now)
        assert (picked is None) == (not any(each.usable(model, now) for each in keys.keys))
        assert (now < keys.until) == all(now < each.until for each in keys.keys)
        if picked is None:
            assert now < keys.until or keys.limited_until(model, now) > now
        else:
            assert picked.usable(model, now)
            assert picked is before or not before.usable(model, now), "a usable key is never left"
            assert keys.limited_until(model, now) == 0.0
