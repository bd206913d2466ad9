"""A whole gateway with traffic, for what looks at one from outside: a real process with keys, two regions, three pools
and five fake engines that take their time and have caches, and a loop of its own that plays engines and clients.

The loop runs in a thread, so that engines go on answering while a test waits for a browser, and between tests. Every
figure that the admin side shows comes from requests that went in at the inference port.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from loadtests.engine import FakeEngine
from loadtests.pacing import Pace, Speed
from tests.support.command import PATIENCE_S, ServeProcess, serve_process

T = TypeVar("T")

OWN = {
    "eu-0": ("eu-west", Speed(prefill_us=60, token_ms=4, base_ms=8, kv_tokens=60_000, max_running=16)),
    "us-0": ("us-east", Speed(prefill_us=90, token_ms=6, base_ms=12, kv_tokens=60_000, max_running=16)),
}
CODE = {
    "code-eu": ("eu-west", Speed(prefill_us=120, token_ms=5, base_ms=10, kv_tokens=120_000, max_running=8)),
    "code-us": ("us-east", Speed(prefill_us=120, token_ms=5, base_ms=10, kv_tokens=120_000, max_running=8)),
}
RENTED = {"rented-0": ("us-east", Speed(prefill_us=20, token_ms=3, base_ms=60, kv_tokens=10**6, max_running=512))}
TENANTS = ("acme", "globex", "initech")
READER_FILE = "reader-token"
READER_TOKEN = "the-token-of-somebody-who-may-look"
"""Of the admin side, beside the owner's (`Rig.token`)."""
FOUND_FILE = "replicas.json"
"""Replicas of `code-pool` beside those that are written down; there are none until a test writes some."""
_TEXT = "the tide turns at the gate while ships wait for water and the keeper counts each lamp on the wall"


def paced_engine(speed: Speed, model: str, *, native: bool) -> FakeEngine:
    """An engine with a cache and a queue. `native`: it tells of both, and loads adapters, as SGLang does."""
    engine = FakeEngine(models=(model,), record=False)
    engine.pace = pace = Pace(speed)
    if native:
        engine.adapters = {}
        lora = {"slots_total": 4, "slots_used": 0}
        engine.reports = {
            "/v1/loads": lambda: {
                "loads": [
                    {
                        "dp_rank": 0,
                        "num_running_reqs": engine.running,
                        "num_waiting_reqs": 0,
                        "max_running_requests": speed.max_running,
                        "num_used_tokens": pace.cached_tokens,
                        "max_total_num_tokens": speed.kv_tokens,
                        "lora": {**lora, "slots_used": len(engine.adapters or ())},
                    }
                ]
            },
            "/ready": dict,
            "/server_info": lambda: {
                "version": "0.5.23",
                "max_total_num_tokens": speed.kv_tokens,
                "max_running_requests": speed.max_running,
                "enable_lora": True,
                "enable_cache_report": True,
                "page_size": 64,
            },
            "/model_info": lambda: {"served_model_name": model},
        }
    return engine


class Rig:
    """The gateway, its engines and its clients. Methods may be called from any thread or loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, gateway: ServeProcess, engines: dict[str, FakeEngine], folder: Path
    ) -> None:
        self._loop = loop
        self.gateway = gateway
        self.folder = folder
        """Of its files."""
        self.engines = engines
        """By the replica's name. Touch one only inside `run`."""
        self.url = ""
        """Where clients ask."""
        self.admin_url = ""
        self.token = ""
        """The owner's."""
        self.keys: dict[str, str] = {}
        """API keys by tenant; `exhausted` has spent its budget."""
        self._client = httpx2.AsyncClient(trust_env=False, timeout=PATIENCE_S)
        self._random = random.Random(7)
        self._trickle: asyncio.Task[None] | None = None
        self.chats: list[list[dict[str, str]]] = []

    @property
    def dashboard(self) -> str:
        return f"{self.admin_url}/admin/"

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run this in the engines' loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self._loop))

    async def admin(self, method: str, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        """One call of the admin API as the owner; `path` begins with a slash."""

        async def ask() -> httpx2.Response:
            bearer = {"authorization": f"Bearer {self.token}", **headers}
            return await self._client.request(method, self.admin_url + path, json=body, headers=bearer)

        return await self.run(ask)

    async def ask(self, tenant: str = "acme", *, model: str = "chat", **fields: Any) -> httpx2.Response:
        """One request through the inference port, to its end."""
        return await self.run(lambda: self._ask(tenant, model, **fields))

    async def send(self, count: int, *, at_once: int = 8) -> None:
        """Conversations of several tenants, this many turns in all."""
        await self.run(lambda: self._send(count, at_once))

    async def trickle(self, per_s: float | None) -> None:
        """Have requests go on coming at this rate; None ends it."""

        async def change() -> None:
            if self._trickle is not None:
                self._trickle.cancel()
                await asyncio.wait([self._trickle])
                self._trickle = None
            if per_s is not None:
                self._trickle = asyncio.create_task(self._go_on(per_s))

        await self.run(change)

    # -- inside the loop

    async def _ask(self, tenant: str, model: str, **fields: Any) -> httpx2.Response:
        body = {"model": model, "max_tokens": 12, "messages": [{"role": "user", "content": "Hello there"}], **fields}
        headers = {"authorization": f"Bearer {self.keys.get(tenant, tenant)}"}
        return await self._client.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)

    async def _turn(self, number: int) -> None:
        """One more turn of a conversation, so that caches have something to hold."""
        rng, words = self._random, _TEXT.split()
        if len(self.chats) < 12 or rng.random() < 0.15:
            system = " ".join(rng.choices(words, k=rng.choice((120, 400, 900))))
            chat = [{"role": "system", "content": system}]
            self.chats.append(chat)
        else:
            chat = rng.choice(self.chats)
        chat.append({"role": "user", "content": " ".join(rng.choices(words, k=30))})
        model = ("chat", "chat", "chat", "code", "support")[number % 5]
        await self._ask(
            TENANTS[number % len(TENANTS)],
            model,
            messages=list(chat),
            stream=number % 3 != 0,
            max_tokens=rng.choice((4, 12, 24)),
        )
        chat.append({"role": "assistant", "content": "noted"})
        del self.chats[:-24]

    async def _send(self, count: int, at_once: int) -> None:
        places = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with places:
                await self._turn(number)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(one(number))

    async def _go_on(self, per_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            number = 0
            while True:
                group.create_task(self._turn(number))
                number += 1
                await asyncio.sleep(1 / per_s)

    async def _prepare(self) -> None:
        """Tenants, keys and the first traffic: answers, and every kind of refusal."""
        self.url, self.admin_url = await self.gateway.url(), await self.gateway.admin_url()
        self.token = self.gateway.token
        for tenant in TENANTS:
            self.keys[tenant] = await self._key({"tenant": tenant, "name": f"{tenant} production"})
        self.keys["exhausted"] = await self._key(
            {"tenant": "initech", "name": "nightly batch", "limits": {"requests_per_minute": 1, "burst_s": 1}}
        )

    async def _key(self, fields: dict[str, Any]) -> str:
        bearer = {"authorization": f"Bearer {self.token}"}
        answer = await self._client.post(f"{self.admin_url}/admin/keys", json=fields, headers=bearer)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["key"])

    async def _first_traffic(self) -> None:
        await self._send(48, 8)
        for tenant, fields in (
            ("exhausted", {}),
            ("exhausted", {}),
            ("tgk_this-key-does-not-exist-anywhere", {}),
            ("acme", {"model": "no-such-model"}),
        ):
            await self._ask(tenant, **{"model": "chat", **fields})

    async def _aclose(self) -> None:
        if self._trickle is not None:
            self._trickle.cancel()
            await asyncio.wait([self._trickle])
        await self._client.aclose()


def fleet_sections(folder: Path, engines: dict[str, FakeEngine]) -> dict[str, Any]:
    """The configuration over these engines, with everything that a page of the dashboard can show."""

    def replicas(names: dict[str, tuple[str, Speed]]) -> list[dict[str, Any]]:
        return [
            {"url": engines[name].url, "name": name, "region": region, "max_in_flight": speed.max_running}
            for name, (region, speed) in names.items()
        ]

    reader = {"role": "reader", "token": {"file": str(folder / READER_FILE)}}
    return {
        "admin": {"port": 0, "tokens": {"reader": reader}},
        "auth": "keys",
        "database": f"sqlite:///{folder}/tidegate.db",
        "region": "eu-west",
        "latency_ms": {"eu-west": {"us-east": 8}},
        "models": {
            "chat": {
                "backend": "chat-pool",
                "aliases": ["gpt-4o-mini"],
                "price": {"input": 0.2, "cached_input": 0.02, "output": 0.6},
                "spill": {
                    "backend": "rented",
                    "upstream_model": "far/chat",
                    "price": {"input": 0.3, "cached_input": 0.03, "output": 1.2},
                    "usd_per_hour": 5,
                    "usd_per_day": 40,
                    "ttft_target_ms": {"critical": 1000, "standard": 150, "batch": None, "sheddable": None},
                },
            },
            "support": {
                "backend": "chat-pool",
                "upstream_model": "chat",
                "adapter": "support-v3",
                "price": {"input": 0.2, "cached_input": 0.02, "output": 0.6},
            },
            "code": {"backend": "code-pool", "price": {"input": 0.5, "cached_input": 0.1, "output": 1.5}},
        },
        "backends": {
            "chat-pool": {
                "engine": "sglang",
                "replicas": replicas(OWN),
                "adapters": [{"name": "support-v3", "path": "/adapters/support-v3"}],
                "adapters_load": "always",
                "discovery": {"registration": {"ttl_s": 60}},
                "scaling": {"max": 4, "usd_per_hour": 2.5},
            },
            "code-pool": {
                "engine": "openai",
                "replicas": replicas(CODE),
                "discovery": {"file": {"path": str(folder / FOUND_FILE), "interval_s": 0.2}},
            },
            "rented": {"engine": "openai", "hosted": True, "replicas": replicas(RENTED)},
        },
        "tenants": {
            "acme": {"weight": 2.0, "limits": {"requests_per_minute": 60_000, "usd_per_day": 25}},
            "globex": {"limits": {"input_tokens_per_minute": 5_000_000, "usd_per_month": 100}},
            "initech": {"limits": {"concurrent_requests": 64}},
        },
    }


def _many(urls: list[str]) -> dict[str, Any]:
    regions = ("eu-west", "us-east", "us-west", "ap-south")
    return {
        "engine": "openai",
        "health": {"probe": False},
        "replicas": [
            {"url": url, "name": f"gpu-{at:03}", "region": regions[at % len(regions)], "max_in_flight": 16}
            for at, url in enumerate(urls)
        ],
    }


@asynccontextmanager
async def _rig(folder: Path, *, traffic: bool, many: int, sections: dict[str, Any]) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        engines: dict[str, FakeEngine] = {}
        for names, model, native in ((OWN, "chat", True), (CODE, "code", False), (RENTED, "far/chat", False)):
            for name, (_, speed) in names.items():
                engines[name] = await stack.enter_async_context(paced_engine(speed, model, native=native))
        reader = folder / READER_FILE
        reader.write_text(READER_TOKEN)
        reader.chmod(0o600)
        (folder / FOUND_FILE).write_text("[]")
        content = {**fleet_sections(folder, engines), **sections}
        if many:
            one = await stack.enter_async_context(FakeEngine(ports=(0,) * many, models=("many",), record=False))
            content["backends"]["many"] = _many(one.urls)
            content["models"]["many"] = {"backend": "many", "price": {"input": 0.1, "output": 0.2}}
        gateway = await stack.enter_async_context(serve_process(folder, [], **content))
        rig = Rig(asyncio.get_running_loop(), gateway, engines, folder)
        await rig._prepare()
        try:
            if traffic:
                await rig._first_traffic()
            yield rig
        finally:
            await rig._aclose()


@contextmanager
def fleet_rig(folder: Path, *, traffic: bool = True, many: int = 0, **sections: Any) -> Iterator[Rig]:
    """A rig in this folder until the block ends; `sections` replace or add top-level settings. `many`: a further pool
    and model of this name, of so many replicas in four regions."""
    ready = threading.Event()
    found: list[Rig] = []
    failed: list[BaseException] = []
    stop: Callable[[], object] | None = None

    async def main() -> None:
        nonlocal stop
        loop, ending = asyncio.get_running_loop(), asyncio.Event()
        stop = partial(loop.call_soon_threadsafe, ending.set)
        async with _rig(folder, traffic=traffic, many=many, sections=sections) as rig:
            found.append(rig)
            ready.set()
            await ending.wait()

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="fleet rig", daemon=True)
    thread.start()
    ready.wait(2 * PATIENCE_S)
    try:
        if not found:
            raise failed[0] if failed else TimeoutError("the gateway did not start in time")
        yield found[0]
    finally:
        if stop is not None:
            stop()
        thread.join(2 * PATIENCE_S)
    if failed:
        raise failed[0]
