"""One server that is kept running: its decisions (`keeping`) carried out, its questions asked, its log read."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backends.dialects import Dialect
from backends.dialects.protocol import NotOffered, Readiness
from backends.discovery.member import Member, State
from backends.discovery.registrar import Lease
from backends.launch.progress import PORT_IN_USE, StartProgress, why_it_ended
from backends.side import SideChannel, SideChannelError
from gateway.agent.keeping import Answered, Doomed, Empty, Event, Exited, Keeper, Phase, Say, Silent
from gateway.agent.ports import who_has
from gateway.agent.process import ServerProcess, StartError

logger = logging.getLogger("tidegate")

STARTING_LOOK_S: Final = 0.5
READY_LOOK_S: Final = 2.0
"""As the gateway's own probes."""
READ_S: Final = 0.5
IDLE_LOOKS: Final = 3
"""Reports of the engine in a row that nothing runs, after which it is believed where no gateway can be asked."""
_BIND_ERROR: Final = "address already in use"
_SHOWN_PHASES = ("downloading", "loading", "compiling", "warming")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a server is started and asked, by the configuration as it is now."""

    command: Sequence[str]
    environ: Mapping[str, str]
    engine: str
    model: str
    dialect: Dialect
    headers: Sequence[tuple[str, str]]
    host: str
    port: int
    url: str
    timeout_s: float
    """For an answer to a probe."""
    answers: bool = True
    """False: a machine of a server on several, which the first of them answers for."""
    note: str = ""
    """For the terminal: its GPUs, and how long it took lately."""


class Server:
    """A place's server, until it is gone. Belongs to one event loop."""

    def __init__(
        self,
        pool: str,
        name: str,
        agent: str,
        log: Path,
        keeper: Keeper,
        plan: Callable[[], Plan],
        *,
        clock: Callable[[], float],
        say: Callable[[str, str], None],
        changed: Callable[[], None],
        gateways: Callable[[], Sequence[tuple[str, bool]]],
        spawn: Callable[[Server], None],
    ) -> None:
        """`plan` is asked at each start, and may raise `StartError`. `gateways`: their addresses, and whether each can
        be asked. `spawn` runs `self.run`."""
        self.pool, self.name, self.agent, self.keeper = pool, name, agent, keeper
        self.log = log
        self.process: ServerProcess | None = None
        self.current: Plan | None = None
        self._plan = plan
        self._clock, self._say, self._changed, self._gateways, self._spawn = clock, say, changed, gateways, spawn
        self._progress = StartProgress("")
        self._taken: set[str] = set()
        self._emptied: set[str] = set()
        self._idle_looks = 0

    def post(self, *events: Event) -> None:
        """Decide anew, and do what follows."""
        before = self.keeper.phase
        for action in self.keeper.decide(self._clock(), events):
            match action:
                case Say(text):
                    self._say(self.name, text)
                case "start":
                    self._spawn(self)
                case "terminate" if self.process is not None:
                    self.process.terminate()
                case "kill" if self.process is not None:
                    self.process.kill()
        if self.keeper.phase is not before or events:
            self._changed()

    # -- what it is, for the gateway

    def member(self) -> Member | None:
        """As it is registered; None: not at all."""
        plan, keeper = self.current, self.keeper
        if plan is None or not plan.answers or keeper.phase is Phase.GONE:
            return None
        state: State = "starting"
        if keeper.phase is Phase.READY:
            state = "ready"
        elif keeper.was_ready and keeper.phase in (Phase.DRAINING, Phase.STOPPING):
            state = "draining"
        starting = keeper.phase is Phase.STARTING
        detail = self._progress.detail if starting else keeper.trouble
        if keeper.phase is Phase.WAITING and keeper.trouble:
            detail = f"{keeper.trouble}; is started again"
        return Member(
            url=plan.url,
            name=self.name,
            engine=plan.engine,
            state=state,
            phase=self._progress.phase if starting and self._progress.phase in _SHOWN_PHASES else "",
            progress=self._progress.progress if starting else None,
            detail=detail[:500],
            started_in_s=None if keeper.started_in_s is None else round(keeper.started_in_s, 3),
            restarts=keeper.restarts,
            agent=self.agent,
        )

    def heard(self, gateway: str, told: Member, lease: Lease) -> None:
        """What a gateway answered to a registration."""
        phase = self.keeper.phase
        if told.state == "ready" and phase is Phase.READY and gateway not in self._taken:
            self._taken.add(gateway)
            self._changed()
        if told.state == "draining" and phase is Phase.DRAINING and lease.draining and lease.empty:
            self._emptied.add(gateway)
            self._whether_empty()

    @property
    def taken(self) -> bool:
        """Every gateway that can be asked has it among its replicas."""
        plan = self.current
        return (plan is not None and not plan.answers) or all(
            url in self._taken or not reachable for url, reachable in self._gateways()
        )

    def _whether_empty(self) -> None:
        """No gateway has anything under way here; for those that cannot be asked, the engine itself says so. Nothing is
        ever sent to the further machines of a server that spans several."""
        idle = self._idle_looks >= IDLE_LOOKS
        if (self.current is not None and not self.current.answers) or all(
            url in self._emptied or (idle and not reachable) for url, reachable in self._gateways()
        ):
            self.post(Empty())

    # -- its process

    async def run(self) -> None:
        """From a start to the end of that process."""
        self.process, self._taken, self._emptied, self._idle_looks = None, set(), set(), 0
        try:
            plan = self.current = self._plan()
            self._progress = StartProgress(plan.engine)
            await _check_free(plan)
            process = self.process = await ServerProcess.start(plan.command, self.log, plan.environ)
        except StartError as error:
            self.post(Exited(str(error)))
            return
        self._say(self.name, f"starting on {plan.url.removeprefix('http://')}{plan.note}; log: {self.log}")
        self._changed()
        if self.keeper.phase is Phase.STOPPING:  # it was told to, in the meantime
            process.terminate()
        how = ""
        try:
            how = await self._watched(process, plan)
        except Exception:
            logger.exception("%s: watching it has failed", self.name)
            process.kill()
            how = await process.ended()
        finally:
            if process.running:  # cancelled: the agent itself ends
                process.kill()
        # What is killed has no last words; the line before would be taken for them.
        why = "" if "SIGKILL" in how else why_it_ended(await asyncio.to_thread(process.log.last))
        if why.startswith(PORT_IN_USE):
            why += await _who_has(plan)
        self.process = None
        self.post(Exited(how, why))

    async def _watched(self, process: ServerProcess, plan: Plan) -> str:
        async with asyncio.TaskGroup() as group:
            watching = [group.create_task(self._read(process, plan)), group.create_task(self._look(plan))]
            how = await process.ended()
            for task in watching:
                task.cancel()
        return how

    async def _read(self, process: ServerProcess, plan: Plan) -> None:
        """Follow its log: for its progress, and so that it stays of bounded size."""
        while True:
            shown = self._progress.phase
            for line in await asyncio.to_thread(process.log.read):
                if self.keeper.phase is Phase.STARTING and self._progress.read(line):
                    self._changed()
                    if self._progress.phase != shown and self._progress.phase in _SHOWN_PHASES:
                        shown = self._progress.phase
                        self._say(self.name, shown)
            if self._progress.doomed and self.keeper.phase is Phase.STARTING:
                who = await _who_has(plan) if _BIND_ERROR in self._progress.detail else ""
                self.post(Doomed(f"said that it cannot start ({self._progress.detail}){who}"))
            await asyncio.sleep(READ_S)

    async def _look(self, plan: Plan) -> None:
        """Ask it how it is, again and again."""
        side = SideChannel(origin=plan.url, headers=plan.headers, timeout_s=plan.timeout_s)
        try:
            while True:
                phase = self.keeper.phase
                if phase in (Phase.STARTING, Phase.READY):
                    self.post(await _answer(plan, side))
                elif phase is Phase.DRAINING:
                    idle = await _idle(plan, side)
                    self._idle_looks = self._idle_looks + 1 if idle else 0
                    self._whether_empty()
                await asyncio.sleep(READY_LOOK_S if phase is Phase.READY else STARTING_LOOK_S)
        finally:
            await side.aclose()


async def _answer(plan: Plan, side: SideChannel) -> Event:
    if not plan.answers:
        return Answered()
    try:
        readiness = await plan.dialect.probe(side, plan.model)
    except SideChannelError as error:
        return Silent(str(error))
    except NotOffered:
        return Answered()
    # One that refuses the pool's key is there; the gateway, which is refused too, says so itself.
    return Silent("it says that it takes no work") if readiness is Readiness.NOT_READY else Answered()


async def _idle(plan: Plan, side: SideChannel) -> bool:
    """Whether the engine says itself that it has nothing to do."""
    if not plan.answers:
        return True
    try:
        load = await plan.dialect.load(side, None)
    except (SideChannelError, NotOffered):
        return False
    return load.running == 0 and not load.waiting


async def _check_free(plan: Plan) -> None:
    """Somebody else's server on the port would be taken for ours. Raises `StartError`."""
    if not plan.answers:
        return
    try:
        places = socket.getaddrinfo(plan.host, plan.port, type=socket.SOCK_STREAM)
        with socket.socket(places[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(places[0][4])
    except OSError as error:
        who = await _who_has(plan) if error.errno == errno.EADDRINUSE else ""
        raise StartError(f"was not started: {plan.host}:{plan.port}: {error.strerror or error}{who}") from error


async def _who_has(plan: Plan) -> str:
    """In brackets, after the words for a port that is in use."""
    who = await asyncio.to_thread(who_has, plan.host, plan.port)
    return f" ({who})" if who else ""
