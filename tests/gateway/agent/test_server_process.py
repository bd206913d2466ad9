from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from gateway.agent.process import ServerProcess, StartError
from tests.support.launching import none_left, processes_with

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="no other kernel lets orphans be found")
FAMILY = """
import subprocess, sys, time
sleeper = [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]]
subprocess.Popen(sleeper)
subprocess.Popen(sleeper, start_new_session=True)
print("ready", flush=True)
time.sleep(600)
"""


async def started(tmp_path: Path) -> ServerProcess:
    command = [sys.executable, "-c", FAMILY, str(tmp_path)]
    process = await ServerProcess.start(command, tmp_path / "logs" / "x.log", dict(os.environ))
    async with asyncio.timeout(20):
        while "ready" not in process.log.last():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert len(processes_with(f"\0{tmp_path}\0")) == 4
    return process


@only_linux
async def test_nothing_is_left_when_the_guard_itself_is_killed(tmp_path: Path) -> None:
    process = await started(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    assert await asyncio.wait_for(process.ended(), 20) == "was ended by SIGKILL"
    await none_left(f"\0{tmp_path}\0")


@only_linux
async def test_killing_a_server_leaves_nothing_either(tmp_path: Path) -> None:
    process = await started(tmp_path)
    process.kill()
    process.kill()
    assert await asyncio.wait_for(process.ended(), 20) == "was ended by SIGKILL"
    assert not process.running
    await none_left(f"\0{tmp_path}\0")


@only_linux
async def test_server_that_is_told_to_end_takes_its_children_with_it(tmp_path: Path) -> None:
    process = await started(tmp_path)
    process.terminate()
    assert await asyncio.wait_for(process.ended(), 20) == "was ended by SIGTERM"
    process.terminate()
    await none_left(f"\0{tmp_path}\0")


async def test_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(StartError, match=r"was not started: its log .*x\.log: File exists"):
        await ServerProcess.start(["true"], tmp_path / "logs" / "x.log", {})
