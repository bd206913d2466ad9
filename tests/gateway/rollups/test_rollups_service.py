"""The rollups of a gateway: sampled, kept over a restart, bounded, and told as JSON."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx2
import msgspec
import pytest

from gateway.config import Settings
from gateway.rollups import kept
from gateway.rollups.hub import Hub
from gateway.rollups.kept import BrokenFile
from gateway.rollups.pulse import ModelPulse, PoolPulse, Pulse, ReplicaPulse
from gateway.rollups.series import DAY, HOUR, WEEK, Series
from gateway.rollups.service import Rollups
from gateway.rollups.tally import ModelTally, Tally
from gateway.state import LocalSource
from loadtests.engine import FakeEngine
from tests.support.admin_desk import OWNER, admin_side, bearer
from tests.support.serving import serving, settings_for


def settings() -> Settings:
    return settings_for(["http://127.0.0.1:1"])


def rollups(state_dir: Path | None) -> Rollups:
    return Rollups([], settings, state_dir, Hub())


def pulse(completed: int, *, pid: int = 1, reason: str = "") -> Pulse:
    model = ModelPulse(completed, 0, 10 * completed, 5 * completed, 2 * completed)
    model.ttft, model.duration = [0, completed], [0, 0, completed]
    replica = ReplicaPulse("pool-0", None, "healthy", reason, 1, 0)
    return Pulse(
        0,
        pid,
        1.0,
        requests={"completed": completed},
        models={"m": model},
        pools=[PoolPulse("pool", [replica], 0, 0, 0)],
    )


async def test_a_gateway_counts_what_it_has_served(tmp_path: Path) -> None:
    async with (
        FakeEngine() as engine,
        serving(settings_for([engine.url])) as gateway,
        admin_side(tmp_path, sources=[LocalSource(gateway.runtime)]) as side,
        httpx2.AsyncClient(trust_env=False) as client,
    ):
        for _ in range(3):
            await client.post(f"{gateway.url}/v1/chat/completions", json={"model": "m", "messages": [], "stream": True})
        await client.post(f"{gateway.url}/v1/chat/completions", json={"model": "none", "messages": []})
        await gateway.settled(4)
        answer = await side.client.get("/admin/overview?window=live", headers=bearer(OWNER))
        assert answer.headers["cache-control"] == "no-store"
        body = answer.json()
        assert body["verdict"]["state"] == "healthy"
        assert body["health"] == []
        assert body["totals"]["outcomes"] == {"completed": 3, "rejected": 1}
        assert (body["totals"]["failed"], body["totals"]["error_ratio"]) == (0, 0.0)
        assert body["now"]["ttft_ms"]["p50"] > 0
        assert body["now"]["cached_ratio"] == 0.5
        assert [row["model"] for row in body["models"]] == ["m", "unknown"]
        assert body["slo"]["budget_left"] == 1.0
        assert len(body["series"]["times"]) in (29, 30)
        for window, slots in (("hour", HOUR.slots), ("day", DAY.slots), ("week", WEEK.slots)):
            answer = await side.client.get(f"/admin/overview?window={window}", headers=bearer(OWNER))
            found = answer.json()
            assert found["totals"]["requests"] == 4
            assert len(found["series"]["times"]) == len(found["series"]["ttft_ms"]["p95"]) == slots - 1
        refused = await side.client.get("/admin/overview?window=year", headers=bearer(OWNER))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "window")
        assert (await side.client.get("/admin/overview")).status_code == 401


def test_a_worker_that_is_started_again_counts_on() -> None:
    ours = rollups(None)
    begun = time.monotonic()
    ours.take([(0, pulse(100))], begun + 10, 1_700_000_010.0)
    ours.take([(0, None)], begun + 20, 1_700_000_020.0)
    assert [each.id for each in ours.health] == ["workers"]
    ours.take([(0, pulse(7, pid=2))], begun + 30, 1_700_000_030.0)
    ours.take([(0, pulse(9, pid=2))], begun + 40, 1_700_000_040.0)
    total = ours.series.levels["hour"].total(1_700_000_041.0)
    assert total.requests == {"completed": 109}
    assert ours.health == []


def test_a_worker_that_has_not_begun_is_no_trouble_at_first() -> None:
    ours = rollups(None)
    begun = time.monotonic()
    ours.take([(0, None)], begun + 1, 1_700_000_000.0)
    assert ours.health == []
    ours.take([(0, None)], begun + 20, 1_700_000_020.0)
    assert [each.id for each in ours.health] == ["workers"]


def test_a_finding_keeps_its_beginning_from_sample_to_sample() -> None:
    ours = rollups(None)
    begun = time.monotonic()
    for second in (1, 2, 3):
        ours.take([(0, pulse(second, reason="ejected"))], begun + second, 1_700_000_000.0 + second)
    assert {each.since_unix_s for each in ours.health} == {1_700_000_001.0}


async def test_who_asks_at_once_shares_one_question() -> None:
    class Asked:
        index = 0
        count = 0

        async def pulse(self) -> Pulse:
            self.count += 1
            await asyncio.sleep(0.02)
            return pulse(self.count)

    source = Asked()
    ours = Rollups([source], settings, None, Hub())  # type: ignore[list-item]
    await asyncio.gather(*(ours.overview("hour") for _ in range(10)), ours.live())
    assert source.count == 1
    await ours.aclose()


async def test_what_was_counted_outlasts_a_restart(tmp_path: Path) -> None:
    before = rollups(tmp_path)
    await before.start()
    before.take([(0, pulse(5))], time.monotonic(), time.time())
    await before.aclose()
    path = before.path
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    after = rollups(tmp_path)
    await after.start()
    after.take([(0, pulse(2, pid=2))], time.monotonic(), time.time())
    assert (await after.overview("week"))["totals"]["outcomes"] == {"completed": 7}
    await after.aclose()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"tidegate rollups 1\n1234nonsense"])
async def test_a_file_that_is_broken_is_put_aside_and_said(tmp_path: Path, content: bytes) -> None:
    ours = rollups(tmp_path)
    assert ours.path is not None
    ours.path.write_bytes(content)
    await ours.start()
    ours.take([(0, pulse(5))], time.monotonic(), time.time())
    (finding,) = ours.health
    assert (finding.id, finding.severity) == ("rollups", "notice")
    assert finding.where.endswith(f"it is kept as {ours.path.name}.broken")
    assert (tmp_path / f"{ours.path.name}.broken").read_bytes() == content
    await ours.aclose()
    assert kept.read(ours.path, time.time())[1] == ""


async def test_a_folder_that_cannot_be_written_is_said_and_stops_nothing(tmp_path: Path) -> None:
    ours = rollups(tmp_path / "not-there")
    await ours.start()
    ours.take([(0, pulse(5))], time.monotonic(), time.time())
    await ours.aclose()
    ours.take([(0, pulse(6))], time.monotonic(), time.time())
    assert "cannot be written" in ours.health[0].where


def test_any_damage_shows() -> None:
    series = Series()
    series.add(Tally(10.0, requests={"completed": 3}, models={"m": ModelTally(3)}, ttft={4: 3}), 1_700_000_000.0)
    data = kept.encode(series)
    assert kept.decode(data, 1_700_000_001.0).levels["hour"].slots == series.levels["hour"].slots
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :]
        with pytest.raises(BrokenFile):
            kept.decode(damaged, 1_700_000_001.0)
        with pytest.raises(BrokenFile):
            kept.decode(data[:place], 1_700_000_001.0)


def test_what_is_too_old_or_of_the_future_is_not_taken_over() -> None:
    series = Series()
    series.add(Tally(10.0, requests={"completed": 1}), 1_700_000_000.0)
    data = kept.encode(series)
    later = kept.decode(data, 1_700_000_000.0 + 7200)
    assert (len(later.levels["hour"].slots), len(later.levels["day"].slots)) == (0, 1)
    assert all(not level.slots for level in kept.decode(data, 1_600_000_000.0).levels.values())


def test_a_full_history_of_busy_models_stays_small() -> None:
    series, busy = Series(), Tally(10.0, requests={"completed": 1000}, ttft=dict.fromkeys(range(60), 9))
    busy.duration = dict.fromkeys(range(60), 9)
    busy.models = {
        f"model-{number}": ModelTally(100, 1, 10**6, 10**5, 10**5, 1.5, 0.5, 99, 12.5) for number in range(10)
    }
    for slot in range(HOUR.slots):
        series.levels["hour"].slots[1_700_000_000 + slot * 10] = msgspec.structs.replace(busy)
    for slot in range(DAY.slots):
        series.levels["day"].slots[1_700_000_000 + slot * 300] = msgspec.structs.replace(busy)
    for slot in range(WEEK.slots):
        series.levels["week"].slots[1_700_000_000 + slot * 1800] = msgspec.structs.replace(busy)
    data = kept.encode(series)
    assert len(data) < 2 * 2**20
    assert len(data) < kept.MAX_FILE_BYTES
