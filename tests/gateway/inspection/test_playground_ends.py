"""What ends the playground's requests before they are done, and how many there can be meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gateway.inspection.door import Door
from gateway.inspection.playground import MAX_AT_ONCE, MAX_COLUMNS
from tests.support.admin_desk import OPERATOR, AdminSide, admin_side, bearer

WITHIN_S = 15.0
ASKED: dict[str, Any] = {"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}


class Endless:
    """A front door that begins to answer, and never ends."""

    def __init__(self) -> None:
        self.open = 0
        self.gone = asyncio.Event()
        """Set while nobody is there."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.gone.clear()
        writer.write(b"HTTP/1.1 200 OK\r\nx-request-id: req_1\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            with suppress(ConnectionError):
                while await reader.read(65_536):
                    pass
        finally:
            self.open -= 1
            if not self.open:
                self.gone.set()
            writer.close()


@asynccontextmanager
async def endless(folder: Path) -> AsyncIterator[tuple[AdminSide, Endless]]:
    door = Endless()
    server = await asyncio.start_server(door.answer, "127.0.0.1", 0)
    async with server, admin_side(folder) as side:
        side.desk.door = Door(server.sockets[0].getsockname(), "s" * 43)
        yield side, door


@pytest.mark.parametrize("everybody", [False, True])
async def test_logging_out_ends_what_is_under_way(tmp_path: Path, everybody: bool) -> None:
    async with endless(tmp_path) as (side, door), asyncio.timeout(WITHIN_S):
        olga, owner = await side.logged_in(OPERATOR), await side.logged_in()
        asking = side.client.stream("POST", "/admin/playground", json=ASKED, headers=olga)
        async with asking as answer:
            assert answer.status_code == 200
            pieces = answer.aiter_bytes()
            assert b"event: head" in await anext(pieces)
            end = ("DELETE", "/admin/sessions", owner) if everybody else ("DELETE", "/admin/session", olga)
            assert (await side.client.request(end[0], end[1], headers=end[2])).status_code in (200, 204)
            assert [piece async for piece in pieces if b"event: head" in piece] == []
        await door.gone.wait()
        again = await side.client.post("/admin/playground", json=ASKED, headers=olga)
        assert again.status_code == 401


async def test_no_more_are_under_way_than_may_be_though_all_come_at_once(tmp_path: Path) -> None:
    asked = {**ASKED, "columns": [{}] * MAX_COLUMNS}
    room = MAX_AT_ONCE // MAX_COLUMNS

    async def ask(side: AdminSide, statuses: list[int], busy: asyncio.Event) -> None:
        async with side.client.stream("POST", "/admin/playground", json=asked, headers=bearer(OPERATOR)) as answer:
            statuses.append(answer.status_code)
            if len(statuses) == 3 * room:
                busy.set()
            await answer.aread()

    async with endless(tmp_path) as (side, door), asyncio.timeout(WITHIN_S):
        statuses: list[int] = []
        busy = asyncio.Event()
        asking = [asyncio.create_task(ask(side, statuses, busy)) for _ in range(3 * room)]
        await busy.wait()
        assert sorted(statuses) == [200] * room + [429] * (2 * room)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await door.gone.wait()
        while (await side.client.get("/admin/session", headers=bearer(OPERATOR))).status_code == 200:
            async with side.client.stream("POST", "/admin/playground", json=asked, headers=bearer(OPERATOR)) as answer:
                if answer.status_code == 200:  # their places are free again
                    break
