"""Replicas from EndpointSlices: listed once, then watched, as every Kubernetes controller does it.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
A list gives the state and its version; a watch tells the changes since then, one JSON object a line. A watch that ends
or breaks off is begun again from the last version that was heard of (bookmarks move it on while nothing changes); only
when the API server has forgotten that version, which it says by 410, or has said something odd, is all listed anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import msgspec

from backends.discovery.member import Member
from backends.kubernetes.client import Access, Cluster, connect, error_event
from backends.kubernetes.errors import ApiAnswered, ApiAway, Expired, KubernetesError
from backends.kubernetes.slices import EndpointSlice, EndpointSliceList, Event, Found, Wanted, members_of
from backends.kubernetes.threads import blocking

Tell = Callable[[Sequence[Member]], None]
Trouble = Callable[[str], None]

PAGE = 100
"""Slices asked for at once; with 100 endpoints each, 5 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things may take. In seconds."""

    list_s: float = 10.0
    """For a page of the list."""
    watch_s: int = 120
    """For which the server is asked to keep a watch up; then it is begun again where it ended. Shorter than the five
    minutes of other clients: a connection that a broken middlebox keeps open is noticed no later than this."""
    silence_s: float = 10.0
    """For which a watch may be silent longer than it should last."""
    first_retry_s: float = 0.5
    last_retry_s: float = 30.0
    """Each pause after a failure is twice the last one, up to this, less a random part of up to a half."""
    settled_s: float = 5.0
    """A watch that lasted for so long, or told anything, was a good one."""
    gather_s: float = 0.05
    """For which changes are gathered before they are told: a rolling update changes several slices at once."""


class KubernetesSource:
    """The members of one pool, as the endpoints of a service (`discovery.kubernetes`). One event loop's.

    Blocking calls run in one thread at a time, which ends with `run`.
    """

    def __init__(
        self,
        access: Access,
        wanted: Wanted,
        *,
        timing: Timing | None = None,
        rng: Random | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._access = access
        self._wanted = wanted
        self._timing = timing or Timing()
        self._rng = rng or Random()
        self._environ = environ

    async def run(self, tell: Tell, trouble: Trouble) -> None:
        """See `Source`. Slices that cannot be used are `trouble` too, said after the members that the others have."""
        view = _View(self._wanted, tell, trouble, self._timing.gather_s)
        failures = 0
        try:
            while True:
                wait_s = 0.0
                view.heard = False
                try:
                    await self._follow(view)
                except KubernetesError as error:
                    if isinstance(error, ApiAnswered):
                        view.version = None  # it is there, and does not like what it was asked for
                        wait_s = error.retry_after_s
                    if not isinstance(error, Expired):
                        view.trouble(str(error))
                failures = 0 if view.heard else min(failures + 1, 20)
                await asyncio.sleep(max(wait_s, self._pause_s(failures)))
        finally:
            view.close()

    async def _follow(self, view: _View) -> None:
        """Connect, list if need be, and watch until something goes wrong."""
        cluster = await blocking(lambda: connect(self._access, self._environ), lambda: None)
        try:
            while True:
                if view.version is None:
                    await self._list(cluster, view)
                if not await self._watch(cluster, view):
                    raise ApiAway(f"{cluster.address}: the watch ended as soon as it had begun")
        finally:
            cluster.close()

    async def _list(self, cluster: Cluster, view: _View) -> None:
        selector, slices, token = self._wanted.selector(), list[EndpointSlice](), ""
        while True:
            page = await blocking(functools.partial(self._page, cluster, selector, token), cluster.close)
            slices += page.items or ()
            token = page.metadata.token or ""
            if not token:
                view.listed(slices, page.metadata.resource_version)
                return

    def _page(self, cluster: Cluster, selector: str, token: str) -> EndpointSliceList:
        data = cluster.list_slices(selector, PAGE, token, self._timing.list_s)
        try:
            return msgspec.json.decode(data, type=EndpointSliceList)
        except msgspec.MsgspecError as error:
            raise _odd(cluster, error) from error

    async def _watch(self, cluster: Cluster, view: _View) -> bool:
        """Read one watch to its end. Whether it was a good one."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        view.heard = False
        # Not all gateways, and not all pools of one, at the same moment.
        watch_s = max(1, round(self._timing.watch_s * self._rng.uniform(0.8, 1.0)))

        def work() -> None:
            lines = cluster.watch_slices(
                self._wanted.selector(),
                view.version or "",
                watch_s,
                self._timing.silence_s,
                lambda: loop.call_soon_threadsafe(view.opened),
            )
            with contextlib.closing(lines):
                for line in lines:
                    loop.call_soon_threadsafe(view.changed, *_read(cluster, line))

        await blocking(work, cluster.close)
        if loop.time() - began >= self._timing.settled_s:
            view.heard = True
        elif view.heard:
            await asyncio.sleep(self._pause_s(0))
        return view.heard

    def _pause_s(self, failures: int) -> float:
        timing = self._timing
        full = min(timing.first_retry_s * 2.0 ** max(failures - 1, 0), timing.last_retry_s)
        return full * self._rng.uniform(0.5, 1.0)


class _View:
    """The slices as known now, and what was told of them."""

    def __init__(self, wanted: Wanted, tell: Tell, trouble: Trouble, gather_s: float) -> None:
        self.version: str | None = None
        """Of what is known; None: list anew."""
        self.heard = False
        """Whether the watch under way has told anything."""
        self.trouble = trouble
        self._wanted = wanted
        self._tell = tell
        self._gather_s = gather_s
        self._slices: dict[str, EndpointSlice] = {}
        self._found: Found | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._closed = False

    def listed(self, slices: Sequence[EndpointSlice], version: str) -> None:
        self._slices = {one.metadata.name: one for one in slices}
        self.version = version
        self._found = None
        self._say()

    def opened(self) -> None:
        """A watch has begun: what was told holds, whatever trouble there was."""
        if not self._closed:
            self._say()

    def changed(self, kind: str, found: EndpointSlice) -> None:
        """`kind`: of the event. A BOOKMARK's object has a version and nothing else."""
        if self._closed:
            return
        self.heard = True
        self.version = found.metadata.resource_version or self.version
        if kind == "BOOKMARK":
            return
        if kind == "DELETED":
            self._slices.pop(found.metadata.name, None)
        else:
            self._slices[found.metadata.name] = found
        self._found = None
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(self._gather_s, self._say)

    def close(self) -> None:
        """Tell nothing more. The thread may still have handed something over."""
        self._closed = True
        if self._telling is not None:
            self._telling.cancel()

    def _say(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        if self._found is None:
            self._found = members_of(self._slices.values(), self._wanted)
        self._tell(self._found.members)
        if self._found.problems:
            self.trouble("; ".join(self._found.problems))


def _read(cluster: Cluster, line: bytes) -> tuple[str, EndpointSlice]:
    """An event's kind and object. Raises for an ERROR, and for what is none."""
    try:
        event = msgspec.json.decode(line, type=Event)
        if event.type == "ERROR":
            raise error_event(cluster, bytes(event.object))
        return event.type, msgspec.json.decode(event.object, type=EndpointSlice)
    except msgspec.MsgspecError as error:
        raise _odd(cluster, error) from error


def _odd(cluster: Cluster, error: Exception) -> ApiAnswered:
    return ApiAnswered(f"what {cluster.address} sent is no EndpointSlice: {error}", status=502)
