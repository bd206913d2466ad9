"""One database, two gateways that each count in their own memory: the second does not start."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from gateway.admission.records import AdmissionError, Records
from gateway.admission.sole import SoleUse, is_gone, this_process
from gateway.config import Settings
from gateway.database.sole import LEASE_S, Holder
from tests.gateway.admission.keyed import keyed
from tests.support.client import until
from tests.support.serving import settings_for

WITHIN_S = 15.0


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[Records]:
    opened = Records(keyed(tmp_path, ["http://127.0.0.1:9"]))
    opened.database()
    yield opened
    opened.close()


def elsewhere(records: Records, gateway: str = "gw_far") -> Holder:
    """Another gateway, on another machine, takes the lease: it lives until it no longer renews."""
    holder = Holder(gateway, "far.example", 7, "another kernel", 1)
    assert records.database().sole.take(holder) is None
    return holder


async def test_second_gateway_is_refused_with_who_and_what_to_do(
    records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = SoleUse(records, "gw_first"), SoleUse(records, "gw_second", wait_s=0.2)
    await first.start(wait=True)
    with pytest.raises(AdmissionError) as refusal:
        await second.start(wait=True)
    text = str(refusal.value)
    assert f"gw_first, process {os.getpid()} on " in text
    assert "since 20" in text
    assert "Set store: redis://host:port for several gateways, or stop the other one." in text
    assert "waiting up to 0.2 s" in caplog.text
    await second.aclose()
    assert first.held
    await first.aclose()
    await second.start(wait=True)
    await second.aclose()


async def test_a_start_waits_for_the_one_before_it_to_end(records: Records) -> None:
    first, second = SoleUse(records, "gw_first"), SoleUse(records, "gw_second")
    await first.start(wait=True)
    starting = asyncio.create_task(second.start(wait=True))
    await asyncio.wait([starting], timeout=0.7)
    assert not starting.done()
    await first.aclose()
    await asyncio.wait_for(starting, WITHIN_S)
    assert second.held
    await second.aclose()


async def test_a_start_that_waits_can_be_stopped(records: Records) -> None:
    elsewhere(records)
    second = SoleUse(records, "gw_second")
    starting = asyncio.create_task(second.start(wait=True))
    await asyncio.wait([starting], timeout=0.2)
    second.stop_waiting()
    begun = time.monotonic()
    with pytest.raises(AdmissionError):
        await starting
    assert time.monotonic() - begun < LEASE_S / 2


async def test_lease_of_another_machine_is_waited_for_and_taken(
    records: Records, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.database.sole.LEASE_S", 1.0)
    elsewhere(records)
    second = SoleUse(records, "gw_second")
    await asyncio.wait_for(second.start(wait=True), WITHIN_S)
    assert second.held
    assert "gw_far, process 7 on far.example" in caplog.text
    assert second.lost == 0
    await second.aclose()


async def test_running_gateway_says_and_counts_that_another_one_took_its_lease(
    records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    frozen = SoleUse(records, "gw_frozen", renew_every_s=0.05)
    await frozen.start(wait=True)
    lease = records.database().sole
    other = Holder("gw_far", "far.example", 7, "another kernel", 1)
    assert lease.take(other, lambda _: True) is None
    await until(lambda: frozen.lost == 1, WITHIN_S)
    assert not frozen.held
    await until(lambda: "as well" in caplog.text, WITHIN_S)
    assert caplog.text.count("set store: redis://host:port") == 1  # once, not at every turn
    assert [record.levelno for record in caplog.records if "as well" in record.message] == [logging.ERROR]
    lease.give_up("gw_far")
    await until(lambda: frozen.held, WITHIN_S)
    assert frozen.lost == 1
    await frozen.aclose()
    assert lease.take(other) is None


async def test_database_that_comes_later_is_taken_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "later"
    records = Records(keyed(folder, ["http://127.0.0.1:9"]))
    use = SoleUse(records, "gw_early", renew_every_s=0.05)
    await use.start(wait=False)
    await until(lambda: "is not renewed" in caplog.text, WITHIN_S)
    folder.mkdir()
    await until(lambda: use.held, WITHIN_S)
    await use.aclose()
    records.close()
    assert caplog.text.count("is not renewed") == 1


def test_gone_is_only_what_certainly_is() -> None:
    me = this_process("gw_me")
    assert me.process_started > 0
    assert not is_gone(me)
    assert not is_gone(msgspec.structs.replace(me, pid=1, process_started=_started(1)))
    assert is_gone(msgspec.structs.replace(me, process_started=me.process_started - 1))  # the number was used again
    ended = subprocess.Popen([sys.executable, "-c", ""])
    child = msgspec.structs.replace(me, pid=ended.pid)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(child)  # listed still, but dead
    ended.wait()
    assert is_gone(child)
    assert not is_gone(msgspec.structs.replace(child, machine="another kernel"))
    assert not is_gone(msgspec.structs.replace(child, machine=""))


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@pytest.mark.parametrize("store", ["memory", "redis://127.0.0.1:1"])
async def test_only_a_gateway_with_records_and_a_store_of_its_own_keeps_a_lease(tmp_path: Path, store: str) -> None:
    from gateway.admission.opening import Admission

    settings: Settings = keyed(tmp_path, ["http://127.0.0.1:9"], store=store)
    assert (Admission(settings).sole is not None) == (store == "memory")
    assert Admission(settings_for(["http://127.0.0.1:9"], store=store)).sole is None
