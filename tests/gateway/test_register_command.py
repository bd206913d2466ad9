"""`tidegate register` as a process of its own: beside an engine, in its place, and while gateways come and go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from gateway import cli
from loadtests.engine import FakeEngine
from loadtests.ports import free_port
from tests.support.command import clean_environ, serve_process
from tests.support.registrations import StandIn

PATIENCE_S = 30.0

ENGINE = """
import asyncio, signal, sys
from loadtests.engine import FakeEngine
async def main():
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, gate.set)
    print("the engine says hello", flush=True)
    print("Load weight begin. avail mem=78.43 GB", file=sys.stderr, flush=True)
    print("\\rLoading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01]", file=sys.stderr, flush=True)
    await gate.wait()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with FakeEngine(ports=(PORT,)):
        await stop.wait()
    print("the engine says goodbye", flush=True)
    sys.exit(7)
asyncio.run(main())
"""


@dataclass
class Running:
    """A `tidegate register`, with every wait for it bounded."""

    process: asyncio.subprocess.Process
    said: str = ""
    """On standard error."""
    out: str = ""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        await asyncio.gather(self._read(self.process.stdout, "out"), self._read(self.process.stderr, "said"))

    async def _read(self, stream: asyncio.StreamReader, name: str) -> None:
        while piece := await stream.read(65536):
            setattr(self, name, getattr(self, name) + piece.decode())
            self._changed.set()

    async def until_said(self, text: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while text not in self.said + self.out:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pytest.fail(f"never said {text!r}:\n{self.said}\n{self.out}")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def registering(
    folder: Path, *gateways: StandIn | str, url: str = "", options: tuple[str, ...] = (), command: tuple[str, ...] = ()
) -> AsyncIterator[Running]:
    """`tidegate register` for the replica r0 of the pool `pool`, killed at the end of the block."""
    token = folder / "token"
    if not token.exists():
        token.write_text("registrar-token\n")
    where = [each if isinstance(each, str) else each.url for each in gateways]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "register", "--pool", "pool", "--name", "r0", "--replica-url", url),
        *(word for each in where for word in ("--gateway", each)),
        *("--token-file", str(token)),
        *options,
        *(("--", *command) if command else ()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environ({"PYTHONUNBUFFERED": "1"}),
    )
    running = Running(process)
    reading = asyncio.create_task(running.read())
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        async with asyncio.timeout(PATIENCE_S):
            await reading


def engine_command(port: int) -> tuple[str, ...]:
    return (sys.executable, "-c", ENGINE.replace("PORT", str(port)))


async def test_a_replica_is_registered_renewed_and_drained_before_it_is_taken_out(tmp_path: Path) -> None:
    async with StandIn(in_flight=2) as gateway, FakeEngine() as engine:
        given = ("--region", "eu-west", "--weight", "2", "--engine", "vllm")
        async with registering(tmp_path, gateway, url=engine.url, options=given) as register:
            await gateway.until(lambda: gateway.state("r0") == "ready")
            assert gateway.puts[0] == {
                "url": engine.url,
                "name": "r0",
                "region": "eu-west",
                "weight": 2.0,
                "engine": "vllm",
            }
            await gateway.asked_again(3)
            register.signal(signal.SIGTERM)
            await gateway.until(lambda: gateway.state("r0") == "draining")
            await gateway.asked_again(3)
            assert gateway.state("r0") == "draining"  # there are requests under way
            gateway.in_flight = 0
            await gateway.until(lambda: gateway.state("r0") is None)
            assert await register.ended() == 0
            assert gateway.events == [("put ready", "r0"), ("put draining", "r0"), ("delete", "r0")]
            assert register.said.count("registered as pool/r0 (ready)") == 1


async def test_a_second_signal_does_not_wait_for_requests(tmp_path: Path) -> None:
    async with (
        StandIn(in_flight=2) as gateway,
        FakeEngine() as engine,
        registering(tmp_path, gateway, url=engine.url) as register,
    ):
        await gateway.until(lambda: gateway.state("r0") == "ready")
        register.signal(signal.SIGINT)
        await gateway.until(lambda: gateway.state("r0") == "draining")
        register.signal(signal.SIGTERM)
        assert await register.ended() == 0
        assert gateway.members == {}


async def test_a_drain_ends_in_time_and_says_who_is_left(tmp_path: Path) -> None:
    async with (
        StandIn(in_flight=2) as gateway,
        FakeEngine() as engine,
        registering(tmp_path, gateway, url=engine.url, options=("--drain-s", "1")) as register,
    ):
        await gateway.until(lambda: gateway.state("r0") == "ready")
        register.signal(signal.SIGTERM)
        assert await register.ended() == 0
        assert f"not empty after 1 s: 2 at {gateway.url}" in register.said


async def test_an_engine_that_does_not_answer_leaves_and_comes_back(tmp_path: Path) -> None:
    async with (
        StandIn() as gateway,
        FakeEngine() as engine,
        registering(tmp_path, gateway, url=engine.url, options=("--ready-path", "/health")) as register,
    ):
        await gateway.until(lambda: gateway.state("r0") == "ready")
        await engine.stop()
        await gateway.until(lambda: gateway.state("r0") is None)
        assert "taken out until it does" in register.said
        await engine.start()
        await gateway.until(lambda: gateway.state("r0") == "ready")


async def test_an_engine_that_was_never_ready_is_not_registered(tmp_path: Path) -> None:
    async with StandIn() as gateway, FakeEngine() as engine:
        engine.probe = engine.probe.updated({"status": 503})
        async with registering(tmp_path, gateway, url=engine.url) as register:
            await register.until_said("waiting for the engine")
            register.signal(signal.SIGTERM)
            assert await register.ended() == 0
        assert gateway.asked == 0


async def test_a_gateway_that_is_away_is_told_when_it_comes_and_again_when_it_has_forgotten(tmp_path: Path) -> None:
    gateway = StandIn()
    await gateway.start()
    await gateway.stop()
    async with FakeEngine() as engine, registering(tmp_path, gateway, url=engine.url) as register:
        await register.until_said("no gateway answers at")
        await gateway.start()
        await gateway.until(lambda: gateway.state("r0") == "ready")
        await gateway.stop()
        gateway.members.clear()
        await register.until_said("trying on\ntidegate register: registered")
        said = register.said.count("no gateway answers")
        await gateway.start()
        await gateway.until(lambda: gateway.state("r0") == "ready")
        assert register.said.count("no gateway answers") <= said + 2  # once for each reason, not for each attempt
    await gateway.stop()


async def test_a_gateway_that_stays_away_does_not_hold_up_the_end_for_longer_than_its_lease(tmp_path: Path) -> None:
    async with (
        StandIn(ttl_s=1.0) as gateway,
        FakeEngine() as engine,
        registering(tmp_path, gateway, url=engine.url) as register,
    ):
        await gateway.until(lambda: gateway.state("r0") == "ready")
        await gateway.stop()
        register.signal(signal.SIGTERM)
        assert await register.ended() == 0
        assert "not every gateway has heard" in register.said


@pytest.mark.parametrize("at_first", [True, False])
async def test_a_gateway_that_refuses_does_not_hold_up_the_end_for_longer_than_its_lease(
    tmp_path: Path, at_first: bool
) -> None:
    refusal = (403, "registration_refused", "Not from there.")
    async with (
        StandIn(ttl_s=1.0, refusal=refusal if at_first else None) as gateway,
        FakeEngine() as engine,
        registering(tmp_path, gateway, url=engine.url) as register,
    ):
        if not at_first:
            await gateway.until(lambda: gateway.state("r0") == "ready")
        gateway.refusal = refusal
        await register.until_said("refuses (403)")
        register.signal(signal.SIGTERM)
        assert await register.ended() == 0


async def test_each_gateway_is_told_and_each_must_be_empty(tmp_path: Path) -> None:
    async with (
        StandIn() as one,
        StandIn(in_flight=1) as other,
        FakeEngine() as engine,
        registering(tmp_path, one, other, url=engine.url) as register,
    ):
        await one.until(lambda: one.state("r0") == "ready")
        await other.until(lambda: other.state("r0") == "ready")
        register.signal(signal.SIGTERM)
        await other.until(lambda: other.state("r0") == "draining")
        await one.asked_again(3)
        assert one.state("r0") == "draining"
        other.in_flight = 0
        assert await register.ended() == 0
        assert (one.members, other.members) == ({}, {})


async def test_a_new_token_in_the_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("an-old-one")
    async with (
        StandIn() as gateway,
        FakeEngine() as engine,
        registering(tmp_path, gateway, url=engine.url) as register,
    ):
        await register.until_said("refuses (401)")
        (tmp_path / "token").write_text("registrar-token")
        await gateway.until(lambda: gateway.state("r0") == "ready")
        assert "an-old-one" not in register.said


# -- in the engine's place


async def test_a_command_is_registered_as_starting_then_ready_and_ended_when_it_is_empty(tmp_path: Path) -> None:
    port = free_port()
    async with StandIn(in_flight=1) as gateway:
        async with registering(
            tmp_path,
            gateway,
            url=f"http://127.0.0.1:{port}",
            options=("--engine", "sglang"),
            command=engine_command(port),
        ) as register:
            await gateway.until(lambda: any(each.get("progress") == 0.5 for each in gateway.puts))
            starting = next(each for each in gateway.puts if each.get("progress") == 0.5)
            assert (starting["state"], starting["phase"]) == ("starting", "loading")
            child = await asyncio.to_thread(_child, register.process.pid)
            os.kill(child, signal.SIGUSR1)
            await gateway.until(lambda: gateway.state("r0") == "ready")
            assert 0 < gateway.members["r0"]["started_in_s"] < 60
            assert "phase" not in gateway.members["r0"]
            register.signal(signal.SIGTERM)
            await gateway.until(lambda: gateway.state("r0") == "draining")
            await gateway.asked_again(3)
            assert "goodbye" not in register.out  # the engine has not been told anything yet
            gateway.in_flight = 0
            assert await register.ended() == 7
        assert "the engine says hello" in register.out
        assert "the engine says goodbye" in register.out
        assert "50% Completed" in register.said
        assert gateway.members == {}


async def test_a_command_that_ends_by_itself_is_taken_out_at_once(tmp_path: Path) -> None:
    async with StandIn() as gateway:
        command = (sys.executable, "-c", "print('last words', flush=True); raise SystemExit(5)")
        async with registering(tmp_path, gateway, url=f"http://127.0.0.1:{free_port()}", command=command) as register:
            assert await register.ended() == 5
        assert "last words" in register.out
        assert gateway.members == {}


async def test_a_command_that_ignores_sigterm_is_killed_with_all_its_processes(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 1000 & echo child $!; echo up; wait; wait"
    async with (
        StandIn() as gateway,
        registering(
            tmp_path,
            gateway,
            url=f"http://127.0.0.1:{free_port()}",
            options=("--stop-s", "0.5"),
            command=("sh", "-c", script),
        ) as register,
    ):
        await register.until_said("up")
        child = int(re.findall(r"child (\d+)", register.out)[0])
        register.signal(signal.SIGTERM)
        assert await register.ended() == 128 + signal.SIGKILL
        await asyncio.to_thread(_gone, child)


async def test_a_command_ended_by_our_sigterm_is_done(tmp_path: Path) -> None:
    async with (
        StandIn() as gateway,
        registering(
            tmp_path,
            gateway,
            url=f"http://127.0.0.1:{free_port()}",
            command=("sh", "-c", "echo up; exec sleep 1000"),
        ) as register,
    ):
        await register.until_said("up")
        register.signal(signal.SIGTERM)
        assert await register.ended() == 0


async def test_a_command_does_not_outlive_a_killed_register(tmp_path: Path) -> None:
    async with (
        StandIn() as gateway,
        registering(
            tmp_path,
            gateway,
            url=f"http://127.0.0.1:{free_port()}",
            command=("sh", "-c", "echo up; exec sleep 1000"),
        ) as register,
    ):
        await register.until_said("up")
        child = await asyncio.to_thread(_child, register.process.pid)
        register.signal(signal.SIGKILL)
        await register.ended()
        await asyncio.to_thread(_gone, child)


async def test_a_command_that_is_not_there_says_so(tmp_path: Path) -> None:
    async with StandIn() as gateway:
        url = f"http://127.0.0.1:{free_port()}"
        async with registering(tmp_path, gateway, url=url, command=("/no/such/engine",)) as register:
            assert await register.ended() == 127
        assert "cannot run /no/such/engine" in register.said


# -- once


async def test_leave_drains_removes_and_ends(tmp_path: Path) -> None:
    async with StandIn(in_flight=1) as gateway:
        url = "http://127.0.0.1:1"
        async with registering(tmp_path, gateway, url=url, options=("--leave",)) as register:
            await gateway.until(lambda: gateway.state("r0") == "draining")
            await gateway.asked_again(2)
            gateway.in_flight = 0
            assert await register.ended() == 0
        assert gateway.events == [("put draining", "r0"), ("delete", "r0")]


async def test_leave_that_is_refused_fails(tmp_path: Path) -> None:
    async with StandIn(refusal=(403, "forbidden", "Not for you.")) as gateway:
        async with registering(tmp_path, gateway, url="http://127.0.0.1:1", options=("--leave",)) as register:
            assert await register.ended() == 1
        assert "refuses (403): Not for you" in register.said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--replica-url", "10.0.0.5:30000"), "--replica-url: "),
        (("--replica-url", "http+unix://%2Frun%2Fx.sock"), "gateways take no sockets"),
        (("--replica-url", "http://10.0.0.5:1", "--engine", "sgland"), "--engine: 'sgland' is none of sglang"),
        (("--replica-url", "http://10.0.0.5:1", "--ready-path", "health"), "does not begin with /"),
        (("--replica-url", "http://10.0.0.5:1", "--leave", "--", "x"), "--leave takes a replica out"),
        (("--replica-url", "http://10.0.0.5:1", "--gateway", "localhost"), "is not a URL such as"),
        (("--replica-url", "http://10.0.0.5:1", "--weight", "0"), "'0' is not a weight above 0"),
        (("--replica-url", "http://10.0.0.5:1", "--token-file", "/no/token"), "--token-file /no/token: No such file"),
        (
            ("--replica-url", "http://10.0.0.5:1", "--gateway", "https://h", "--ca-file", "/no/ca"),
            "--ca-file /no/ca: ",
        ),
    ],
)
def test_options_that_cannot_be_used_are_said(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_ADMIN__TOKEN", "x" * 32)
    try:
        code = cli.main(["register", "--pool", "p", *options])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    assert said in capsys.readouterr().err


# -- with a real gateway


async def test_a_real_gateway_serves_a_registered_replica_and_loses_no_stream_when_it_goes(tmp_path: Path) -> None:
    backend = {"pool": {"engine": "openai", "discovery": {"registration": {"ttl_s": 3}}}}
    async with (
        FakeEngine(chunks=30, interval_s=0.1) as engine,
        serve_process(tmp_path, [], backends=backend) as gateway,
        httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        admin, url = await gateway.admin_url(), await gateway.url()
        (tmp_path / "token").write_text(gateway.token)
        async with registering(tmp_path, admin, url=engine.url) as register:
            await register.until_said("registered as pool/r0 (ready)")
            members = (await gateway.admin(client, "/admin/members")).json()["pools"][0]["members"]
            assert [(each["name"], each["in_pool"]) for each in members] == [("r0", True)]
            question = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
            async with client.stream("POST", f"{url}/v1/chat/completions", json=question) as answer:
                assert answer.status_code == 200
                register.signal(signal.SIGTERM)
                text = (await answer.aread()).decode()
            assert text.rstrip().endswith("data: [DONE]")
            assert text.count('"content"') >= 30
            assert await register.ended() == 0
            assert "it is empty" in register.said
        members = (await gateway.admin(client, "/admin/members")).json()["pools"][0]["members"]
        assert members == []


def _child(pid: int) -> int:
    """The one child of a process, once there is one."""
    end_s = time.monotonic() + PATIENCE_S
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < end_s
        time.sleep(0.01)
    return int(found[0])


def _gone(pid: int) -> None:
    """Returns when a process has ended."""
    end_s = time.monotonic() + PATIENCE_S
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rsplit(") ", 1)[1][0] != "Z":
            assert time.monotonic() < end_s
            time.sleep(0.01)
