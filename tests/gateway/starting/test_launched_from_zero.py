"""A pool that sleeps, with servers that an agent launches: from no server at all to an answer, by real processes."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx2

from loadtests.ports import free_ports
from tests.support.command import serve_process
from tests.support.launching import ENGINE, fleet_up, launching, until_members

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


async def test_twenty_requests_to_a_sleeping_pool_have_a_server_launched_and_are_all_answered(tmp_path: Path) -> None:
    backends = launching(free_ports(2), ENGINE, count=0, max_running=2)
    backends["pool"]["scaling"] = {"min": 0, "max": 2, "provider": "local", "lead_time_s": 2}
    async with (
        serve_process(tmp_path, [], backends=backends) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=60) as client,
        fleet_up(gateway.config, gateway.state, await gateway.admin_url()) as fleet,
    ):
        url = f"{await gateway.url()}/v1/chat/completions"
        await until_members(gateway, client, {})
        bodies = [{**CHAT, "stream": at % 2 == 0} for at in range(20)]
        answers = await asyncio.gather(*(client.post(url, json=body) for body in bodies))
        assert [each.status_code for each in answers] == [200] * 20, {each.text for each in answers}
        assert all(each.text.rstrip().endswith("data: [DONE]") for each in answers[::2]), answers[0].text
        assert all(float(each.headers["x-tidegate-queue-ms"]) > 0 for each in answers)
        await fleet.said("box-pool-0 +ready in")
        fleet.signal(signal.SIGTERM)
        assert await fleet.ended() == 0
