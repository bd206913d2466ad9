"""Tells a gateway where replicas are, at its admin listener: the client of `/admin/registrations` and `/admin/agents`.

    RegistrarError
    ├── GatewayAway          nobody answered, or not as a gateway does: the same may be asked again
    └── RegistrationRefused  a gateway said no; asking the same again helps only once something else has changed

Each question stands for itself; saying things again in time is the caller's (`Lease.renew_in_s`).
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import msgspec

from backends.discovery.member import Member, State

ANSWER_WITHIN_S = 5.0
MAX_ANSWER_BYTES = 1 << 20
"""The orders of an agent with thousands of servers have some hundred kilobytes."""
_SHORTEST_S, _LONGEST_S = 0.1, 3600.0


class RegistrarError(Exception):
    """The gateway has not taken what it was told."""


class GatewayAway(RegistrarError):
    """No gateway answers at `address`, for this `reason`."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"no gateway answers at {address}: {reason}")
        self.address = address
        self.reason = reason


class RegistrationRefused(RegistrarError):
    """A gateway answered and said no. `code` is that of its error; empty where it gave none."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says to a registration."""

    ttl_s: float
    """It ends after so long without another one."""
    renew_in_s: float
    state: State = "ready"
    """As the gateway has it now."""
    in_flight: int = 0
    """Requests under way at the replica, of all its workers."""
    empty: bool = False
    """No worker has any."""
    draining: bool = False
    """All workers know that it gets nothing new."""


class PoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent has of one pool."""

    launched: int
    ready: int
    max: int | None = None
    """As many as it could have; None: it does not know."""
    roll: int = 0
    """The last rolling restart that it has carried out."""


class AgentReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent has."""

    pools: Mapping[str, PoolReport] = {}


class PoolOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent is to have of one pool."""

    count: int
    leave: tuple[str, ...] = ()
    """Names of the servers that are to go."""
    roll: int = 0
    """Higher than that of the report: all are to be restarted, one after the other."""


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway says to an agent's report."""

    renew_in_s: float
    pools: Mapping[str, PoolOrders] = {}


_Answer = TypeVar("_Answer", Lease, Orders)


class Registrar:
    """A connection to one gateway. Belongs to one event loop; close it with `aclose` or as a context manager.

    Asks without proxies, cookies or credentials of the environment, and follows no redirect: the token goes to this
    address and no other.
    """

    def __init__(
        self,
        admin_url: str,
        token: str | None,
        ca_file: Path | None = None,
        *,
        timeout_s: float = ANSWER_WITHIN_S,
    ) -> None:
        """`admin_url`: such as http://127.0.0.1:7401. `ca_file`: certificates (PEM) to trust instead of the system's.

        Raises `ValueError` for an address that is none, and `OSError` (`ssl.SSLError`) for an unusable `ca_file`.
        """
        self.address = _checked(admin_url)
        self.token = token
        """For the next question; may be changed."""
        self._timeout_s = timeout_s
        checking = ssl.create_default_context(cafile=ca_file)
        self._client = httpx2.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            verify=checking,
            timeout=timeout_s,
            # Hundreds of replicas ask every few seconds, and the listener has room for 200 connections: none is kept.
            limits=httpx2.Limits(max_keepalive_connections=0),
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "tidegate"},
        )

    async def put(self, pool: str, member: Member) -> Lease:
        """Register a replica, or renew that; `member.name` must be given. Raises `RegistrarError`."""
        if not member.name:
            raise ValueError(f"the replica at {member.url} has no name to register it by")
        lease = await self._ask("PUT", _target(pool, member.name), member, Lease)
        return msgspec.structs.replace(lease, renew_in_s=_within(lease.renew_in_s))

    async def remove(self, pool: str, name: str) -> None:
        """End a registration; that there is none (any more) is no error. Raises `RegistrarError`."""
        try:
            await self._send("DELETE", _target(pool, name), None)
        except RegistrationRefused as refused:
            if refused.status != 404:
                raise

    async def report(self, agent: str, body: AgentReport | Mapping[str, Any]) -> Orders:
        """Say what an agent has, and be told what it is to have. Raises `RegistrarError`."""
        orders = await self._ask("PUT", f"/admin/agents/{quote(agent, safe='')}", body, Orders)
        return msgspec.structs.replace(orders, renew_in_s=_within(orders.renew_in_s))

    async def aclose(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> Registrar:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ask(self, method: str, target: str, content: object, kind: type[_Answer]) -> _Answer:
        body = await self._send(method, target, content)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise GatewayAway(self.address, f"it answers, and not as a gateway of this version ({error})") from error

    async def _send(self, method: str, target: str, content: object) -> bytes:
        """The body of a 200."""
        headers = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        if content is not None:
            headers["content-type"] = "application/json"
        sent = None if content is None else msgspec.json.encode(content)
        body = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout_s),  # over all; httpx's own limits are for each read
                self._client.stream(method, self.address + target, content=sent, headers=headers) as answer,
            ):
                async for piece in answer.aiter_raw():
                    body += piece
                    if len(body) > MAX_ANSWER_BYTES:
                        raise GatewayAway(self.address, f"it answers with over {MAX_ANSWER_BYTES} bytes")
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise GatewayAway(self.address, f"no answer within {self._timeout_s:g} s") from error
        except (httpx2.HTTPError, OSError) as error:
            raise GatewayAway(self.address, str(error) or type(error).__name__) from error
        if answer.status_code == 200:
            return bytes(body)
        raise self._refusal(answer.status_code, bytes(body))

    def _refusal(self, status: int, body: bytes) -> RegistrarError:
        try:
            error = msgspec.json.decode(body)["error"]
            code, message = str(error.get("code") or ""), str(error["message"])
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
            code, message = "", ""
        if status >= 500 or (not message and not 400 <= status < 500):
            # A gateway that starts, stops or has lost its store; or something else that is in front of it.
            return GatewayAway(self.address, message or f"it answers {status}")
        return RegistrationRefused(status, code, message or f"{self.address} answers {status}")


def _target(pool: str, name: str) -> str:
    return f"/admin/registrations/{quote(pool, safe='')}/{quote(name, safe='')}"


def _within(seconds: float) -> float:
    """A gateway that says 0 is not asked without a pause."""
    return min(max(seconds, _SHORTEST_S), _LONGEST_S) if math.isfinite(seconds) else _LONGEST_S


def _checked(url: str) -> str:
    problem = ValueError(f"{url!r} is not the address of an admin listener, such as http://127.0.0.1:7401")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise problem from error
    if not usable or parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise problem
    return url.rstrip("/")
