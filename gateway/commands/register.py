"""`tidegate register`: tells gateways of a replica for as long as it answers, and takes it out with no request lost.

A replica is registered when its engine is ready, leaves when that no longer answers, and comes back by itself. At
SIGTERM or Ctrl-C it is `draining`: it gets nothing new, and is taken out when it is empty. A second signal hurries.

With a COMMAND this is the parent of the engine: it registers it as `starting` with its progress, ends it once it is
empty, and ends with it.

Exit codes: 0 done, the exit code of COMMAND where there is one; 1 it could not be taken out; 2 the command line or the
token cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from random import Random
from urllib.parse import urlsplit

import msgspec
from pydantic_core import PydanticCustomError

from backends.dialects import DIALECTS
from backends.discovery.member import Member, State
from backends.discovery.naming import name_of
from backends.discovery.registrar import Registrar
from backends.launch.progress import StartProgress
from backends.side import SideChannel
from gateway.commands.register_engine import CHECK_WITHIN_S, Checks, Engine
from gateway.commands.register_telling import Telling
from gateway.config.urls import parse_address
from gateway.operate import DONE, FAILED, UNUSABLE, Gateway, Problem, find, plain

PROGRESS_S = 1.0
"""Progress of a start is told no more often."""
LOOK_S = 1.0
"""How often a drain is looked at when nothing is heard."""
HURRIED_REMOVE_WITHIN_S = 1.0
REMOVE_WITHIN_S = 5.0
"""For the last word to gateways; those that do not hear it go by the end of the lease."""
_SHOWN_PHASES = ("downloading", "loading", "compiling", "warming")


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Register until a signal comes or the command ends; returns the exit code."""
    try:
        member = _member(options)
        gateways = _gateways(options, environ)
        return asyncio.run(_run(options, environ, member, gateways))
    except Problem as problem:
        print(f"tidegate register: {problem}", file=sys.stderr)
        return problem.exit_code


def _say(text: str) -> None:
    print(f"tidegate register: {plain(text)}", file=sys.stderr, flush=True)


def _member(options: argparse.Namespace) -> Member:
    """The replica as the options describe it, ready. Raises `Problem`."""
    try:
        address = parse_address(options.replica_url)
    except PydanticCustomError as error:
        raise Problem(f"--replica-url: {error.message()}", UNUSABLE) from error
    if address.scheme == "http+unix":
        raise Problem("--replica-url: gateways take no sockets, which would be on their own machine", UNUSABLE)
    if options.engine is not None and options.engine not in DIALECTS:
        raise Problem(f"--engine: {options.engine!r} is none of {', '.join(DIALECTS)}", UNUSABLE)
    if options.ready_path is not None and not options.ready_path.startswith("/"):
        raise Problem(f"--ready-path: {options.ready_path!r} does not begin with /", UNUSABLE)
    if options.leave and options.engine_command:
        raise Problem("--leave takes a replica out; it cannot start one", UNUSABLE)
    parts = urlsplit(address.url)
    return Member(
        url=address.url,
        name=options.name or name_of(options.pool, parts.hostname or "", parts.port or 0),
        engine=options.engine,
        upstream_model=options.upstream_model,
        region=options.region,
        weight=options.weight,
        max_in_flight=options.max_in_flight,
        kv_events=options.kv_events,
    )


def _gateways(options: argparse.Namespace, environ: Mapping[str, str]) -> list[Gateway]:
    """Those to tell, each once, with the token as `tidegate drain` finds it. Raises `Problem`."""
    urls: Sequence[str | None] = list(dict.fromkeys(options.gateway)) or [None]
    return [find(argparse.Namespace(**{**vars(options), "url": url}), environ) for url in urls]


async def _run(
    options: argparse.Namespace, environ: Mapping[str, str], member: Member, gateways: Sequence[Gateway]
) -> int:
    async with contextlib.AsyncExitStack() as stack:
        tellings = []
        for gateway in gateways:
            try:
                registrar = Registrar(gateway.url, gateway.token, options.ca_file)
            except (OSError, ValueError) as error:
                what = "cannot be read as certificates" if isinstance(error, ssl.SSLError) else str(error)
                raise Problem(f"--ca-file {options.ca_file}: {what}", UNUSABLE) from error
            await stack.enter_async_context(registrar)

            def new_token(url: str = gateway.url) -> str | None:
                with contextlib.suppress(Problem):
                    return find(argparse.Namespace(**{**vars(options), "url": url}), environ).token
                return None

            tellings.append(
                Telling(registrar, options.pool, member.name, time.monotonic, Random(), _say, new_token=new_token)
            )
        address = parse_address(member.url)
        side = SideChannel(origin=address.origin, path_prefix=address.path_prefix, timeout_s=CHECK_WITHIN_S)
        stack.push_async_callback(side.aclose)
        checks = Checks(side, options.ready_path, options.engine)
        return await Registering(options, environ, member, tellings, checks).run()


class Registering:
    """One replica from its start to its end."""

    def __init__(
        self,
        options: argparse.Namespace,
        environ: Mapping[str, str],
        member: Member,
        tellings: Sequence[Telling],
        checks: Checks,
    ) -> None:
        self._options = options
        self._environ = environ
        self._member = member
        self._tellings = tellings
        self._checks = checks
        self._progress = StartProgress(member.engine or "")
        self._progress_told_s = 0.0
        self._started_s = 0.0
        self._was_ready = False
        self._waiting_said = False
        self._signals = 0
        self._signalled = asyncio.Event()
        self._changed = asyncio.Event()
        self._engine: Engine | None = None
        for telling in tellings:
            telling.changed = self._changed.set

    async def run(self) -> int:
        """Until a signal or the command's end; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)
        tasks = [asyncio.create_task(telling.run()) for telling in self._tellings]
        try:
            if self._options.leave:
                await self._drain()
                return DONE if await self._remove() else FAILED
            if self._options.engine_command:
                return await self._with_command()
            await self._until_signal()
            await self._drain()
            await self._remove()
            return DONE
        finally:
            if self._engine is not None:  # only after a defect is it still there
                self._engine.kill()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _signal(self) -> None:
        self._signals += 1
        if self._signals == 2:
            _say("a second signal: not waiting for requests under way")
        if self._signals >= 3 and self._engine is not None:
            self._engine.kill()
        self._signalled.set()
        self._changed.set()

    # -- while it serves

    async def _until_signal(self) -> None:
        """Watch the engine, and have gateways know."""
        while True:
            ready = await self._checks.check()
            if self._signalled.is_set():
                return
            self._follow(ready)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._checks.pause_s):
                    await self._signalled.wait()

    def _follow(self, ready: bool) -> None:
        """Tell what the engine's last check means."""
        if ready:
            if not self._was_ready and self._engine is not None:
                took_s = round(time.monotonic() - self._started_s, 3)
                self._member = msgspec.structs.replace(self._member, started_in_s=took_s)
            self._was_ready = True
            self._want("ready")
        elif self._engine is not None and not self._was_ready:
            self._tell_progress()
        else:
            if self._tellings[0].wanted is not None:
                _say(f"the engine does not answer ({self._checks.reason}): taken out until it does")
            elif not self._waiting_said and not self._was_ready:
                self._waiting_said = True
                _say(f"waiting for the engine ({self._checks.reason})")
            self._want(None)

    def _want(self, state: State | None) -> None:
        wanted = None if state is None else msgspec.structs.replace(self._member, state=state)
        for telling in self._tellings:
            telling.want(wanted)

    def _tell_progress(self) -> None:
        """As `starting`, at most once in `PROGRESS_S`."""
        now_s = time.monotonic()
        if now_s - self._progress_told_s < PROGRESS_S:
            return
        self._progress_told_s = now_s
        progress = self._progress
        starting = msgspec.structs.replace(
            self._member,
            state="starting",
            phase=progress.phase if progress.phase in _SHOWN_PHASES else "",
            progress=progress.progress,
            detail=progress.detail,
        )
        for telling in self._tellings:
            telling.want(starting)

    # -- with a command

    async def _with_command(self) -> int:
        self._started_s = time.monotonic()
        try:
            self._engine = await Engine.start(self._options.engine_command, _without_token(self._environ), self._read)
        except OSError as error:
            raise Problem(f"the command cannot be started: {error.strerror or error}", FAILED) from error
        ended = asyncio.create_task(self._engine.ended())
        serving = asyncio.create_task(self._serve_and_drain())
        try:
            await asyncio.wait({ended, serving}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                _say(f"the engine has ended with exit code {ended.result()}")
                await self._remove()
            else:
                serving.result()
                await self._remove()
                await self._engine.stop(self._options.stop_s)
            return await ended
        finally:
            ended.cancel()
            serving.cancel()

    async def _serve_and_drain(self) -> None:
        await self._until_signal()
        await self._drain()

    def _read(self, line: str) -> None:
        """A line that the engine has written."""
        if not self._was_ready and self._progress.read(line) and not self._signals:
            self._tell_progress()

    # -- its end

    async def _drain(self) -> None:
        """Have gateways send nothing more, and wait until no request is under way; or for a second signal."""
        leaving = bool(self._options.leave)
        if not leaving and not (self._was_ready and any(telling.known for telling in self._tellings)):
            return  # it never got any
        self._want("draining")
        hurried = self._signals + 1
        _say(f"draining {self._options.pool}/{self._member.name}, for {self._options.drain_s:g} s at most")
        try:
            async with asyncio.timeout(self._options.drain_s):
                while self._signals < hurried and not await self._is_empty():
                    self._changed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await self._changed.wait()
        except TimeoutError:
            busy = [f"{each.lease.in_flight} at {each.registrar.address}" for each in self._tellings if each.lease]
            _say(f"not empty after {self._options.drain_s:g} s: {', '.join(busy) or 'no gateway says anything'}")
            return
        if self._signals < hurried:
            _say("it is empty")

    async def _is_empty(self) -> bool:
        """No gateway has a request under way here; where one does not say, the engine must not say otherwise."""
        if self._options.leave and all(telling.refused is not None for telling in self._tellings):
            return True  # nothing can be done here, which `_remove` says
        if not all(telling.empty() for telling in self._tellings):
            return False
        told = all(telling.away_since_s is None and telling.refused is None for telling in self._tellings)
        return told or not await self._checks.busy()

    async def _remove(self) -> bool:
        """Whether all gateways have taken it out."""
        refused = [telling.refused for telling in self._tellings if telling.refused is not None]
        self._want(None)
        try:
            async with asyncio.timeout(REMOVE_WITHIN_S if self._signals < 2 else HURRIED_REMOVE_WITHIN_S):
                while not all(telling.settled for telling in self._tellings):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            _say("not every gateway has heard that it goes; there its lease ends by itself")
            return False
        return not refused


def _without_token(environ: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment is not to have what registers it."""
    return {name: value for name, value in environ.items() if name.upper() != "TIDEGATE_ADMIN__TOKEN"}
