"""The text that says where it is, and the log that outlives its process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.counting import NotMyText, asked, counted, piece_after
from loadtests.engine import FakeEngine
from loadtests.rawclient import STREAM, ask
from loadtests.served_log import read_log, writing_to


def chat(begun: str | None = None, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
    return {**STREAM, "messages": messages, **fields}


@pytest.mark.parametrize("cut", [0, 1, 6, 7, 20, 69, 70])
async def test_a_text_is_gone_on_with_exactly_where_it_ends(cut: int) -> None:
    whole = counted(10)
    async with FakeEngine(chunks=10, counting=True) as engine:
        reply = await ask(engine, chat(whole[:cut]))
        assert whole[:cut] + "".join(reply.texts) == whole
        assert reply.events[-2]["usage"]["completion_tokens"] == 10 - cut // 7
        plain = await ask(engine, {**chat(whole[:cut]), "stream": False})
        assert whole[:cut] + plain.json["choices"][0]["message"]["content"] == whole


async def test_what_is_left_of_the_tokens_bounds_it() -> None:
    async with FakeEngine(chunks=10, counting=True) as engine:
        reply = await ask(engine, chat(counted(4), max_tokens=3))
        assert "".join(reply.texts) == counted(7)[len(counted(4)) :]
        assert [e["choices"][0]["finish_reason"] for e in reply.events[:-2]][-1] == "length"


async def test_another_beginning_is_refused() -> None:
    async with FakeEngine(chunks=10, counting=True) as engine:
        assert (await ask(engine, chat("000000 000002 "))).status == 400
        assert (await ask(engine, chat(counted(3)[3:]))).status == 400


def test_the_pieces_after_a_cut_are_the_rest_of_the_text() -> None:
    assert piece_after(0, 0) == "000000 "
    assert "".join(piece_after(9, number) for number in range(3)) == counted(4)[9:]
    assert asked(json.dumps(chat(counted(2), max_completion_tokens=1)).encode(), 5) == (14, 1, True)
    with pytest.raises(NotMyText):
        asked(json.dumps(chat("000001 ")).encode(), 5)


async def test_the_log_says_what_became_of_each_request(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert read_log(path) == []
    async with FakeEngine(chunks=2) as engine:
        engine.log = writing_to(path)
        await ask(engine, chat(fake={"mark": "one"}), headers="x-request-id: first\r\nauthorization: Bearer k\r\n")
        await ask(engine, chat(fake={"cut_after": 1}), headers="x-request-id: second\r\n")
        await engine.until(lambda: not engine.connections)
    lines = read_log(path)
    assert [(line.event, line.id) for line in lines] == [
        ("received", "first"), ("answered", "first"), ("received", "second"), ("gone", "second"),
    ]  # fmt: skip
    assert (lines[1].mark, lines[1].tokens, lines[1].status, lines[1].authorization) == ("one", 2, 200, "Bearer k")
    assert all(earlier.at_s <= later.at_s for earlier, later in itertools.pairwise(lines))
