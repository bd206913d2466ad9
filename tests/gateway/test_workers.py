"""Several workers behind one address: real processes, real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.supervisor import next_delay_s
from loadtests.engine import FakeEngine
from tests.support.command import PATIENCE_S, ServeProcess, serve_process, write_config

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    """Every request on a connection of its own, so that the workers share them out."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    async with httpx2.AsyncClient(trust_env=False, limits=limits, timeout=PATIENCE_S) as client:
        yield client


async def ask(client: httpx2.AsyncClient, url: str, count: int) -> None:
    """Send this many requests at once; all have to be answered."""
    answers = await asyncio.gather(*(client.post(f"{url}/v1/chat/completions", json=CHAT) for _ in range(count)))
    assert [answer.status_code for answer in answers] == [200] * count


async def requests_by_worker(gateway: ServeProcess, client: httpx2.AsyncClient) -> dict[str, float]:
    """Completed requests as the merged metrics have them."""
    text = (await gateway.admin(client, "/metrics")).text
    return {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(text)
        if family.name == "tidegate_requests"
        for sample in family.samples
        if sample.labels["outcome"] == "completed"
    }


async def workers_until(
    gateway: ServeProcess, client: httpx2.AsyncClient, condition: Callable[[list[dict[str, Any]]], bool]
) -> list[dict[str, Any]]:
    """The fleet, once it is as wanted."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition(workers := await gateway.fleet(client)):  # noqa: ASYNC110 - it is in other processes
            await asyncio.sleep(0.05)
    return workers


async def test_all_workers_get_traffic_and_their_metrics_add_up(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", "2") as gateway:
        url = await gateway.url()
        sent = 0
        counted: dict[str, float] = {}
        async with asyncio.timeout(PATIENCE_S):
            while len(counted) < 2:
                await ask(client, url, 20)
                sent += 20
                counted = await requests_by_worker(gateway, client)
        assert sum(counted.values()) == sent == engine.served
        text = (await gateway.admin(client, "/metrics")).text
        assert [text.count(f"# {line} tidegate_requests_total") for line in ("HELP", "TYPE")] == [1, 1]
        records = (await gateway.admin(client, "/admin/usage?limit=15")).json()["data"]
        ends = [record["time_unix_s"] + record["duration_ms"] / 1000 for record in records]
        assert len(ends) == 15
        assert all(earlier < later + 0.002 for later, earlier in pairwise(ends))  # rounded to milliseconds


async def test_a_killed_worker_is_replaced_and_service_goes_on(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", "2") as gateway:
        url = await gateway.url()
        first, second = [int(worker["pid"]) for worker in await gateway.fleet(client)]
        os.kill(first, signal.SIGKILL)
        await gateway.logged(r"worker 0 \(pid \d+\) was ended by SIGKILL; starting another in 0.5 s")
        await ask(client, url, 20)
        workers = await workers_until(gateway, client, lambda found: all(worker["up"] for worker in found))
        assert workers[0]["pid"] != first
        assert workers[1]["pid"] == second
        await ask(client, url, 20)


async def test_a_worker_that_hangs_is_left_out_of_a_scrape(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", "2") as gateway:
        await gateway.url()
        pid = int((await gateway.fleet(client))[1]["pid"])
        os.kill(pid, signal.SIGSTOP)
        text = (await gateway.admin(client, "/metrics")).text
        assert 'tidegate_worker_up{worker="0"} 1.0' in text
        assert 'tidegate_worker_up{worker="1"} 0.0' in text
        assert 'tidegate_in_flight{worker="0"}' in text
        assert 'tidegate_in_flight{worker="1"}' not in text
        assert (await gateway.fleet(client))[1] == {"worker": 1, "up": False}
        os.kill(pid, signal.SIGCONT)


async def stream(client: httpx2.AsyncClient, url: str, started: Callable[[], None]) -> str:
    """A whole streamed answer; `started` is called at its first bytes."""
    text = ""
    body = {**CHAT, "stream": True}
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        async for piece in response.aiter_text():
            if not text:
                started()
            text += piece
    return text


async def streams_under_way(client: httpx2.AsyncClient, url: str, count: int) -> list[asyncio.Task[str]]:
    """Begin this many streams, and wait for the first event of each."""
    begun = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(stream(client, url, begun.release)) for _ in range(count)]
    async with asyncio.timeout(PATIENCE_S):
        for _ in tasks:
            await begun.acquire()
    return tasks


@pytest.mark.parametrize("to_all", [False, True], ids=["to the parent", "to every process"])
async def test_sigterm_lets_the_streams_of_all_workers_finish(
    tmp_path: Path, client: httpx2.AsyncClient, to_all: bool
) -> None:
    """A service manager signals every process of its unit; that is still one wish to stop, not two."""
    async with (
        FakeEngine(chunks=10, interval_s=0.1) as engine,
        serve_process(tmp_path, [engine.url], "--workers", "2") as gateway,
    ):
        url = await gateway.url()
        pids = [int(worker["pid"]) for worker in await gateway.fleet(client)]
        tasks = await streams_under_way(client, url, 12)
        for pid in pids if to_all else ():
            os.kill(pid, signal.SIGTERM)
        gateway.signal(signal.SIGTERM)
        answers = await asyncio.gather(*tasks)
        assert all(answer.endswith("data: [DONE]\n\n") and '"error"' not in answer for answer in answers)
        assert await gateway.ended() == 0
        with pytest.raises(httpx2.ConnectError):
            await client.get(f"{url}/livez")
        assert os.listdir(gateway.runtime) == []


async def test_a_second_sigterm_hurries_all_workers(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with (
        FakeEngine(hang_mid=2) as engine,
        serve_process(tmp_path, [engine.url], "--workers", "2") as gateway,
    ):
        tasks = await streams_under_way(client, await gateway.url(), 6)
        gateway.signal(signal.SIGTERM)
        await gateway.logged("may finish within 30 s")
        gateway.signal(signal.SIGTERM)
        for answer in await asyncio.gather(*tasks):
            assert "gateway_draining" in answer
        assert await gateway.ended() == 0


async def test_sighup_reloads_all_workers_and_those_started_later(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", "2") as gateway:
        await gateway.url()
        write_config(gateway.config, [engine.url], models={"new": {"backend": "pool"}})
        gateway.signal(signal.SIGHUP)
        workers = await workers_until(gateway, client, lambda found: all(list(w["models"]) == ["new"] for w in found))
        gateway.config.write_text("models: {broken")
        gateway.signal(signal.SIGHUP)
        await gateway.logged("reload refused, the running configuration stays")
        os.kill(workers[0]["pid"], signal.SIGKILL)
        await gateway.logged("worker 0 .* starting another")
        workers = await workers_until(gateway, client, lambda found: all(worker["up"] for worker in found))
        assert [list(worker["models"]) for worker in workers] == [["new"], ["new"]]


async def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, client: httpx2.AsyncClient) -> None:
    async with FakeEngine() as engine, serve_process(tmp_path, [engine.url], "--workers", "2") as gateway:
        url = await gateway.url()
        gateway.signal(signal.SIGKILL)
        assert await gateway.ended() == -signal.SIGKILL  # which includes everybody who could write to its log
        with pytest.raises(httpx2.ConnectError):
            await client.get(f"{url}/livez")


async def test_workers_share_a_unix_socket_that_is_removed_at_the_end(client: httpx2.AsyncClient) -> None:
    with tempfile.TemporaryDirectory() as short:  # pytest's own folders are too long for a socket's path
        path = Path(short, "tidegate.sock")
        async with (
            FakeEngine() as engine,
            serve_process(Path(short), [engine.url], "--workers", "2", "--uds", str(path)) as gateway,
        ):
            await gateway.logged("serving on unix:")
            transport = httpx2.AsyncHTTPTransport(uds=str(path))
            async with httpx2.AsyncClient(transport=transport) as local:
                await ask(local, "http://gateway", 4)
            gateway.signal(signal.SIGINT)
            assert await gateway.ended() == 0
            assert not os.path.lexists(path)  # noqa: ASYNC240


async def test_workers_that_cannot_start_end_the_gateway_with_the_reason(tmp_path: Path) -> None:
    log = {"path": str(tmp_path / "missing" / "usage.jsonl")}
    async with serve_process(tmp_path, ["http://127.0.0.1:9"], "--workers", "2", usage_log=log) as gateway:
        assert await gateway.ended() == 1
        await gateway.logged("giving up: worker [01] does not start: usage_log.path: cannot write .*usage.jsonl")


APPEND = """
import asyncio, sys
from itertools import pairwise
from pathlib import Path
from gateway.ledger import Ledger
from gateway.record import Exchange

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    for batch in range(40):
        for number in range(60):
            ledger.record(Exchange(f"{sys.argv[2]}-{batch}-{number}", "/v1/chat/completions", 0.0, 0.0))
        await ledger.aclose()

asyncio.run(main())
"""


async def test_records_that_several_processes_append_stay_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"
    writers = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", APPEND, str(path), str(number))
        for number in range(3)
    ]
    assert [await writer.wait() for writer in writers] == [0, 0, 0]
    found = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert len(found) == len(set(found)) == 3 * 40 * 60


def test_the_delay_before_a_replacement_doubles_up_to_ten_seconds() -> None:
    delays = [0.0]
    for _ in range(7):
        delays.append(next_delay_s(delays[-1], ran_for_s=1))
    assert delays[1:] == [0.5, 1, 2, 4, 8, 10, 10]
    assert next_delay_s(10.0, ran_for_s=60) == 0.5
