"""Where the admin app gets what it shows: a worker in this process (`gateway.state`), or one behind a Unix socket.

Both answer in the same shapes, so that one process and many look alike to whoever scrapes or reads them. Both also do
what operators order: one worker does it, and all come to know through the store.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.accounts.counts import Counted
from gateway.accounts.limit_rows import LimitsAnswer, LimitsQuestion
from gateway.errors import GatewayError
from gateway.fleet_view.glance import Glance
from gateway.inspection.query import Query
from gateway.rollups.pulse import Pulse

ANSWER_WITHIN_S = 1.0
"""A worker that takes longer is left out. Its loop is stuck or it is starting; a scrape must not wait for that."""
EXPLAIN_WITHIN_S = 10.0
"""A request of megabytes before a thousand replicas, at a busy worker."""
LIST_WITHIN_S = 5.0
"""Some thousands of requests, at a busy worker."""
LIMITS_WITHIN_S = 5.0
"""Thousands of holders, read from a store that may be another machine."""
DRAIN_WITHIN_S = 10.0
"""Longer than the store may take, and than a worker waits to see its own change."""
ADAPTER_WITHIN_S = 300.0
"""An engine has 120 s to load an adapter (`ADAPTER_TIMEOUT_S` of its dialect), and is asked what it holds around it."""

WORKER_UP = "tidegate_worker_up"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")

T = TypeVar("T")


class Silent(Exception):
    """A worker did not answer, or not in full."""


class Refused(GatewayError):
    """A worker would not do what it was told; what it said is passed on as it is."""

    def __init__(self, status: int, message: str, type_: str, code: str | None, param: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.type = type_


class AdapterChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An order to load a LoRA adapter, or to unload it."""

    pool: str
    name: str
    path: str | None
    """Where the engines find it; None unloads."""
    replica: str | None = None
    """The only replica to do it; None: all of the pool."""


class AdapterResult(msgspec.Struct, frozen=True):
    """What came of an order at one replica."""

    replica: str
    ok: bool
    status: int = 200
    """200; 409 the engine refuses; 501 it cannot be told to; 502 it did not answer, or not so that it is known."""
    changed: bool = False
    reason: str | None = None
    """Why not; or, where it is ok, why nothing had to change."""


class Announcement(msgspec.Struct, frozen=True):
    """Something that all workers are to know (`gateway.notices`), or that no longer holds (None)."""

    key: str
    value: bytes | None
    ttl_s: float | None = None


class StoreClaim(msgspec.Struct, frozen=True):
    """A lease that somebody wants for `ttl_s` seconds."""

    lease: str
    holder: str
    ttl_s: float


class Source(Protocol):
    """One worker, as the admin app asks it. Every question may raise `Silent`."""

    @property
    def index(self) -> int:
        """The worker's number, counted from 0."""

    async def metrics(self) -> list[Metric]: ...

    async def fleet(self) -> dict[str, Any]:
        """What the worker is, serves and sees."""

    async def usage(self, limit: int) -> list[dict[str, Any]]:
        """At most `limit` usage records, the last settled first."""

    async def explain(self, question: bytes) -> dict[str, Any]:
        """Where a request would go and why (`gateway.explanation`). Raises `GatewayError`, as the request would."""

    async def policies(self) -> dict[str, Any]:
        """By which policies it decides, what their shadows have shown, and a `stamp` of its settings
        (`gateway.steering.at_worker`)."""

    async def traffic(self, model: str, limit: int) -> list[dict[str, Any]]:
        """The requests for a model that it has answered last (`gateway.steering.traffic`)."""

    async def drain(self, pool: str, replica: str, draining: bool) -> None:
        """Have all workers give a replica no new work, or give it work again. Raises `GatewayError`."""

    async def cordon(self, pool: str, replica: str, cordoned: bool) -> None:
        """Have all workers give a replica no new prompts, or give it any again. Raises `GatewayError`."""

    async def notices(self, kind: str) -> Mapping[str, bytes]:
        """What it has read of a kind of notices (`gateway.notices`), by their keys."""

    async def announce(self, key: str, value: bytes, ttl_s: float | None) -> None:
        """Post a notice to the store that all workers share. Raises `GatewayError`."""

    async def retract(self, key: str) -> None:
        """End a notice. Raises `GatewayError`."""

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        """Take a lease of the shared store, or renew it: whether `holder` has it. Raises `GatewayError`."""

    async def glance(self) -> Glance:
        """The replicas as it sees them, briefly."""

    async def pulse(self) -> Pulse:
        """Its counters and its state at a glance (`gateway.rollups`)."""

    async def requests(self, query: Query) -> dict[str, Any]:
        """Those that match: `live`, the oldest first, and `settled`, the last settled first."""

    async def request(self, request_id: str) -> dict[str, Any] | None:
        """All that is known of one request; None: this worker does not know it."""

    async def end_request(self, request_id: str) -> bool:
        """End a request that is under way; whether there was one."""

    async def change_adapter(self, change: AdapterChange) -> list[AdapterResult]:
        """Load or unload at each replica, through its engine; takes as long as they take. Raises `GatewayError`."""

    async def limits(self, question: LimitsQuestion) -> LimitsAnswer:
        """What limits are in force, and what is left of them. Raises `GatewayError`: the store may be away."""

    async def costs(self, life: str, turn: int) -> Counted:
        """What tenants have used since an earlier answer, which had this `life` and `turn`; "" and 0: in all."""


async def ask_all(
    sources: Sequence[Source], question: Callable[[Source], Coroutine[Any, Any, T]]
) -> list[tuple[int, T | None]]:
    """Every worker's answer, by its number; None for one that did not give any."""

    async def one(source: Source) -> tuple[int, T | None]:
        try:
            return source.index, await question(source)
        except Silent:
            return source.index, None

    return await asyncio.gather(*(one(source) for source in sources))


async def find_request(sources: Sequence[Source], request_id: str) -> dict[str, Any] | None:
    """What the worker that knows a request says of it; None: none of them does."""
    answers = await ask_all(sources, lambda source: source.request(request_id))
    return next((found for _, found in answers if found is not None), None)


class RemoteSource:
    """A worker in another process, asked through its own admin app."""

    def __init__(self, index: int, socket_path: str, *, timeout_s: float = ANSWER_WITHIN_S) -> None:
        self.index = index
        self._path = socket_path
        self._timeout_s = timeout_s

    async def metrics(self) -> list[Metric]:
        text = (await self._get("/metrics")).decode()
        return [family for family in text_string_to_metric_families(text) if family.name != WORKER_UP]

    async def fleet(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.json.decode(await self._get("/admin/fleet"))["workers"][0]
        return state

    async def glance(self) -> Glance:
        try:
            return msgspec.json.decode(await self._get("/worker/glance"), type=Glance)
        except msgspec.MsgspecError as error:
            raise Silent(f"worker {self.index} answered with no map") from error

    async def pulse(self) -> Pulse:
        return self._decoded(await self._get("/worker/pulse"), Pulse)

    async def usage(self, limit: int) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = msgspec.json.decode(await self._get(f"/admin/usage?limit={limit}"))["data"]
        return records

    async def explain(self, question: bytes) -> dict[str, Any]:
        status, body = await self._ask("POST", "/admin/explain", question, timeout_s=EXPLAIN_WITHIN_S)
        if status != 200:
            raise _refusal(status, body)
        try:
            answer: dict[str, Any] = msgspec.json.decode(body)
        except msgspec.MsgspecError as error:
            raise Silent(f"worker {self.index} answered with no explanation") from error
        return answer

    async def drain(self, pool: str, replica: str, draining: bool) -> None:
        verb = "drain" if draining else "undrain"
        # Whether it may be drained was decided by whoever asks this, who knows all workers.
        target = f"/admin/replicas/{_quoted(pool)}/{_quoted(replica)}/{verb}?force=true"
        status, body = await self._ask("POST", target, timeout_s=DRAIN_WITHIN_S)
        if status != 200:
            raise _refusal(status, body)

    async def cordon(self, pool: str, replica: str, cordoned: bool) -> None:
        verb = "cordon" if cordoned else "uncordon"
        target = f"/admin/replicas/{_quoted(pool)}/{_quoted(replica)}/{verb}"
        status, body = await self._ask("POST", target, timeout_s=DRAIN_WITHIN_S)
        if status != 200:
            raise _refusal(status, body)

    async def notices(self, kind: str) -> Mapping[str, bytes]:
        return self._decoded(await self._get("/worker/notices?" + urlencode({"kind": kind})), dict[str, bytes])

    async def announce(self, key: str, value: bytes, ttl_s: float | None) -> None:
        await self._order("/worker/notices", Announcement(key, value, ttl_s))

    async def retract(self, key: str) -> None:
        await self._order("/worker/notices", Announcement(key, None))

    async def claim(self, lease: str, holder: str, ttl_s: float) -> bool:
        return bool((await self._order("/worker/claim", StoreClaim(lease, holder, ttl_s)))["claimed"])

    async def _order(self, target: str, order: msgspec.Struct) -> Any:
        status, body = await self._ask("POST", target, msgspec.json.encode(order), timeout_s=DRAIN_WITHIN_S)
        if status != 200:
            raise _refusal(status, body)
        return self._decoded(body, dict[str, Any])

    async def requests(self, query: Query) -> dict[str, Any]:
        page: dict[str, Any] | None = await self._json("POST", "/worker/requests", msgspec.json.encode(query))
        return page or {"live": [], "live_total": 0, "settled": []}

    async def request(self, request_id: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = await self._json("GET", f"/worker/requests/{_quoted(request_id)}")
        return found

    async def end_request(self, request_id: str) -> bool:
        return bool(await self._json("DELETE", f"/worker/requests/{_quoted(request_id)}"))

    async def policies(self) -> dict[str, Any]:
        found: dict[str, Any] = await self._json("GET", "/worker/policies")
        return found

    async def traffic(self, model: str, limit: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = await self._json(
            "GET", "/worker/traffic?" + urlencode({"model": model, "limit": limit})
        )
        return rows

    async def _json(self, method: str, target: str, content: bytes = b"") -> Any:
        """The body of a 200, whatever JSON it is. Raises `Silent` for everything else."""
        status, body = await self._ask(method, target, content, timeout_s=LIST_WITHIN_S)
        if status != 200:
            raise Silent(f"worker {self.index} answered {status}")
        try:
            return msgspec.json.decode(body)
        except msgspec.MsgspecError as error:
            raise Silent(f"worker {self.index} answered with no JSON") from error

    async def change_adapter(self, change: AdapterChange) -> list[AdapterResult]:
        if change.path is not None:
            status, body = await self._ask(
                "POST", "/admin/adapters", msgspec.json.encode(change), timeout_s=ADAPTER_WITHIN_S
            )
        else:
            target = f"/admin/adapters/{_quoted(change.pool)}/{quote(change.name)}"
            if change.replica is not None:
                target += "?" + urlencode({"replica": change.replica})
            status, body = await self._ask("DELETE", target, timeout_s=ADAPTER_WITHIN_S)
        try:  # told even where none could
            return msgspec.json.decode(body, type=_Results).replicas
        except msgspec.MsgspecError as error:
            raise _refusal(status, body) from error

    async def limits(self, question: LimitsQuestion) -> LimitsAnswer:
        content = msgspec.json.encode(question)
        status, body = await self._ask("POST", "/admin/worker/limits", content, timeout_s=LIMITS_WITHIN_S)
        if status != 200:
            raise _refusal(status, body)
        return self._decoded(body, LimitsAnswer)

    async def costs(self, life: str, turn: int) -> Counted:
        target = "/admin/worker/costs?" + urlencode({"life": life, "turn": turn})
        return self._decoded(await self._get(target), Counted)

    def _decoded(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise Silent(f"worker {self.index} answered with something else") from error

    async def _get(self, target: str) -> bytes:
        """The body of a 200."""
        status, body = await self._ask("GET", target, timeout_s=self._timeout_s)
        if status != 200:
            raise Silent(f"worker {self.index} answered {status}")
        return body

    async def _ask(self, method: str, target: str, content: bytes = b"", *, timeout_s: float) -> tuple[int, bytes]:
        """Status and body. HTTP/1.0: one question a connection, answered until it closes."""
        head = f"{method} {target} HTTP/1.0\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    writer.write(head.encode() + content)
                    answer = await reader.read()
                finally:
                    writer.close()
        except OSError as error:  # TimeoutError among them
            raise Silent(f"worker {self.index} did not answer") from error
        head_bytes, _, body = answer.partition(b"\r\n\r\n")
        status = _STATUS.match(head_bytes)
        length = _LENGTH.search(head_bytes + b"\r\n")
        if status is None or length is None or int(length[1]) != len(body):
            raise Silent(f"worker {self.index} did not answer in full")
        return int(status[1]), body


class _Results(msgspec.Struct):
    replicas: list[AdapterResult]


class _Error(msgspec.Struct):
    message: str
    type: str
    code: str | None = None
    param: str | None = None


class _Refusal(msgspec.Struct):
    error: _Error


def _refusal(status: int, body: bytes) -> GatewayError:
    """The error that a worker answered with. Raises `Silent` when it is none."""
    try:
        said = msgspec.json.decode(body, type=_Refusal).error
    except msgspec.MsgspecError as error:
        raise Silent(f"a worker answered {status} without a reason") from error
    return Refused(status, said.message, said.type, said.code, said.param)


def _quoted(name: str) -> str:
    return quote(name, safe="")
