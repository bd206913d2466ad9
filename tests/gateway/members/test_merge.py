"""One pool's replicas from what several sources have found."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backends.discovery.member import Member
from gateway.config import load
from gateway.config.discovery import MemberDefaults
from gateway.config.load import read_all
from gateway.members.merge import DNS, FILE, KUBERNETES, ORDER, REGISTRATION, Known, name_of, placed

DEFAULTS = MemberDefaults(region="eu-west", weight=2.0)


def test_a_member_becomes_an_entry_with_the_pools_defaults_where_it_says_nothing_itself() -> None:
    (one, other) = placed(
        "chat",
        DEFAULTS,
        {DNS: [Member(url="http://10.0.0.5:30000/v1"), Member(url="http://b:1", region="us", weight=0.5)]},
    )
    assert one.entry == {
        "name": "chat-10.0.0.5-30000",
        "url": "http://10.0.0.5:30000",
        "region": "eu-west",
        "weight": 2.0,
    }
    assert other.entry is not None
    assert (other.entry["region"], other.entry["weight"]) == ("us", 0.5)


def test_one_address_is_one_replica_and_the_source_that_knows_best_tells_of_it() -> None:
    same = "http://10.0.0.5:30000"
    found = {
        DNS: [Member(url=same)],
        KUBERNETES: [Member(url=same, name="pod-a")],
        REGISTRATION: [Member(url=same + "/", name="r1", weight=3.0)],
    }
    several = placed("chat", MemberDefaults(), found)
    assert [(each.source, each.entry is not None) for each in several] == [
        (REGISTRATION, True),
        (KUBERNETES, False),
        (DNS, False),
    ]
    assert several[1].refused == "r1 (registration) has the same address"


def test_a_member_that_one_source_knows_to_be_going_is_going() -> None:
    same = "http://10.0.0.5:30000"
    found = {REGISTRATION: [Member(url=same, name="a")], KUBERNETES: [Member(url=same, name="a", state="draining")]}
    first, second = placed("chat", MemberDefaults(), found)
    assert (first.member.state, first.entry is not None, bool(second.refused)) == ("draining", True, True)


def test_ranks_of_one_address_are_replicas_of_their_own() -> None:
    several = placed("p", MemberDefaults(), {FILE: [Member(url="http://a:1", dp_rank=rank) for rank in (0, 1)]})
    assert [each.name for each in several if each.entry] == ["p-a-1-dp0", "p-a-1-dp1"]


def test_a_member_that_cannot_be_a_replica_is_refused_alone_and_says_why() -> None:
    several = placed(
        "p",
        MemberDefaults(),
        {FILE: [Member(url="ftp://a"), Member(url="http://b:1"), Member(url="http://c:1", weight=-1.0, name="c")]},
    )
    refused = {each.member.url: each.refused for each in several if each.refused}
    assert "not an http" in refused["ftp://a"]
    assert refused["http://c:1"].startswith("weight")
    assert [each.name for each in several if each.entry] == ["p-b-1"]


def test_a_starting_member_is_no_replica_yet_and_is_not_refused() -> None:
    (one,) = placed("p", MemberDefaults(), {REGISTRATION: [Member(url="http://a:1", name="x", state="starting")]})
    assert (one.entry, one.refused, one.place) == (None, "", None)


@given(
    st.dictionaries(
        st.sampled_from(ORDER),
        st.lists(
            st.builds(
                lambda host, port, name: Member(url=f"http://{host}:{port}", name=name),
                st.sampled_from(["a", "b.example", "10.0.0.1", "[::1]"]),
                st.integers(1, 4),
                st.sampled_from(["", "x", "y"]),
            ),
            max_size=8,
        ),
    )
)
def test_whatever_is_found_makes_a_configuration_that_can_be_read(found: dict[str, list[Member]]) -> None:
    several = placed("p", MemberDefaults(), found)
    entries = [each.entry for each in several if each.entry is not None]
    assert len({each["name"] for each in entries}) == len(entries)
    base = {
        "models": {"m": {"backend": "p"}},
        "backends": {"p": {"engine": "openai", "replicas": [{"url": "http://a:1"}]}},
    }
    import tempfile
    from pathlib import Path

    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.yaml")
        path.write_text(yaml.safe_dump(base))
        settings = read_all(path, {}, found={"p": entries}).settings
        written = load(path, {}).backends["p"].replicas[0]
    urls = [each.url for each in settings.backends["p"].replicas]
    assert settings.backends["p"].replicas[0] == written
    assert len(set(urls)) == len(urls)
    assert set(urls) == {"http://a:1", *(str(each["url"]) for each in entries)}


def test_names_made_from_addresses_are_valid_and_stay_short() -> None:
    assert name_of("p", Member(url="http://[fd00::1]:30000")) == "p-fd00-0-0-0-0-0-0-1-30000"
    assert len(name_of("p" * 60, Member(url=f"http://{'h' * 60}.example:1", dp_rank=3))) <= 80


def test_what_is_known_of_members_is_kept_up_to_date_and_changes_nothing() -> None:
    known: Known = {}
    several = [Member(url=f"http://10.0.0.{number}:1", name=f"r{number}") for number in range(4)]
    first = placed("p", DEFAULTS, {FILE: several}, known)
    assert placed("p", DEFAULTS, {FILE: several}, known) == first
    again = {FILE: [several[0], Member(url="http://10.0.0.9:1", name="r1", state="draining")], DNS: several[2:]}
    assert placed("p", DEFAULTS, again, known) == placed("p", DEFAULTS, again)
    assert len(known) == 4  # those that are gone are forgotten
