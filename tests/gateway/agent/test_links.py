"""What a gateway is told and answers, over real sockets; the gateways here do as the tests say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from backends.dialects import DIALECTS
from backends.discovery.registrar import AgentReport, Orders, PoolReport, Registrar
from gateway.agent.keeping import Answered, Keeper, Leave, Limits, Phase
from gateway.agent.links import Link, reachable
from gateway.agent.server import Plan, Server

PATIENCE_S = 20.0
LEASE = {"ttl_s": 0.6, "renew_in_s": 0.2, "state": "ready", "in_flight": 0, "empty": True, "draining": False}


class StandIn:
    """An admin listener that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, Any]] = []
        self.answer: Callable[[str, str, Any], tuple[int, Any] | None] = lambda *_: (200, LEASE)
        """Status and body by method, target and content; None: it never answers."""
        self.url = ""
        self._changed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, target, _ = head.split(b"\r\n")[0].decode().split()
                fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:] if line)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                content = json.loads(body) if body else None
                self.told.append((method, target, content))
                self._changed.set()
                answer = self.answer(method, target, content)
                if answer is None:
                    continue
                sent = json.dumps(answer[1]).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (answer[0], len(sent)) + sent)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def until(self, right: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not right():
                self._changed.clear()
                await self._changed.wait()

    def members(self) -> list[Any]:
        return [content for method, target, content in self.told if method == "PUT" and "/registrations/" in target]


@asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    gateway = StandIn()
    server = await asyncio.start_server(gateway.serve, "127.0.0.1", 0)
    gateway.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield gateway
    finally:
        server.close()


class Rig:
    """A server without a process, and links to these gateways."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.orders: list[tuple[str, Orders]] = []
        self.links: list[Link] = []
        self.gone = False
        clock = asyncio.get_running_loop().time
        self.keeper = Keeper(Limits(start_timeout_s=60, stop_timeout_s=60), clock(), max)
        plan = Plan(
            command=[],
            environ={},
            engine="sglang",
            model="m",
            dialect=DIALECTS["sglang"],
            headers=(),
            host="127.0.0.1",
            port=30000,
            url="http://127.0.0.1:30000",
            timeout_s=1.0,
        )
        self.server = Server(
            "pool",
            "box-pool-0",
            "box",
            Path("unused"),
            self.keeper,
            lambda: plan,
            clock=clock,
            say=self.say,
            changed=self.changed,
            gateways=lambda: reachable(self.links, "pool", "box-pool-0"),
            spawn=lambda _: None,
        )
        self.server.current = plan
        self.clock = clock

    def say(self, who: str, text: str) -> None:
        self.said.append(text)

    def changed(self) -> None:
        for link in self.links:
            link.changed.set()

    @asynccontextmanager
    async def linked(self, *gateways: StandIn) -> AsyncIterator[None]:
        report = AgentReport(pools={"pool": PoolReport(launched=1, ready=1, max=2)})
        for gateway in gateways:
            link = Link(
                Registrar(gateway.url, "token", timeout_s=0.3),
                "box",
                lambda: [] if self.gone else [self.server],
                lambda: report,
                lambda link, orders: self.orders.append((link.address, orders)),
                self.say,
                self.clock,
            )
            self.links.append(link)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(link.run()) for link in self.links]
            yield
            for task in tasks:
                task.cancel()


async def until(right: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if right():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true")


async def test_server_is_told_of_at_each_step_renewed_and_taken_out() -> None:
    async with stand_in() as gateway:
        rig = Rig()
        async with rig.linked(gateway):
            rig.server.post()
            await gateway.until(lambda: gateway.members()[-1:] != [] and gateway.members()[-1]["state"] == "starting")
            assert not rig.server.taken
            rig.server.post(Answered())
            await gateway.until(lambda: sum("state" not in each for each in gateway.members()) >= 3)  # ready: left out
            await until(lambda: rig.server.taken)
            rig.server.post(Leave())
            await gateway.until(lambda: gateway.members()[-1].get("state") == "draining")
            assert rig.keeper.phase is Phase.DRAINING, "empty, and not drained at the gateway yet"
            gateway.answer = lambda *_: (200, {**LEASE, "draining": True})
            await until(lambda: rig.keeper.phase is not Phase.DRAINING)
            rig.gone = True
            rig.changed()
            await gateway.until(lambda: gateway.told[-1][0] == "DELETE")
            await until(lambda: rig.links[0].settled)


async def test_gateway_that_hangs_holds_up_no_other_and_is_asked_again() -> None:
    async with stand_in() as hangs, stand_in() as answers:
        hangs.answer = lambda *_: None
        rig = Rig()
        async with rig.linked(hangs, answers):
            rig.server.post()
            rig.server.post(Answered())
            await answers.until(lambda: len(answers.members()) >= 10)
            await hangs.until(lambda: len(hangs.members()) >= 2)
            assert sum("the servers go on" in text for text in rig.said) == 1
            assert rig.server.taken, "what cannot be asked is not waited for"
            hangs.answer = lambda *_: (200, LEASE)
            await until(lambda: "is back" in rig.said)


async def test_refusal_is_said_once_and_so_is_its_end() -> None:
    async with stand_in() as gateway:
        refusal = {"error": {"code": "unknown_pool", "message": "There is no pool pool."}}
        gateway.answer = lambda method, target, _: (404, refusal) if "registrations" in target else (200, ORDERS)
        rig = Rig()
        async with rig.linked(gateway):
            rig.server.post()
            await gateway.until(lambda: len(gateway.members()) >= 1)
            rig.server.post(Answered())
            await gateway.until(lambda: len(gateway.members()) >= 2)
            gateway.answer = lambda method, target, _: (200, LEASE if "registrations" in target else ORDERS)
            rig.server.post(Leave())
            await until(lambda: "takes box-pool-0 now" in rig.said)
        assert [text for text in rig.said if "does not take" in text] == [
            "does not take box-pool-0: There is no pool pool."
        ]


ORDERS = {"renew_in_s": 0.1, "pools": {"pool": {"count": 3, "leave": ["box-pool-0"], "roll": 2}}}


async def test_reports_are_answered_with_orders() -> None:
    async with stand_in() as gateway:
        gateway.answer = lambda method, target, _: (200, ORDERS if "agents" in target else LEASE)
        rig = Rig()
        async with rig.linked(gateway):
            await gateway.until(lambda: sum("/admin/agents/box" in target for _, target, _ in gateway.told) >= 3)
        address, orders = rig.orders[0]
        assert (address, orders.pools["pool"].count, orders.pools["pool"].leave) == (gateway.url, 3, ("box-pool-0",))
        sent = next(content for _, target, content in gateway.told if "agents" in target)
        assert sent == {"pools": {"pool": {"launched": 1, "ready": 1, "max": 2, "roll": 0}}}
