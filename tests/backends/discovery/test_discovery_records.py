"""Properties of names, and of the choice among SRV records."""

from __future__ import annotations

import ipaddress
import re

from hypothesis import given
from hypothesis import strategies as st

from backends.discovery.naming import name_of, url_of
from backends.discovery.records import Held, Srv, chosen, members_at, shares

_HOSTS = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.from_regex(r"[a-z0-9_]([a-z0-9_.-]{0,120}[a-z0-9_])?", fullmatch=True).filter(lambda text: ".." not in text),
)
_PORTS = st.integers(1, 65535)
_PLACES = st.dictionaries(st.tuples(_HOSTS, _PORTS), st.floats(0, 65535), max_size=20)
_RECORDS = st.lists(
    st.builds(
        Srv,
        target=st.sampled_from(["a.test", "A.test", "b.test", "c.test", ""]),
        port=st.integers(1, 3),
        priority=st.integers(0, 3),
        weight=st.integers(0, 65535),
    ),
    max_size=20,
)


@given(st.sets(st.tuples(st.ip_addresses().map(str), _PORTS), max_size=30), st.sampled_from(["", "chat", "x" * 63]))
def test_different_addresses_have_different_names_that_a_configuration_takes(
    places: set[tuple[str, int]], pool: str
) -> None:
    names = [name_of(pool, host, port) for host, port in places]
    assert len(set(names)) == len(places)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name) for name in names)


@given(_HOSTS, _PORTS, st.sampled_from(["", "chat", "x" * 63]))
def test_every_host_makes_a_name_and_the_same_one_each_time(host: str, port: int, pool: str) -> None:
    name = name_of(pool, host, port)
    assert name == name_of(pool, host, port)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name)


@given(st.ip_addresses(v=6))
def test_all_spellings_of_an_ipv6_address_are_one_name(address: ipaddress.IPv6Address) -> None:
    assert name_of("p", address.compressed, 1) == name_of("p", address.exploded.upper(), 1)


@given(_PLACES)
def test_a_members_name_and_address_do_not_depend_on_the_others(places: dict[tuple[str, int], float]) -> None:
    together = {each.url: each.name for each in members_at("p", "http", places)}
    for (host, port), weight in places.items():
        (alone,) = members_at("p", "http", {(host, port): weight})
        assert together[url_of("http", host, port)] == alone.name


@given(_RECORDS, st.randoms())
def test_only_records_of_the_best_priority_are_chosen_once_and_in_one_order(records: list[Srv], rng: object) -> None:
    picked = chosen(records)
    there = [each for each in records if each.target]
    assert bool(picked) == bool(there)
    best = min((each.priority for each in there), default=0)
    keys = [(each.target.lower(), each.port) for each in picked]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {(each.target.lower(), each.port) for each in there if each.priority == best}
    shuffled = list(records)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    again = chosen(shuffled)
    assert [(each.target.lower(), each.port, each.weight) for each in again] == [
        (each.target.lower(), each.port, each.weight) for each in picked
    ]


@given(st.lists(st.integers(0, 65535), max_size=50))
def test_shares_are_usable_weights_whose_order_is_that_of_the_records(weights: list[int]) -> None:
    given_shares = shares(weights)
    if len(set(weights)) <= 1:
        assert given_shares == [None] * len(weights)
        return
    numbers = [each for each in given_shares if each is not None]
    assert len(numbers) == len(weights)
    assert all(0 < each <= 1000 for each in numbers)
    pairs = sorted(zip(weights, numbers, strict=True))
    assert [share for _, share in pairs] == sorted(numbers)
    assert sum(numbers) <= len(weights) * 1.02


@given(st.lists(st.booleans(), max_size=30))
def test_what_holds_ends_only_after_three_empty_answers_in_a_row(answers: list[bool]) -> None:
    held: Held[tuple[str, ...]] = Held()
    for index, there in enumerate(answers):
        now = held.take(("x",) if there else ())
        lately = answers[max(0, index - 2) : index + 1]
        ever = True in answers[: index + 1]
        gone = len(lately) == 3 and not any(lately)
        assert (now == ("x",)) == (ever and not gone)
