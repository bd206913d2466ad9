"""Experiment 31: bodies that are JSON to some readers and not to others, or that cost more to read than to send."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from gateway.body import MAX_COMMAS, MAX_CONTAINERS, MAX_KEY_LENGTH, MAX_QUOTES, parse
from gateway.errors import InvalidRequest
from gateway.order import CHAT, COMPLETIONS, EMBEDDINGS
from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.support.client import connect, post
from tests.support.talking import ASK, both_edges, talking

TEN_MB = 10_000_000
HOSTILE = {
    **{
        f"{opening.decode()} {depth:,} deep, {'closed' if closed else 'open'}": b'{"model":"m","a":'
        + opening * depth
        + (b"1" + closing * depth + b"}" if closed else b"")
        for depth in (1_000, 10_000, 1_000_000)
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"))
        for closed in (True, False)
    },
    "a key twice": b'{"model":"m","model":"n"}',
    "a key twice, once escaped": b'{"model":"m","\\u006dodel":"n"}',
    "5,000 digits": b'{"model":"m","n":' + b"1" * 5000 + b"}",
    "ten million digits": b'{"model":"m","n":' + b"1" * (TEN_MB - 30) + b"}",
    "NaN": b'{"model":"m","temperature":NaN}',
    "Infinity": b'{"model":"m","temperature":-Infinity}',
    "1e999": b'{"model":"m","temperature":1e999}',
    "a byte order mark": b'\xef\xbb\xbf{"model":"m"}',
    "UTF-16": '{"model":"m"}'.encode("utf-16"),
    "invalid UTF-8": b'{"model":"m","user":"\xff"}',
    "invalid UTF-8 after ten megabytes": b'{"model":"m","user":"' + b"a" * (TEN_MB - 60) + b'\xc3"}',
    "an overlong slash": b'{"model":"m","user":"\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"model":"m","user":"\xed\xa0\x80"}',
    "half a surrogate pair": b'{"model":"m","user":"\\ud800"}',
    "the other half": b'{"model":"m","user":"\\udc00 x"}',
    "a control character": b'{"model":"m","user":"a\nb"}',
    "a comma too many": b'{"model":"m",}',
    "a comment": b'{"model":"m"/* */}',
    "single quotes": b"{'model':'m'}",
    "two documents": b'{"model":"m"}{"model":"n"}',
    "no object": b'["model","m"]',
    "nothing": b"",
    "NUL": b'{"model":"m"}\0',
}
"""None of these is a request."""
DEAR = {
    "brackets": b'{"a":[' + b"[]," * (MAX_CONTAINERS + 1) + b"[]]}",
    "numbers": b'{"a":[' + b"1," * (TEN_MB // 2 - 10) + b"1]}",
    "short strings": b'{"a":[' + b'"",' * (TEN_MB // 3 - 10) + b'""]}',
    "different keys": b'{"a":{' + b",".join(b'"%x":1' % number for number in range(900_000)) + b"}}",
    "a key of ten megabytes": b'{"' + b"\\n" * (TEN_MB // 2 - 10) + b'":1}',
}
"""These are JSON, and took 0.05 to 0.8 s before they were counted first."""
DEAREST_TAKEN = {
    "as many numbers as may be": b'{"a":[' + b"1.5," * MAX_COMMAS + b"1]}",
    "as many keys as may be": b'{"a":{'
    + b",".join(b'"%x":1' % number for number in range(MAX_QUOTES // 2 - 2))
    + b"}}",
    "as many containers as may be": b'{"a":[' + b"[]," * (MAX_CONTAINERS - 4) + b"[]]}",
    "text with one emoji": b'{"a":"' + b"a" * (TEN_MB - 30) + "😀".encode() + b'"}',
    "one string of escapes": b'{"a":"' + b"\\n" * (TEN_MB // 2 - 10) + b'"}',
    "numbers of many digits": b'{"a":[' + b"1.2345678901234567890123e-300," * (TEN_MB // 30 - 10) + b"1]}",
}
BOUND_S = 0.05
TAKEN_BOUND_S = 0.15


def cpu_s(raw: bytes) -> float:
    """What reading it holds the event loop for, the best of three: others use this machine too."""
    best = 9.0
    for _ in range(3):
        began = time.thread_time()
        with contextlib.suppress(InvalidRequest):
            parse(raw)
        best = min(best, time.thread_time() - began)
    return best


@pytest.mark.alone
def test_31_hostile_json_is_refused_at_once(report: Report) -> None:
    refused: dict[str, float] = {}
    wrong = []
    for name, raw in {**HOSTILE, **DEAR}.items():
        try:
            parse(raw)
            wrong.append(name)
        except InvalidRequest as error:
            if error.status != 400:
                wrong.append(name)
        refused[name] = cpu_s(raw)
    taken = {name: cpu_s(raw) for name, raw in DEAREST_TAKEN.items()}
    slowest, dearest = max(refused, key=refused.__getitem__), max(taken, key=taken.__getitem__)
    report(
        "31",
        Finding(
            "hostile JSON",
            f"{len(refused)} bodies of up to 10 MB: depth, duplicates, digits, NaN, encodings, what is dear to read",
            f"every one refused with 400 in less than {BOUND_S * 1000:.0f} ms of the event loop; what is still taken: "
            f"{TAKEN_BOUND_S * 1000:.0f} ms",
            f"{len(refused) - len(wrong)} of {len(refused)} refused, the slowest ({slowest}) in "
            f"{refused[slowest] * 1000:.0f} ms; the dearest taken ({dearest}): {taken[dearest] * 1000:.0f} ms",
            not wrong and refused[slowest] < BOUND_S and taken[dearest] < TAKEN_BOUND_S,
            {"refused_s": refused, "taken_s": taken, "wrong": wrong},
        ),
    )


@both_edges
async def test_31_no_body_is_an_error_of_ours_or_reaches_an_engine(edge: str, report: Report) -> None:
    statuses: dict[str, list[int]] = {}
    async with talking(edge, max_body_bytes=TEN_MB + 1000) as talk:
        for path in (CHAT, COMPLETIONS, EMBEDDINGS):
            for name, raw in HOSTILE.items():
                if len(raw) > 100_000 and path != CHAT:
                    continue
                async with connect(talk.gateway.host, talk.gateway.port) as client:
                    await client.send(post(path, raw))
                    reply = await client.reply()
                assert set(reply.json["error"]) == {"message", "type", "param", "code"}
                statuses.setdefault(name, []).append(reply.status)
        talk.assert_nothing_reached_the_engine()
        await talk.client.send(post(CHAT, ASK))
        assert (await talk.client.reply()).status == 200
    sent: list[Any] = [status for each in statuses.values() for status in each]
    report(
        "31",
        Finding(
            f"hostile JSON over sockets, edge {edge}",
            f"{len(sent)} requests on the three routes",
            "400 for each, nothing at the engine, and the next request is served",
            f"{sent.count(400)} times 400",
            set(sent) == {400},
            statuses,
        ),
    )


def test_a_key_may_be_long_where_the_body_is_small() -> None:
    """The bound is for what takes long to walk over."""
    assert parse(b'{"' + b"k" * (MAX_KEY_LENGTH + 1) + b'":1}').fields


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b'{"a":"' + b"1,2,3\\n" * 100_000 + b'"}', id="a table as text"),
        pytest.param(b'{"a":"' + b'{\\"k\\": \\"v\\"}, ' * 40_000 + b'"}', id="JSON as text"),
        pytest.param(b'{"prompt":[' + b"128000," * 300_000 + b"1]}", id="300,000 tokens"),
        pytest.param(b'{"input":[' + b",".join([b"[" + b"5," * 400 + b"1]"] * 2048) + b"]}", id="2,048 inputs"),
        pytest.param(b'{"logit_bias":{' + b",".join(b'"%d":-100' % n for n in range(150_000)) + b"}}", id="logit_bias"),
    ],
)
def test_large_bodies_that_somebody_may_mean_are_taken(raw: bytes) -> None:
    assert parse(raw).fields
