"""Who sees to it that a pool has as many replicas as it should: one interface, and those that need no other module.

A provider is told a number; that it is there takes minutes, and is seen by the replicas that come and go.
Everything may be told twice: a gateway that takes over does not know what the last one has just done.

    ProviderError    it was not done; the message says why, for people
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol

import msgspec

from gateway.config.scaling import CommandScale, KubernetesScale, Scaling, WebhookScale

if TYPE_CHECKING:  # imported where it is used: the extra `kubernetes` may not be installed
    from backends.kubernetes.scale import KubernetesScaler

OUTPUT_BYTES = 2000
"""Of what a command says last, that are shown."""
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Of the gateway's environment, which may hold secrets, what a command gets."""
NO_ROLL = "nothing is known of how to restart its servers one by one"


class ProviderError(Exception):
    """It was not done. The message says why."""


@dataclass(frozen=True, slots=True)
class Order:
    """How many replicas a pool should have."""

    pool: str
    count: int
    current: int
    """That there are, as far as the gateway sees."""
    leave: tuple[str, ...] = ()
    """Names of replicas that are drained and should be those that go."""
    reasons: tuple[str, ...] = ()
    """In sentences, the most important first."""


class Provider(Protocol):
    """Acts on orders for one pool. Everything raises `ProviderError`."""

    name: str
    """As in `scaling.provider`."""
    acts: bool
    """False: nobody is told anything."""
    chooses: bool
    """Whether those that go are those that `Order.leave` names; False: nobody can say which ones go."""

    async def current(self) -> int | None:
        """How many there should be, as the provider knows; None: it does not know."""

    async def apply(self, order: Order) -> None:
        """Have so many. Returns when it is under way."""

    def going(self, names: Sequence[str], count: int) -> Collection[str] | None:
        """Which of these replicas go when there are to be `count`; None: those that are named."""

    async def roll(self) -> None:
        """Restart all servers, a few at a time."""

    async def aclose(self) -> None:
        """No more orders."""


class Nobody:
    """Says it, and leaves it to others (KEDA, an HPA, people)."""

    name = "none"
    acts = False
    chooses = False

    async def current(self) -> int | None:
        return None

    async def apply(self, order: Order) -> None:
        return None

    def going(self, names: Sequence[str], count: int) -> Collection[str] | None:
        return None

    async def roll(self) -> None:
        raise ProviderError(NO_ROLL)

    async def aclose(self) -> None:
        return None


class Local(Nobody):
    """`tidegate fleet up` on one or more machines: agents ask for their orders, so that nothing has to be sent."""

    name = "local"
    acts = True
    chooses = True


class Command(Nobody):
    """Runs a command for each order: the words of the configuration, filled in, without a shell."""

    name = "command"
    acts = True

    def __init__(self, pool: str, settings: CommandScale, environ: Mapping[str, str] = os.environ) -> None:
        self._pool = pool
        self._settings = settings
        self._environ = {name: environ[name] for name in INHERITED if name in environ}
        self.chooses = any("{leave}" in word for word in settings.words)

    async def apply(self, order: Order) -> None:
        values = {
            "{pool}": order.pool,
            "{count}": str(order.count),
            "{current}": str(order.current),
            "{leave}": ",".join(order.leave),
        }
        words = [_filled(word, values) for word in self._settings.words]
        environ = {
            **self._environ,
            "TIDEGATE_SCALE_POOL": order.pool,
            "TIDEGATE_SCALE_COUNT": str(order.count),
            "TIDEGATE_SCALE_CURRENT": str(order.current),
            "TIDEGATE_SCALE_LEAVE": ",".join(order.leave),
        }
        with tempfile.TemporaryFile() as output:  # what it leaves running may go on writing: a pipe would not end
            try:
                process = await asyncio.create_subprocess_exec(
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    env=environ,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise ProviderError(f"the command {words[0]} cannot be run: {reason}") from error
            code: int | None = None
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    code = await process.wait()
            except TimeoutError:
                limit_s = self._settings.timeout_s
                raise ProviderError(f"the command {words[0]} took longer than {limit_s:g} s{_tail(output)}") from None
            finally:
                if code is None:
                    await _end(process)
            if code != 0:
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise ProviderError(f"the command {words[0]} {how}{_tail(output)}")


class Webhook(Nobody):
    """Tells an address, as JSON by POST. A 2xx means that it has been heard; redirects are not followed."""

    name = "webhook"
    acts = True
    chooses = True

    def __init__(self, settings: WebhookScale) -> None:
        self._settings = settings

    async def apply(self, order: Order) -> None:
        import httpx2  # a quarter of a second, for those who use it

        body = msgspec.json.encode(
            {
                "pool": order.pool,
                "count": order.count,
                "current": order.current,
                "leave": order.leave,
                "reasons": order.reasons,
            }
        )
        # The same for one order however often it is sent: whoever gets it twice need not act twice.
        what = f"{order.pool} {order.count} {order.current} {','.join(order.leave)}"
        headers = {
            "content-type": "application/json",
            "idempotency-key": hashlib.sha256(what.encode()).hexdigest()[:32],
        }
        if self._settings.token is not None:
            headers["authorization"] = f"Bearer {self._settings.token.get_secret_value()}"
        url, limit_s = self._settings.url, self._settings.timeout_s
        try:
            async with (
                asyncio.timeout(limit_s),
                httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=limit_s) as client,
                client.stream("POST", url, content=body, headers=headers) as answer,
            ):
                status, said = answer.status_code, bytearray()
                async for chunk in answer.aiter_bytes():
                    said += chunk
                    if len(said) > OUTPUT_BYTES:
                        break
        except TimeoutError:
            raise ProviderError(f"{url} did not answer within {limit_s:g} s") from None
        except (httpx2.HTTPError, OSError) as error:
            raise ProviderError(f"{url} cannot be reached: {str(error) or type(error).__name__}") from error
        if not 200 <= status < 300:
            raise ProviderError(f"{url} answers {status}{_shown(said[:OUTPUT_BYTES])}")


class Kubernetes(Nobody):
    """The scale subresource of a workload."""

    name = "kubernetes"
    acts = True
    chooses = True

    def __init__(self, settings: KubernetesScale) -> None:
        self._settings = settings
        self._scaler: KubernetesScaler | None = None

    def _client(self) -> KubernetesScaler:
        if self._scaler is None:
            from backends.kubernetes.client import Access
            from backends.kubernetes.scale import KubernetesScaler

            told = self._settings
            kubeconfig = None if told.kubeconfig is None else str(told.kubeconfig)
            access = Access(kubeconfig=kubeconfig, context=told.context, namespace=told.namespace)
            self._scaler = KubernetesScaler(access, told.kind, told.name)
        return self._scaler

    async def current(self) -> int | None:
        from backends.kubernetes.errors import KubernetesError

        try:
            return (await self._client().current()).spec
        except (KubernetesError, ImportError) as error:
            raise ProviderError(str(error)) from error

    async def apply(self, order: Order) -> None:
        from backends.kubernetes.errors import KubernetesError

        client = self._client()
        try:
            await client.prefer_to_remove(order.leave)
            await client.scale(order.count)
        except (KubernetesError, ImportError) as error:
            raise ProviderError(str(error)) from error

    def going(self, names: Sequence[str], count: int) -> Collection[str] | None:
        from backends.kubernetes.scale import leaving

        return leaving(self._settings.kind, names, count)

    async def roll(self) -> None:
        from backends.kubernetes.errors import KubernetesError

        try:
            await self._client().restart()
        except (KubernetesError, ImportError) as error:
            raise ProviderError(str(error)) from error

    async def aclose(self) -> None:
        if self._scaler is not None:
            await self._scaler.close()


def provider_of(pool: str, scaling: Scaling) -> Provider:
    """The one that the settings name. That it has its section was checked when they were read."""
    if scaling.provider == "kubernetes" and scaling.kubernetes is not None:
        return Kubernetes(scaling.kubernetes)
    if scaling.provider == "command" and scaling.command is not None:
        return Command(pool, scaling.command)
    if scaling.provider == "webhook" and scaling.webhook is not None:
        return Webhook(scaling.webhook)
    return Local() if scaling.provider == "local" else Nobody()


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _tail(output: IO[bytes]) -> str:
    """The last that it has said, for a message."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - OUTPUT_BYTES))
    return _shown(output.read(OUTPUT_BYTES))


async def _end(process: asyncio.subprocess.Process) -> None:
    """Have it and what it has started gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    with suppress(ProcessLookupError):
        await process.wait()


def _shown(said: bytes | bytearray) -> str:
    text = bytes(said).decode(errors="replace").strip()
    return f": {''.join(each if each.isprintable() or each == chr(10) else '?' for each in text)}" if text else ""
