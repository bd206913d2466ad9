"""Replicas from real files, written in all the ways in which others write them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from backends.discovery.entries import EntriesError, read_members
from backends.discovery.files import FileSource
from backends.discovery.member import Member

ONE = "- url: http://10.0.0.1:30000\n"
TWO = ONE + "- url: http://10.0.0.2:30000\n"


@dataclass
class Told:
    members: list[list[Member]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def tell(self, members: Sequence[Member]) -> None:
        self.members.append(list(members))

    def trouble(self, why: str) -> None:
        self.problems.append(why)

    async def look(self, source: FileSource) -> None:
        await source.look(self.tell, self.trouble)

    @property
    def urls(self) -> list[str]:
        return [each.url for each in self.members[-1]]


def long_ago(path: Path) -> None:
    """As if it had been written a minute ago."""
    when = time.time() - 60
    os.utime(path, (when, when))


async def test_everything_that_a_replica_may_say_is_read(tmp_path: Path) -> None:
    file = tmp_path / "replicas.yaml"
    file.write_text("""
- url: http://10.0.0.1:30000
  name: gpu-1
  engine: sglang
  upstream_model: m
  region: eu-west
  weight: 2
  max_in_flight: 64
  dp_rank: 0
  kv_events: {endpoint: tcp://10.0.0.1:5557}
- {url: "http://10.0.0.2:30000/api", name: null, kv_events: auto, state: draining}
""")
    told = Told()
    await told.look(FileSource(file))
    assert told.problems == []
    assert told.members == [
        [
            Member(
                url="http://10.0.0.1:30000",
                name="gpu-1",
                engine="sglang",
                upstream_model="m",
                region="eu-west",
                weight=2.0,
                max_in_flight=64,
                dp_rank=0,
                kv_events="tcp://10.0.0.1:5557",
            ),
            Member(url="http://10.0.0.2:30000/api", kv_events="auto", state="draining"),
        ]
    ]


async def test_a_file_that_is_written_again_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "replicas.yaml"
    file.write_text(ONE)
    told, source = Told(), FileSource(file)
    await told.look(source)
    file.write_text(TWO)
    await told.look(source)
    assert len(told.urls) == 2


async def test_one_of_the_same_size_and_time_is_seen_while_it_is_fresh(tmp_path: Path) -> None:
    file = tmp_path / "replicas.yaml"
    file.write_text(ONE)
    now = time.time_ns()
    os.utime(file, ns=(now, now))
    told, source = Told(), FileSource(file)
    await told.look(source)
    file.write_text(ONE.replace("10.0.0.1", "10.0.0.9"))
    os.utime(file, ns=(now, now))
    await told.look(source)
    assert told.urls == ["http://10.0.0.9:30000"]


async def test_an_atomic_rename_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    file, fresh = tmp_path / "replicas.yaml", tmp_path / "fresh"
    when = time.time() - 60
    file.write_text(ONE)
    os.utime(file, (when, when))
    told, source = Told(), FileSource(file)
    await told.look(source)
    fresh.write_text(ONE.replace("10.0.0.1", "10.0.0.9"))
    os.utime(fresh, (when, when))
    fresh.rename(file)
    await told.look(source)
    assert told.urls == ["http://10.0.0.9:30000"]


async def test_the_swapped_link_of_a_config_map_is_seen(tmp_path: Path) -> None:
    for name, text in (("..v1", ONE), ("..v2", TWO)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "replicas.yaml").write_text(text)
        long_ago(tmp_path / name / "replicas.yaml")
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "replicas.yaml").symlink_to("..data/replicas.yaml")
    told, source = Told(), FileSource(tmp_path / "replicas.yaml")
    await told.look(source)
    (tmp_path / "..new").symlink_to("..v2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    await told.look(source)
    assert [len(each) for each in told.members] == [1, 2]


async def test_a_file_at_rest_is_not_read_and_a_touched_one_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "replicas.yaml"
    file.write_text(ONE)
    long_ago(file)
    checked = 0

    def check(member: Member) -> str | None:
        nonlocal checked
        checked += 1
        return None

    told, source = Told(), FileSource(file, check=check)
    for _ in range(3):
        await told.look(source)
    os.utime(file)
    await told.look(source)
    assert len(told.members) == 4
    assert checked == 1


async def test_a_missing_half_written_or_empty_file_takes_nothing_away(tmp_path: Path) -> None:
    file = tmp_path / "replicas.yaml"
    file.write_text(TWO)
    told, source = Told(), FileSource(file)
    await told.look(source)
    file.unlink()
    await told.look(source)
    file.write_text("")
    await told.look(source)
    file.write_text('- url: "http://10.0.0.1:300')
    await told.look(source)
    file.write_text('[{"url": "http://10.0.0.1:30000"}, {"url"')
    await told.look(source)
    assert len(told.members) == 1
    assert told.problems[0] == f"{file}: there is no such file"
    assert told.problems[1] == f"{file}: it is empty; write [] for no replicas"
    assert told.problems[2].startswith(f"{file}, line 1: not valid YAML")
    assert told.problems[3].startswith(f"{file}, line 1: not valid JSON")
    file.write_text("[]")
    await told.look(source)
    assert told.members[-1] == []


async def test_problems_last_for_as_long_as_the_file_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "replicas.yaml"
    file.write_text("- url: 3\n")
    long_ago(file)
    told, source = Told(), FileSource(file)
    await told.look(source)
    await told.look(source)
    assert told.problems == [f"{file}, line 1: entry 1: url: Expected `str`, got `int`"] * 2


async def test_a_folder_is_a_problem_like_any_other(tmp_path: Path) -> None:
    told = Told()
    await told.look(FileSource(tmp_path))
    assert told.problems == [f"{tmp_path}: it cannot be read: Is a directory"]


async def test_run_sees_a_change_within_the_interval(tmp_path: Path) -> None:
    file = tmp_path / "replicas.yaml"
    file.write_text(ONE)
    told, changed = Told(), asyncio.Event()

    def tell(members: Sequence[Member]) -> None:
        told.tell(members)
        if len(members) == 2:
            changed.set()

    running = asyncio.create_task(FileSource(file, interval_s=0.2).run(tell, told.trouble))
    fresh = tmp_path / "fresh"
    fresh.write_text(TWO)
    fresh.rename(file)
    async with asyncio.timeout(10.0):
        await changed.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ONE + "- url: http://10.0.0.2:1\n  weigth: 2\n", "f, line 2: entry 2: 'weigth' is not a field"),
        (ONE + ONE, "f, line 2: entry 2: entry 1 has the same url (and dp_rank)"),
        ("- {url: http://a:1, name: x}\n- {url: http://b:1, name: x}", "f, line 2: entry 2: entry 1 has the same name"),
        (ONE + "-\n  name: x\n", "f, line 3: entry 2: there is no `url`"),
        (ONE + "- http://10.0.0.2:1\n", "f, line 2: entry 2 is not a mapping"),
        ("- url: ftp://10.0.0.1\n", "f, line 1: entry 1: url: scheme must be one of"),
        ("- {url: 'http://a:1', weight: 0}", "f, line 1: entry 1: weight: 0 is not above 0 and at most 1000"),
        ("- {url: 'http://a:1', weight: .nan}", "weight: nan is not above 0"),
        ("- {url: 'http://a:1', state: gone}", "state: it is one of starting, ready, draining"),
        ("- {url: 'http://a:1', price: {input: 1}}", "f, line 1: entry 1: price: one value is wanted"),
        (
            '[{"url": "http://a:1", "price": {"input": 1}}]',
            "'price' is not a field of replicas that are found; say it in",
        ),
        ("- {url: 'http://a:1', kv_events: {topic: x}}", "kv_events: only `endpoint`"),
        ("- url: http://a:1\n  url: http://b:1\n", "f, line 2: entry 1: 'url' is given twice"),
        ('[{"url": "http://a:1",\n  "url": "http://b:1"}]', "f, line 1: entry 1: 'url' is given twice"),
        ('[\n{"url": "http://a:1"},\n{"url": "http://b:1", "weight": NaN}]', "f, line 3: entry 2: NaN is not a number"),
        ('[{"url": "http://a:1"},\n {"url": 3}]', "f, line 2: entry 2: url: Expected `str`, got `int`"),
        ('[{"url": "http://a:1"}] x', "f, line 1: not valid JSON"),
        ("replicas:\n" + ONE, "f: it is not a list of replicas"),
        ("- <<: {url: http://a:1}\n", "only plain keys"),
        ("- &a [*a]\n", "f, line 1"),
        ("[" * 5000, "f"),
        ("- url: '\x07'\n", "f, line 1: not valid YAML"),
        ("- {url: 'http://a:1', weight: 1" + "0" * 400 + "}", "weight"),
    ],
)
def test_problems_name_file_line_and_entry(text: str, problem: str) -> None:
    with pytest.raises(EntriesError) as caught:
        read_members("f", text.encode())
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_in_another_encoding_is_said_with_its_line() -> None:
    with pytest.raises(EntriesError, match="f, line 2: it is not UTF-8 text"):
        read_members("f", ONE.encode() + b"\xff")


def test_one_wrong_entry_refuses_the_file_and_many_are_counted() -> None:
    text = ONE + "".join(f"- {{url: 'http://b{number}:1', weight: -1}}\n" for number in range(9))
    with pytest.raises(EntriesError, match=r"entry 2: .*entry 3: .*entry 4: .*; and 6 more$"):
        read_members("f", text.encode())


def test_what_the_caller_finds_wrong_counts() -> None:
    with pytest.raises(EntriesError, match="f, line 1: entry 1: not here"):
        read_members("f", ONE.encode(), lambda member: "not here")


def test_too_many_entries_are_refused() -> None:
    text = json.dumps([{"url": f"http://a{number}:1"} for number in range(4097)])
    with pytest.raises(EntriesError, match="4097 entries; 4096 are possible"):
        read_members("f", text.encode())


_MEMBERS = st.lists(
    st.fixed_dictionaries(
        {"url": st.from_regex(r"http://[a-z]{1,8}:[1-9][0-9]{0,3}", fullmatch=True)},
        optional={
            "weight": st.floats(0.01, 1000) | st.integers(1, 1000),
            "dp_rank": st.integers(0, 9),
            "region": st.text(min_size=1, max_size=8),
            "upstream_model": st.text(max_size=8),
        },
    ),
    max_size=8,
    unique_by=lambda entry: str((entry["url"], entry.get("dp_rank"))),
)


@given(_MEMBERS, st.sampled_from([None, 2, "\t"]))
def test_json_and_yaml_say_the_same(entries: list[dict[str, object]], indent: int | str | None) -> None:
    from_json = read_members("f", json.dumps(entries, indent=indent).encode())
    assert from_json == read_members("f", yaml.safe_dump(entries).encode())
    assert [each.url for each in from_json] == [entry["url"] for entry in entries]


@given(st.binary(max_size=200) | st.text(alphabet="[]{}-:, \n\"'&*a1#|>", max_size=60).map(str.encode))
def test_no_file_does_more_than_be_refused(content: bytes) -> None:
    with contextlib.suppress(EntriesError):
        read_members("f", content)
